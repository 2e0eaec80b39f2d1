"""What a bandit chooses for the steps of a stage, in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from growkit.config.recipe import BanditConfig, Recipe
from growkit.data.shape import StepShape
from growkit.data.stream import Batch
from growkit.schedule.arms import STATE
from growkit.schedule.bandit import Exp3S
from growkit.schedule.progress import Progress
from growkit.schedule.stage import Stage


class Choices:
    """The choices in ``stage``, from ``at`` on; the stage has arms. ``state``: of Exp3S after the last step, and
    ``over``; it lies in the state of the data. A bandit over sources goes on from stage to stage; each stage has
    lengths of its own, and begins anew. Batches ask ahead of what is trained on: Exp3S makes that no difference."""

    def __init__(self, recipe: Recipe, stage: Stage, at: Progress) -> None:
        bandit = recipe.data.bandit
        assert stage.arms is not None and isinstance(bandit, BanditConfig)
        self.stage, self.arms = stage, stage.arms
        self.policy = Exp3S(len(self.arms.names), bandit.learning_rate, bandit.exploration, recipe.run.seed)
        self._first = at.step - at.stage_step  # of the stage, counted over all of them
        goes_on = at.stage_step > 0 or self.arms.over == "sources"
        kept = self.arms.state_in(at.data) if goes_on else None
        self.state: Mapping[str, Any] = kept or {**self.policy.begin(), "over": self.arms.over}

    def shape(self, stage_step: int) -> StepShape:
        """Of the step number ``stage_step`` of the stage, from 0: of the arm that is chosen for it."""
        arm, planned = self.policy.choose(self.state, self._first + stage_step), self.stage.shape(stage_step)
        if self.arms.over == "sources":
            return dataclasses.replace(planned, source=arm)
        return self.stage.pace.shape(self.stage.lengths.values[arm], planned.window)

    def learned(self, stage_step: int, batch: Batch, gain: float, flops: float) -> None:
        """Takes in what the step of ``batch`` gained, for ``flops``."""
        self.state = self.policy.learned(self.state, self._first + stage_step, self._arm(batch), gain / flops)

    def add_to(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state of the data with that of the choices."""
        return {**data, STATE: self.state}

    def record(self, batch: Batch, gain: float) -> dict[str, Any]:
        """For the log, of the last step, that of ``batch``: its arm, what it gained, and how likely each arm was."""
        likely = dict(zip(self.arms.names, self.policy.probabilities(self.state), strict=True))
        return {"arm": self.arms.names[self._arm(batch)], "prediction_gain": gain, "arm_probabilities": likely}

    def _arm(self, batch: Batch) -> int:
        if self.arms.over == "lengths":
            return self.stage.lengths.values.index(batch.tokens.shape[1])
        assert batch.source is not None
        return batch.source
