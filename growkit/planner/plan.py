"""What a schedule costs before it is run: parameters, tokens, FLOPs, memory, time, money, energy. No torch here.

Every figure is arithmetic on the recipe; docs/plan.md has the formulas and what they leave out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from growkit.config.recipe import Recipe
from growkit.duration import quantity
from growkit.models.config import ModelConfig
from growkit.models.spec import Component, param_specs
from growkit.planner.hardware import THIS_MACHINE, Hardware
from growkit.planner.memory import StageMemory, stage_memories
from growkit.planner.streams import traffic_per_token
from growkit.schedule.arms import Arms
from growkit.schedule.stage import GrowthSchedule, Stage

COMPONENTS: tuple[str, ...] = get_args(Component)
# Hoffmann et al. (arXiv 2203.15556): about 20 tokens a parameter spend a budget of C = 6 · parameters · tokens best.
TOKENS_PER_PARAMETER = 20
FLOPS_PER_PARAMETER = 6
JOULES_PER_KWH = 3.6e6
SMALL = 1e8  # parameters below which nobody should expect the usual share of a GPU's peak


@dataclass(frozen=True)
class Cost:
    """Of some training: ``seconds`` of wall clock, ``dollars``, ``joules``, over all devices; None where unknown."""

    seconds: float | None = None
    dollars: float | None = None
    joules: float | None = None


@dataclass(frozen=True)
class StagePlan:
    """One stage. ``parameters``: component → entries. ``fits``: None where the device's memory is unknown."""

    stage: Stage
    parameters: dict[str, int]
    memory: StageMemory
    cost: Cost
    fits: bool | None

    @property
    def flops(self) -> float:
        return self.stage.total_flops + self.stage.probe_flops

    @property
    def num_params(self) -> int:
        return sum(self.parameters.values())

    @property
    def stream_bytes_per_token(self) -> float:
        """What a step moves through memory for AltUp's blocks: planner/streams.py."""
        return traffic_per_token(self.stage.model)


@dataclass(frozen=True)
class FromScratch:
    """What the schedule's FLOPs buy at once: ``tokens`` and ``steps`` of a model of ``parameters``."""

    parameters: float
    tokens: float
    steps: int | None


@dataclass(frozen=True)
class Plan:
    """All stages and what they come to. ``hardware``: None if none was said. ``final_model``: the last stage's, trained
    from scratch at its context and batch; ``compute_optimal``: by the 20-tokens-a-parameter rule of thumb."""

    stages: tuple[StagePlan, ...]
    hardware: Hardware | None
    devices: int
    precision: str
    total: Cost
    tokens: int
    flops: float
    final_model: FromScratch
    compute_optimal: FromScratch
    notes: tuple[str, ...]

    @property
    def tokens_per_joule(self) -> float | None:
        return _ratio(self.tokens, self.total.joules)

    @property
    def tokens_per_dollar(self) -> float | None:
        return _ratio(self.tokens, self.total.dollars)

    @property
    def fits(self) -> bool | None:
        known = [stage.fits for stage in self.stages if stage.fits is not None]
        return all(known) if known else None


def plan(
    recipe: Recipe,
    schedule: GrowthSchedule,
    hardware: Hardware | None,
    *,
    step_seconds: Sequence[float] | None = None,
) -> Plan:
    """The plan of a recipe whose ``schedule`` is given, on ``trainer.devices`` of ``hardware``. Without one, memory is
    that of a CPU in float32 (unless trainer.precision says bf16), and cost is unknown. ``step_seconds``: of each stage,
    by one process, where they were measured. Raises ConfigError."""
    trainer = recipe.trainer
    fallback = "fp32" if trainer.precision == "auto" else trainer.precision
    precision = hardware.precision(trainer) if hardware is not None else fallback
    # Processes on one CPU share its cores, its price and its power, and each needs its memory.
    devices = trainer.devices if hardware is not None and hardware.cuda else 1
    rates: list[float | None] = [None] * len(schedule.stages)
    if step_seconds is not None:
        measured = zip(schedule.stages, step_seconds, strict=True)
        rates = [stage.total_flops / stage.steps / seconds * devices for stage, seconds in measured]
    elif hardware is not None:
        rates = [hardware.flops_per_second(precision) * devices] * len(schedule.stages)
    room = hardware.memory_bytes if hardware is not None else None
    memories = stage_memories(recipe, schedule, bf16=precision == "bf16", cuda=hardware is not None and hardware.cuda)
    stages = tuple(
        StagePlan(
            stage=stage,
            parameters=parameters(stage.model),
            memory=memory,
            cost=_cost(_seconds(stage, rate), hardware, devices),
            fits=None if room is None else memory.device * (trainer.devices if memory.on_cpu else 1) <= room,
        )
        for stage, memory, rate in zip(schedule.stages, memories, rates, strict=True)
    )
    flops, last = schedule.flops, schedule.last
    steps = math.floor(flops / last.flops_per_step)
    best = math.sqrt(flops / (FLOPS_PER_PARAMETER * TOKENS_PER_PARAMETER))
    return Plan(
        stages=stages,
        hardware=hardware,
        devices=trainer.devices,
        precision=precision,
        total=_cost(_sum([stage.cost.seconds for stage in stages]), hardware, devices),
        tokens=schedule.tokens,
        flops=flops,
        final_model=FromScratch(stages[-1].num_params, steps * last.global_batch_tokens, steps),
        compute_optimal=FromScratch(best, TOKENS_PER_PARAMETER * best, None),
        notes=_notes(recipe, schedule, hardware),
    )


def parameters(model: ModelConfig) -> dict[str, int]:
    """Component → parameters; a tied head has none of its own."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for spec in param_specs(model).values():
        counts[spec.component] += spec.numel
    return counts


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values; bytes, seconds, US dollars and joules."""
    stages = [
        {
            "name": stage.stage.name,
            "grows": [f"{link.operator} {link.method}" for link in stage.stage.links],
            "parameters": stage.num_params,
            "parameters_by_component": stage.parameters,
            "context_length": stage.stage.context_length,
            "global_batch_tokens": stage.stage.global_batch_tokens,
            "micro_batch_size": stage.stage.micro_batch_size,
            "steps": stage.stage.steps,
            "at_most": stage.stage.until is not None,
            "tokens": stage.stage.tokens,
            "flops": stage.flops,
            "arms": None if stage.stage.arms is None else dataclasses.asdict(stage.stage.arms),
            "candidates": [
                {
                    "name": trial.name,
                    "parameters": trial.stage.model.num_params(),
                    "steps": trial.steps,
                    "flops": trial.flops,
                }
                for trial in stage.stage.trials
            ],
            "stream": None if (of := stage.stage.model.stream) is None else dataclasses.asdict(of),
            "stream_bytes_per_token": stage.stream_bytes_per_token,
            "strides": sorted({layer.stride for layer in stage.stage.model.layers}),
            "probe_flops": stage.stage.probe_flops,
            "probe_tokens": stage.stage.probe_tokens,
            "memory": dataclasses.asdict(stage.memory) | {"step": stage.memory.step, "device": stage.memory.device},
            "fits": stage.fits,
            **dataclasses.asdict(stage.cost),
        }
        for stage in plan.stages
    ]
    return {
        "hardware": dataclasses.asdict(plan.hardware) if plan.hardware is not None else None,
        "devices": plan.devices,
        "precision": plan.precision,
        "stages": stages,
        "total": {
            "tokens": plan.tokens,
            "flops": plan.flops,
            **dataclasses.asdict(plan.total),
            "tokens_per_joule": plan.tokens_per_joule,
            "tokens_per_dollar": plan.tokens_per_dollar,
            "fits": plan.fits,
        },
        "from_scratch": {
            "final_model": dataclasses.asdict(plan.final_model),
            "compute_optimal": dataclasses.asdict(plan.compute_optimal),
        },
        "notes": list(plan.notes),
    }


def _seconds(stage: Stage, rate: float | None) -> float | None:
    return None if rate is None else (stage.total_flops + stage.probe_flops) / rate


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [part for part in seconds if part is not None]
    return sum(known) if len(known) == len(seconds) else None


def _cost(seconds: float | None, hardware: Hardware | None, devices: int) -> Cost:
    if seconds is None or hardware is None:
        return Cost()
    dollars = None if hardware.price_per_hour is None else seconds / 3600 * hardware.price_per_hour * devices
    joules = None if hardware.watts is None else seconds * hardware.watts * devices
    return Cost(seconds, dollars, joules)


def _ratio(count: float, of: float | None) -> float | None:
    return count / of if of else None


def _choosing(stage: Stage) -> float:
    """FLOPs that a stage spends on choosing what to train on by its losses."""
    return sum(count * stage.pace.choosing_flops(length) for length, count in stage.lengths.counts(stage.steps))


def _notes(recipe: Recipe, schedule: GrowthSchedule, hardware: Hardware | None) -> tuple[str, ...]:
    notes = []
    assumed = hardware is not None and hardware.cuda and hardware.name != THIS_MACHINE
    if assumed and recipe.hardware.utilisation is None and schedule.stages[0].model.num_params() < SMALL:
        notes.append("time is too short for small models: they reach far less of a GPU's peak (hardware.utilisation)")
    if recipe.trainer.backend == "reference":
        notes.append("memory is that of the compiled path; trainer.backend=reference needs more")
    if recipe.trainer.compile:
        notes.append("memory is that of eager training; trainer.compile moves it either way")
        graphs = sum(stage.graphs for stage in schedule.stages)
        notes.append(f"torch.compile makes {graphs} graphs over the run, one for each length of each stage")
    if any(stage.windows for stage in schedule.stages):
        notes.append("a window is a mask: it saves no FLOPs and no memory, which are those of attention to everything")
    if ending := [stage.name for stage in schedule.stages if stage.until is not None]:
        notes.append(
            f"all figures are the most there can be: a trigger may end {', '.join(ending)} before its duration"
        )
    for stage in schedule.stages:
        if stage.trials:
            tried = ", ".join(f"{trial.name} ({trial.steps} steps)" for trial in stage.trials)
            spent = f"{quantity(stage.probe_flops)} FLOPs and {quantity(stage.probe_tokens)} tokens"
            notes.append(f"{stage.name} is planned with its largest candidate; trying {tried} takes {spent}")
    if cut := sum(stage.cut_after(stage.steps) for stage in schedule.stages):
        notes.append(f"{quantity(cut)} tokens are read and cut off, besides those that are trained on")
    if passed := sum(stage.passed_over_after(stage.steps) for stage in schedule.stages):
        notes.append(f"{quantity(passed)} tokens are read and passed over, besides those that are trained on")
    if choosing := sum(_choosing(stage) for stage in schedule.stages):
        notes.append(f"{choosing / schedule.flops:.0%} of the FLOPs go into choosing what to train on")
        notes.append("memory leaves out the reference model, which is held whole, in float32, on every device")
    notes.extend(_choices(schedule))
    if recipe.trainer.devices > 1:
        notes.append("memory with several devices is an estimate that no test holds to a measurement")
    return tuple(notes)


def _choices(schedule: GrowthSchedule) -> list[str]:
    """What a bandit chooses among, a line for each choice that stages have in common, and what asking costs."""
    found: dict[Arms, list[Stage]] = {}
    for stage in schedule.stages:
        if stage.arms is not None:
            found.setdefault(stage.arms, []).append(stage)
    lines = []
    for arms, stages in found.items():
        flops = sum(stage.total_flops for stage in stages)
        trained = sum(dataclasses.replace(stage.pace, again=0.0).flops(stage.lengths, stage.steps) for stage in stages)
        line = (
            f"data.bandit chooses the {arms.over[:-1]} of each step among {' | '.join(arms.names)}; the forward passes "
            f"that tell what a step taught are {1 - trained / flops:.1%} of the FLOPs of {_named(stages)}"
        )
        if arms.over == "lengths":
            line += ", which are reckoned as if each were chosen as often; its tokens do not depend on that"
        lines.append(line)
    return lines


def _named(stages: Sequence[Stage]) -> str:
    return ", ".join(stage.name for stage in stages)
