"""Where the time of a training step goes: phases by the clock, operations by PyTorch's profiler."""

from __future__ import annotations

import re
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from growkit.config.recipe import Recipe
from growkit.data.stream import Batches
from growkit.growth.state import TrainState
from growkit.models.decoder import init_params
from growkit.schedule.stage import GrowthSchedule, Stage
from growkit.train import hardware
from growkit.train.data import RunData
from growkit.train.module import StageModule
from growkit.train.trainer import fit, stage_trainer

WARM_UP = 3  # steps before the clock starts
TRACED = 3  # steps under the profiler, after those that are timed: it slows what it watches
PHASES = ("data", "forward", "backward", "update")
# The first pattern that an operation's name matches names its group.
GROUPS = {
    "attention": r"scaled_dot_product|flash|fmha|attention",
    "matrix products": r"::(mm|bmm|addmm|baddbmm|matmul|linear)$|gemm|cutlass|cublas",
    "loss": r"log_softmax|nll_loss|cross_entropy|logsumexp",
    "optimizer": r"adam|_foreach|vector_norm|clip",
    "copies": r"::(copy_|clone|contiguous|cat|stack|to|_to_copy|fill_|zero_|zeros.*|empty.*)$|[Mm]emcpy|[Mm]emset",
}
OTHER = "elementwise, norms and the rest"


@dataclass(frozen=True)
class StageProfile:
    """``steps``: seconds of each whole step; ``phases``: mean seconds a step by phase; ``groups``: share of the
    operations' own time by kind; ``operations``: (name, share, calls a step), the longest first."""

    stage: Stage
    steps: tuple[float, ...]
    phases: dict[str, float]
    groups: dict[str, float]
    operations: list[tuple[str, float, float]]
    peak_flops: float
    memory_bytes: int

    @property
    def step_seconds(self) -> float:
        """The median: one slow moment of the machine does not move it."""
        return statistics.median(self.steps)

    @property
    def flops_per_second(self) -> float:
        """Of training alone: no step here is looked at again."""
        flops_per_token = self.stage.model.flops_per_token(self.stage.context_length)
        return flops_per_token * self.stage.global_batch_tokens / self.step_seconds

    @property
    def utilisation(self) -> float:
        return self.flops_per_second / self.peak_flops

    @property
    def tokens_per_second(self) -> float:
        return self.stage.global_batch_tokens / self.step_seconds


def profile_stage(
    recipe: Recipe, schedule: GrowthSchedule, data: RunData, stage: Stage, steps: int, trace: Path
) -> StageProfile:
    """Trains ``stage``'s model, freshly drawn, for a few steps on ``data``; writes a Chrome trace to ``trace``."""
    device, dtype = hardware.accelerator(recipe.trainer), hardware.training_dtype(recipe.trainer)
    peak = recipe.monitor.peak_flops_per_second or hardware.measure_peak_flops(device, dtype)
    generator = torch.Generator().manual_seed(recipe.run.seed)
    module = StageModule(TrainState(stage.model, init_params(stage.model, generator)), stage, recipe, 0, data.reference)
    source = data.source(recipe, schedule)
    clock = PhaseClock(stage.accumulate, WARM_UP, steps, device)
    trainer = stage_trainer(recipe, WARM_UP + steps + TRACED, stage.accumulate, [clock])
    whole = stage.pace.shape(stage.context_length, stage.shape(0).window)
    fit(
        trainer,
        module,
        Batches(source, source.begin(), lambda _: whole, accumulate=stage.accumulate, candidates=stage.candidates),
    )
    assert clock.profiler is not None
    clock.profiler.export_chrome_trace(str(trace))
    events = {e.key: e for e in clock.profiler.key_averages() if e.key not in (*PHASES, "ProfilerStep*")}
    own = {key: _own_time(event, device) for key, event in events.items()}
    total = sum(own.values())
    longest = sorted(own, key=lambda key: own[key], reverse=True)
    groups: dict[str, float] = {}
    for key in longest:
        group = next((name for name, pattern in GROUPS.items() if re.search(pattern, key)), OTHER)
        groups[group] = groups.get(group, 0.0) + own[key] / total
    return StageProfile(
        stage=stage,
        steps=tuple(clock.steps),
        phases={phase: clock.seconds[phase] / steps for phase in PHASES},
        groups=dict(sorted(groups.items(), key=lambda item: -item[1])),
        operations=[(key, own[key] / total, events[key].count / TRACED) for key in longest if own[key] > 0],
        peak_flops=peak,
        memory_bytes=hardware.peak_memory_bytes(device),
    )


def _own_time(event: Any, device: str) -> float:
    """Microseconds in the operation itself, on the device that does the work."""
    return float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)


class PhaseClock(L.Callback):
    """Adds up the phases of ``steps`` optimizer steps after ``warm_up``, then profiles ``TRACED`` more. On a GPU every
    boundary waits for it, so that a phase has its own time. ``update``: clipping and the optimizer."""

    def __init__(self, accumulate: int, warm_up: int, steps: int, device: str) -> None:
        self.accumulate, self.warm_up, self.last, self.device = accumulate, warm_up, warm_up + steps, device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps: list[float] = []
        self.profiler: profile | None = None
        self._step, self._since, self._step_began = 0, 0.0, 0.0
        self._open = ExitStack()  # the name of the phase that runs, in the trace

    def on_train_start(self, *_: Any) -> None:
        self._since = self._step_began = self._now()
        self._enter("data")

    def on_train_batch_start(self, *_: Any) -> None:
        self._end("data", then="forward")

    def on_before_backward(self, *_: Any) -> None:
        self._end("forward", then="backward")

    def on_after_backward(self, *_: Any) -> None:
        self._end("backward", then="update")

    def on_train_batch_end(self, trainer: L.Trainer, _: Any, __: Any, ___: Any, batch_idx: int) -> None:
        self._end("update", then="data")
        if (batch_idx + 1) % self.accumulate:
            return
        self._step += 1
        now = self._now()
        if self.warm_up < self._step <= self.last:
            self.steps.append(now - self._step_began)
        if self._step == self.last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
            self.profiler = profile(activities=activities)
            self.profiler.start()
            self._enter("data")
        self._step_began = self._since = self._now()

    def on_train_end(self, *_: Any) -> None:
        self._open.close()
        if self.profiler is not None:
            self.profiler.stop()

    def _end(self, phase: str, *, then: str) -> None:
        now = self._now()
        if self.warm_up <= self._step < self.last:
            self.seconds[phase] += now - self._since
        self._since = now
        self._enter(then)

    def _enter(self, phase: str) -> None:
        """Names what follows in the trace."""
        self._open.close()
        if self.profiler is not None:
            self._open.enter_context(record_function(phase))

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
