"""Several sources in one sequence of rows, each with its share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growkit.data.stream import DataSource, Rows, State

ROUNDING = 1e-6  # of a row: shares times billions of rows


class Mixture:
    """Rows of ``sources`` in the proportions of ``weights`` (positive). After any number of rows none is a whole row
    behind or ahead of its share (Tijdeman 1980, "The chairman assignment problem": of those that are owed a row, the
    one that would be behind the soonest). Each source goes on where its own last row ended.

    State: ``cursor``, tokens of all; ``rows`` of each source that were given out by weight so far; ``sources``, their
    own states.
    """

    def __init__(self, sources: Sequence[DataSource], weights: Sequence[float]) -> None:
        self.sources = tuple(sources)
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)

    def begin(self) -> State:
        states = [source.begin() for source in self.sources]
        return {"cursor": 0, "rows": [0] * len(states), "sources": states}

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        of, counts = self._turns(state["rows"], rows)
        first, last, _ = mine.indices(rows)
        taken, states = [], []
        for number, (source, own) in enumerate(zip(self.sources, state["sources"], strict=True)):
            share = slice(int((of[:first] == number).sum()), int((of[:last] == number).sum()))
            found, after = source.take(own, int((of == number).sum()), context_length, share)
            taken.append(found)
            states.append(after)
        order = np.argsort(np.argsort(of[first:last], kind="stable"), kind="stable")
        together = Rows(
            _joined([found.tokens for found in taken], order),
            _joined([found.targets for found in taken], order),
            _joined_segments(taken, order),
            sum(found.scored for found in taken),
        )
        cursor = sum(int(after["cursor"]) for after in states)
        return together, {"cursor": cursor, "rows": counts.tolist(), "sources": states}

    def alone(self, number: int) -> DataSource:
        """Rows of the source ``number`` only, as long as it is asked: by no weight, which they do not count for."""
        return _Alone(self, number)

    def _turns(self, before: Sequence[int], rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Whose each of the next ``rows`` is, and the rows of each source after them."""
        counts, of = np.array(before, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        least = 1 / max(1, 2 * len(counts) - 2)
        done = int(counts.sum())
        for row in range(rows):
            owed = self.shares * (done + row + 1) - counts
            soonest = np.where(owed >= least - ROUNDING, (1 - least - owed) / self.shares, np.inf)
            of[row] = soonest.argmin()
            counts[of[row]] += 1
        return of, counts


class _Alone:
    """One source of ``mixture``; the states of the others stay where they are."""

    def __init__(self, mixture: Mixture, number: int) -> None:
        self.mixture, self.number = mixture, number

    def begin(self) -> State:
        return self.mixture.begin()

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        states = list(state["sources"])
        found, states[self.number] = self.mixture.sources[self.number].take(
            states[self.number], rows, context_length, mine
        )
        cursor = sum(int(own["cursor"]) for own in states)
        return found, {"cursor": cursor, "rows": state["rows"], "sources": states}


def _joined(parts: Sequence[Tensor], order: NDArray[np.int64]) -> Tensor:
    return torch.cat(list(parts))[torch.from_numpy(order)]


def _joined_segments(taken: Sequence[Rows], order: NDArray[np.int64]) -> Tensor | None:
    """None if no source has any; of one that has none, each row is one segment."""
    if all(rows.segments is None for rows in taken):
        return None
    whole = [torch.zeros_like(r.tokens, dtype=torch.int32) if r.segments is None else r.segments for r in taken]
    return _joined(whole, order)
