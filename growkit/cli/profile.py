"""``growkit profile``: where a step's time goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.cli import recipes
from growkit.duration import quantity
from growkit.errors import ConfigError
from growkit.train.data import prepare_data
from growkit.train.profile import StageProfile, profile_stage

LISTED = 12  # operations


def profile_recipe(name: str, overrides: Sequence[str], number: int | None, steps: int, trace: Path) -> None:
    """Profiles stage ``number`` (from 1; None: the last) and prints what it found; the trace goes to ``trace``."""
    recipe, schedule = recipes.read(name, overrides)
    if number is None:
        number = len(schedule.stages)
    if not 1 <= number <= len(schedule.stages):
        mend = f"the recipe has {len(schedule.stages)} stages"
        raise ConfigError("out-of-range", "is not a stage", key="--stage", value=number, mend=mend)
    if recipe.trainer.devices != 1:
        mend = "add trainer.devices=1 trainer.strategy=single"
        key, value = "trainer.devices", recipe.trainer.devices
        raise ConfigError("out-of-range", "must be 1: one process is profiled", key=key, value=value, mend=mend)
    recipes.write_new(trace, "", key="--output")  # whether it can be written is known before anything is run
    beside = trace.with_name(f".writing-{trace.name}")
    try:
        if recipe.run.threads is not None:
            torch.set_num_threads(recipe.run.threads)
        stage = schedule.stages[number - 1]
        result = profile_stage(recipe, schedule, prepare_data(recipe, schedule), stage, steps, beside)
        os.replace(beside, trace)
    finally:
        beside.unlink(missing_ok=True)
        if not trace.stat().st_size:  # it did not come to the end
            trace.unlink()
    _show(result, steps, trace)


def _show(result: StageProfile, steps: int, trace: Path) -> None:
    console, stage = Console(highlight=False), result.stage
    console.print(
        f"stage {stage.index + 1} {escape(stage.name)}: {quantity(stage.model.num_params())} parameters, context "
        f"{stage.context_length}, {quantity(stage.global_batch_tokens)} tokens a step, {steps} steps timed",
        soft_wrap=True,
    )
    console.print(
        f"[bold]{1e3 * result.step_seconds:.1f} ms a step[/bold] (median), "
        f"{quantity(result.tokens_per_second)} tokens/s, {quantity(result.flops_per_second)} FLOP/s: "
        f"{result.utilisation:.0%} of what a matrix product reaches here; peak memory {quantity(result.memory_bytes)}B",
        soft_wrap=True,
    )
    total = sum(result.phases.values())
    phases = Table("phase", "ms a step", "share")
    for phase, seconds in result.phases.items():
        phases.add_row(phase, f"{1e3 * seconds:.2f}", f"{seconds / total:.0%}")
    console.print(phases)
    groups = Table("kind of operation", "share of their own time")
    for group, share in result.groups.items():
        groups.add_row(group, f"{share:.0%}")
    console.print(groups)
    operations = Table("operation", "share", "calls a step")
    for name, share, calls in result.operations[:LISTED]:
        operations.add_row(escape(name), f"{share:.1%}", f"{calls:.0f}")
    console.print(operations)
    console.print(f"trace: {trace} (open it at ui.perfetto.dev or chrome://tracing)", soft_wrap=True, markup=False)
