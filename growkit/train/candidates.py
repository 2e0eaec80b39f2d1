"""Trying the ways into a stage: each is grown, trained for its probe and judged on held-out data; one is kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from growkit import faults
from growkit.checkpoint.metrics_log import without_nan
from growkit.data.stream import Batches
from growkit.schedule.candidates import Trial
from growkit.schedule.decisions import CANDIDATES, NONE, Decision
from growkit.schedule.stage import Stage
from growkit.train.module import StageModule
from growkit.train.trainer import fit, stage_trainer

if TYPE_CHECKING:
    from growkit.train.run import Run


def choose(run: Run, stage: Stage) -> Decision | None:
    """Which of the trials of ``stage`` has the lowest held-out loss, if that is lower than not growing by more than
    ``probe_least``; None if the run was asked to stop meanwhile. State, progress and data stay where they are: the
    probes' training is thrown away, and what is chosen is grown again, to the same weights."""
    losses: dict[str, float] = {}
    for number, trial in enumerate(stage.trials, start=1):
        # Of the log, so that a resumed run, which tries again, has them once: it is cut back to the checkpoint before.
        place = {"name": stage.name, "candidate": trial.name, "number": number, "of": len(stage.trials)}
        run.record("trial", **place, steps=trial.steps, parameters=trial.stage.model.num_params())
        loss = _probe(run, trial)
        if loss is None:
            return None
        run.record("trial", **place, steps=trial.steps, loss=loss)
        losses[trial.name] = loss if math.isfinite(loss) else math.inf
        faults.point("mid_probe")
    best = min((name for name in losses if name != NONE), key=lambda name: losses[name])
    chosen = best if losses[NONE] - losses[best] > stage.probe_least else NONE  # NaN, of two infinities, is not
    tried = {
        trial.name: {"loss": losses[trial.name], "steps": trial.steps, "tokens": trial.tokens, "flops": trial.flops}
        for trial in stage.trials
    }
    evidence = without_nan({CANDIDATES: tried, "least": stage.probe_least})
    at, spent = run.progress, stage.probe_flops
    where = (0, at.step, at.tokens, at.flops + spent)
    return Decision(CANDIDATES, stage.index, stage.name, *where, evidence, chosen, spent, stage.probe_tokens)


def _probe(run: Run, trial: Trial) -> float | None:
    """The held-out loss of ``trial`` after its probe, on the stage's own next data; None if the run is to stop."""
    state, _ = run.grown(trial.stage)
    stage, micro = trial.stage, run.micro_batch(state, trial.stage)
    accumulate = stage.accumulate * stage.micro_batch_size // micro
    module = StageModule(state, stage, run.recipe, 0)
    steps = _ProbeSteps(run, module, trial.steps, accumulate)
    trainer = stage_trainer(run.recipe, trial.steps, accumulate, [steps])
    begin = run.progress.data or run.source.begin()
    fit(trainer, module, Batches(run.source, begin, stage.shape, 0, accumulate, run.rank, run.world_size))
    run.stop.install()
    module.release()
    return steps.loss


class _ProbeSteps(L.Callback):
    """Counts the steps of a probe, and scores its last one. Every probe draws the same dropout."""

    def __init__(self, run: Run, module: StageModule, steps: int, accumulate: int) -> None:
        self.run, self.module, self.steps, self.accumulate = run, module, steps, accumulate
        self.loss: float | None = None

    def on_train_start(self, *_: Any) -> None:
        self.run.stop.install()
        torch.set_rng_state(self.run.rng)
        if self.run.cuda_rng is not None:
            torch.cuda.set_rng_state(self.run.cuda_rng)

    def on_train_batch_end(self, trainer: L.Trainer, _: Any, __: Any, ___: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate:
            return
        self.module.step_done()
        self.module.losses = []
        stopping = self.run.asked_to_stop()
        if self.run.world_size > 1:
            stopping = trainer.strategy.reduce_boolean_decision(stopping, all=False)
        if stopping:
            trainer.should_stop = True
        elif self.module.stage_step == self.steps:
            self.loss = trainer.strategy.broadcast(self.run.scores(self.module)["loss"])
