"""The endless sequence of a synthetic task's samples, as a source of a run."""

from __future__ import annotations

import torch

from growkit.data.stream import Rows, State
from growkit.data.synthetic.tasks import Task


class TaskSource:
    """The samples of ``task`` and ``seed``, one a row, from the first on. The state is the tokens read and the number
    of the next sample: rows of any shape are the next samples, in the length that is asked for."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def begin(self, cursor: int = 0) -> State:
        assert cursor == 0, "how many samples the tokens before were depends on their lengths"
        return {"cursor": 0, "sample": 0}

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        first, last, _ = mine.indices(rows)
        sample = state.get("sample", 0)  # {"cursor": 0} is the beginning of every source
        tokens, targets = self.task.samples(self.seed, sample + first, last - first, context_length)
        after = {"cursor": state["cursor"] + rows * context_length, "sample": sample + rows}
        return Rows(torch.from_numpy(tokens), torch.from_numpy(targets), None, rows * self.task.answers), after
