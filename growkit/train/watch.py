"""Looks at the losses of a stage as they are logged, and ends it where its trigger says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import Strategy

from growkit.checkpoint.metrics_log import read_log, without_nan
from growkit.errors import CheckpointError
from growkit.schedule.decisions import Decision
from growkit.schedule.stage import Stage
from growkit.schedule.triggers import Measured

if TYPE_CHECKING:
    from growkit.train.run import Run


class Watch:
    """Of one stage that has a trigger. The first process looks, and tells the others. In a resumed run the losses from
    before come from the log, which is cut back to the checkpoint. Raises CheckpointError, in every process alike, if
    they are not there."""

    def __init__(self, run: Run, stage: Stage) -> None:
        assert stage.until is not None
        self.run, self.stage, self.trigger = run, stage, stage.until
        # In all of them: one that found its log whole would wait for a first one that did not.
        self.measured: list[Measured] = list(self._logged()) if run.progress.stage_step else []

    def _logged(self) -> Iterator[Measured]:
        """What was measured up to now: the steps that every run logs, and not those of a save or a stop."""
        at, every = self.run.progress, self.run.recipe.monitor.log_every
        begun = at.step - at.stage_step
        wanted = iter(range((begun // every + 1) * every, at.step + 1, every))
        due = next(wanted, None)
        for record in read_log(self.run.folder.metrics):
            if record["kind"] == "step" and record["step"] == due:
                yield Measured(record["step"] - begun, record["tokens"], record["flops"], record["loss"])
                due = next(wanted, None)
        if due is not None:
            problem = f"lacks the loss of step {due}, by which the trigger of the stage {self.stage.name!r} decides"
            mend = "restore the log and monitor.log_every, or drop the stage's until"
            raise CheckpointError("lost-measurements", problem, key=str(self.run.folder.metrics), mend=mend)

    def ends_here(self, strategy: Strategy, loss: float) -> bool:
        """Whether the stage ends with the step that was just logged, which is then decided and written down."""
        decision = strategy.broadcast(self._look(loss) if self.run.rank == 0 else None)
        if decision is not None:
            self.run.decide(decision)
        return decision is not None

    def _look(self, loss: float) -> Decision | None:
        at = self.run.progress
        self.measured.append(Measured(at.stage_step, at.tokens, at.flops, loss))
        verdict = self.trigger.decide(self.measured)
        if not verdict.fire or at.stage_step < self.stage.ramp_steps:  # what comes in under a mask has to be whole
            return None
        evidence = without_nan(verdict.evidence)
        by = evidence.pop("kind")
        return Decision(by, at.stage, self.stage.name, at.stage_step, at.step, at.tokens, at.flops, evidence)
