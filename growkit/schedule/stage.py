"""What a stage of a run is, and a whole growth schedule, in numbers: pure functions of the step. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from growkit.config.recipe import StartConfig
from growkit.data.shape import StepShape
from growkit.growth.path import Link
from growkit.models.config import ModelConfig
from growkit.models.spec import param_specs
from growkit.optim.groups import OLD_ENTRIES, frozen_names
from growkit.schedule.arms import Arms
from growkit.schedule.curriculum import Lengths, Pace
from growkit.schedule.lr import LRSchedule
from growkit.schedule.progress import Progress

if TYPE_CHECKING:
    from growkit.schedule.candidates import Trial
    from growkit.schedule.triggers import Trigger


@dataclass(frozen=True)
class Stage:
    """One stage, every value settled. ``accumulate``: micro-batches per optimizer step and process. ``grown_by_hand``:
    parameters that are new here though no link of its own made them. ``model``: as it begins; ``ramp_steps``: until
    what is under a mask is whole, 0 where nothing is. ``context_length``, ``global_batch_tokens``, ``flops_per_step``:
    of a step at full length, which ``lengths`` may grow to; ``windows``: of attention, None where it sees all.
    ``arms``: what a bandit chooses among; where they are lengths, ``lengths`` has each as often as the others, and what
    is reckoned with them is what to expect. ``until``: what may end it before ``steps``. Where that has, ``steps`` are
    those that were done, and everything else is as it was planned. ``trials``: the ways into it, while none is chosen
    yet, and ``probe_least``, as of StageConfig; ``probe_flops``, ``probe_tokens``: of trying them, which no other
    figure of the stage has."""

    index: int
    name: str
    model: ModelConfig
    links: tuple[Link, ...]
    methods: dict[str, str]
    context_length: int
    global_batch_tokens: int
    micro_batch_size: int
    accumulate: int
    steps: int
    lr: LRSchedule
    new_warmup_steps: int
    ramp_steps: int
    freeze: tuple[str, ...]
    lr_scale: dict[str, float]
    validate_every: int | None
    flops_per_step: float
    pace: Pace
    lengths: Lengths
    windows: Lengths | None
    lr_by: str
    grown_by_hand: frozenset[str] = frozenset()
    arms: Arms | None = None
    until: Trigger | None = None
    trials: tuple[Trial, ...] = ()
    probe_least: float = 0.0
    probe_flops: float = 0.0
    probe_tokens: int = 0

    @cached_property
    def tokens(self) -> int:
        return self.tokens_after(self.steps)

    @cached_property
    def total_flops(self) -> float:
        return self.pace.flops(self.lengths, self.steps)

    def tokens_after(self, stage_steps: int) -> int:
        """That the first ``stage_steps`` steps train on."""
        return self.pace.tokens(self.lengths, stage_steps)

    @property
    def candidates(self) -> int:
        """Rows that are read for each that is trained on."""
        return 1 if self.pace.selection is None else self.pace.selection.candidates

    def cut_after(self, stage_steps: int) -> int:
        """Tokens of rows that the first ``stage_steps`` steps read and cut off."""
        cut = self.pace.drawn_tokens(self.lengths, stage_steps) - self.tokens_after(stage_steps)
        return self.candidates * cut

    def passed_over_after(self, stage_steps: int) -> int:
        """Tokens of candidates that the first ``stage_steps`` steps read and do not train on."""
        return (self.candidates - 1) * self.tokens_after(stage_steps)

    def rate(self, stage_step: int) -> float:
        """The learning rate of the optimizer step number ``stage_step``, from 0."""
        if self.lr_by == "steps":
            return self.lr.lr(stage_step)
        planned = self.lr.steps  # a trigger that ends the stage must not change the rates before
        mean = self.tokens_after(planned) / planned
        return self.lr.lr(stage_step, lambda steps: self.tokens_after(steps) / mean)

    @cached_property
    def born(self) -> dict[str, int]:
        """The parameters that are new in this stage, with its number."""
        before = [param_specs(link.source) for link in self.links]
        names = param_specs(self.model)
        made = [name for name in names if not all(name in specs for specs in before)]
        return dict.fromkeys([*made, *sorted(self.grown_by_hand & names.keys())], self.index)

    @cached_property
    def enlarged(self) -> frozenset[str]:
        """The parameters that were there before this stage, and have another shape since."""
        if not self.links:
            return frozenset()
        before, after = param_specs(self.links[0].source), param_specs(self.model)
        return frozenset(n for n in after if n not in self.born and after[n].shape != before[n].shape)

    @cached_property
    def frozen(self) -> frozenset[str]:
        """The parameters that stand still, all of each."""
        if not self.freeze:
            return frozenset()
        return frozen_names(param_specs(self.model), self.born, self.index, self.freeze, self.enlarged)

    @cached_property
    def held(self) -> frozenset[str]:
        """The parameters of which the old entries stand still, and new ones move."""
        return self.enlarged - self.frozen if OLD_ENTRIES in self.freeze else frozenset()

    @property
    def graphs(self) -> int:
        """That torch.compile makes of it: one for each length, two where rows are also scored without gradients; and
        those of its trials, each of which is a model of its own."""
        twice = 2 if self.candidates > 1 else 1
        tried = (len({trial.stage.lengths.at(step) for step in range(trial.steps)}) for trial in self.trials)
        return twice * len(self.lengths.values) + sum(tried)

    def shape(self, stage_step: int) -> StepShape:
        """Of the optimizer step number ``stage_step``, from 0."""
        window = None if self.windows is None else self.windows.at(stage_step)
        return self.pace.shape(self.lengths.at(stage_step), window)

    def flops(self, stage_step: int) -> float:
        """Of the optimizer step number ``stage_step``, from 0."""
        return self.pace.step_flops(self.lengths.at(stage_step))

    def moving(self, stage_step: int, length: int) -> dict[str, float]:
        """What changes from step to step, for a log: the ramp, the context, the window, the tokens cut off and passed
        over so far. ``length``: of the step's context, which a bandit may have chosen."""
        shape, found = self.pace.shape(length, self.shape(stage_step).window), dict[str, float]()
        if self.ramp_steps:
            found["ramp"] = self.ramp_at(stage_step)
        if len(self.lengths.values) > 1:
            found |= {"context_length": shape.context_length, "step_tokens": shape.tokens}
        if shape.window is not None:
            found["window"] = shape.window
        if cut := self.cut_after(stage_step + 1):
            found["cut_tokens"] = cut
        if passed := self.passed_over_after(stage_step + 1):
            found["passed_over_tokens"] = passed
        return found

    def ramp_at(self, stage_step: int) -> float:
        """The ramp, 0..1, of the optimizer step number ``stage_step``, from 0, and of what is saved before it."""
        return min(1.0, stage_step / self.ramp_steps) if self.ramp_steps else self.model.ramp

    def model_at(self, stage_step: int) -> ModelConfig:
        """``model`` with the ramp of ``stage_step``."""
        return dataclasses.replace(self.model, ramp=self.ramp_at(stage_step))


@dataclass(frozen=True)
class GrowthSchedule:
    """All stages, and what they need of the data. ``start``: what lies behind the first one, in an extended run;
    ``start_model``: the model before the first stage grows it."""

    stages: tuple[Stage, ...]
    block_tokens: int
    save_every: int
    start: StartConfig
    start_model: ModelConfig

    def stage(self, index: int) -> Stage:
        """The stage of that number; numbers go on from the checkpoint an extended run was made from."""
        return self.stages[index - self.start.stage]

    def model_at(self, at: Progress) -> ModelConfig | None:
        """The model that is trained at ``at``; None if the schedule has no such stage or step."""
        position = at.stage - self.start.stage
        if not 0 <= position < len(self.stages) or at.stage_step > self.stages[position].steps:
            return None
        if at.stage_step == 0:  # an extended run before its first step: not grown yet
            return self.start_model
        return self.stages[position].model_at(at.stage_step)

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def tokens(self) -> int:
        """Of these stages; what lies behind ``start`` is not in it."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Of these stages, with what trying candidates takes; what lies behind ``start`` is not in it."""
        return sum(stage.total_flops + stage.probe_flops for stage in self.stages)

    @property
    def max_context_length(self) -> int:
        return max(stage.context_length for stage in self.stages)

    @property
    def lengths(self) -> tuple[int, ...]:
        return lengths_of(self.stages)


def lengths_of(stages: Iterable[Stage]) -> tuple[int, ...]:
    """Of the rows that any step has, rising."""
    return tuple(sorted({length for stage in stages for length in stage.lengths.values}))
