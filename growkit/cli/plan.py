"""``growkit plan``: what a recipe costs before it is run. No torch, unless the machine is to be measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.cli.recipes import read
from growkit.config.recipe import Recipe
from growkit.duration import quantity
from growkit.errors import ConfigError
from growkit.planner.hardware import GB, THIS_MACHINE, hardware, keep
from growkit.planner.plan import COMPONENTS, JOULES_PER_KWH, TOKENS_PER_PARAMETER, Cost, Plan, StagePlan, plan, to_json
from growkit.report.schedule_picture import draw_schedule, schedule_lines
from growkit.schedule.plan import GrowthSchedule

console = Console(highlight=False)
UNKNOWN = "–"


def show_plan(
    name: str, overrides: Sequence[str], device: str | None, *, measure: bool, png: Path | None, as_json: bool
) -> None:
    """Prints the plan of the recipe ``name``; ``device`` stands in the place of its hardware.preset."""
    recipe, schedule = read(name, overrides)
    if measure:
        _measure(recipe, schedule, device, quiet=as_json)
        device = THIS_MACHINE
    made = plan(recipe, schedule, hardware(recipe.hardware, device))
    if png is not None:
        draw_schedule(schedule, png)
    if as_json:
        typer.echo(json.dumps(to_json(made)))
        return
    _show(made, schedule)
    if png is not None:
        console.print(f"wrote {png}", soft_wrap=True, markup=False)


def _measure(recipe: Recipe, schedule: GrowthSchedule, device: str | None, *, quiet: bool) -> None:
    if device not in (None, THIS_MACHINE):
        mend = f"drop --measure, or use --hardware {THIS_MACHINE}"
        raise ConfigError("not-this-machine", "cannot be measured here", key="--hardware", value=device, mend=mend)
    from growkit.train.measure import measure

    def listener(line: str) -> None:
        if not quiet:
            console.print(f"measured {line}", soft_wrap=True, markup=False)

    path = keep(measure(recipe, schedule, listener))
    listener(f"and kept in {path}")


def _show(made: Plan, schedule: GrowthSchedule) -> None:
    console.print(_hardware_line(made), soft_wrap=True)
    for table in (_stages(made), _parameters(made), _memory(made), _costs(made)):
        console.print(table)
    for line in schedule_lines(schedule, min(console.width, 100)):
        console.print(line, markup=False, no_wrap=True)
    console.print()
    for line in (*_totals(made), *_misfits(made), *made.notes):
        console.print(line, soft_wrap=True)


def _hardware_line(made: Plan) -> str:
    device = made.hardware
    if device is None:
        return (
            f"no hardware said: memory is that of a CPU in {made.precision}; for time, price and energy say "
            "--hardware NAME, or --measure this machine"
        )
    share = device.utilisations[made.precision]
    memory = f", {quantity(device.memory_bytes)}B" if device.memory_bytes else ""
    count = f"{made.devices} × " if made.devices > 1 else ""
    return (
        f"on {count}[bold]{escape(device.name)}[/bold]: {made.precision} at {quantity(device.peaks[made.precision])} "
        f"FLOP/s, of which {share:.0%} expected{memory} ({escape(device.source)})"
    )


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("stage", overflow="fold", min_width=5)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _stages(made: Plan) -> Table:
    table = _table("stages", "grows", "parameters", "context", "batch", "steps", "tokens", "FLOPs")
    for stage in made.stages:
        of = stage.stage
        grows = "\n".join(link.operator for link in of.links) or UNKNOWN
        sizes = (stage.num_params, of.context_length, of.global_batch_tokens, of.steps, of.tokens, stage.flops)
        table.add_row(escape(of.name), grows, *map(quantity, sizes))
    table.add_row("all", "", "", "", "", *map(quantity, (sum(s.stage.steps for s in made.stages), made.tokens, made.flops)))
    return table


def _parameters(made: Plan) -> Table:
    table = _table("parameters", *COMPONENTS)
    for stage in made.stages:
        table.add_row(escape(stage.stage.name), *(quantity(stage.parameters[part]) for part in COMPONENTS))
    return table


def _memory(made: Plan) -> Table:
    each = "of one device" if made.stages[0].memory.on_cpu is False else "of the process"
    headers = ("weights", "gradients", "moments", "activations", "step", "trial", "growth", "most")
    table = _table(f"memory {each}", *headers)
    for stage in made.stages:
        of = stage.memory
        sizes = (of.weights, of.gradients, of.moments, of.activations, of.step, of.trial, of.growth, of.device)
        table.add_row(escape(stage.stage.name), *map(_size, sizes))
    return table


def _costs(made: Plan) -> Table:
    table = _table("time, price, energy", "time", "US dollars", "kWh", "CPU memory", "fits")
    for stage in made.stages:
        table.add_row(escape(stage.stage.name), *_cost(stage.cost), _size(stage.memory.host), _fits(stage.fits))
    host = max(stage.memory.host for stage in made.stages)
    table.add_row("all", *_cost(made.total), _size(host), _fits(made.fits))
    return table


def _cost(cost: Cost) -> tuple[str, str, str]:
    dollars = UNKNOWN if cost.dollars is None else _money(cost.dollars)
    energy = UNKNOWN if cost.joules is None else quantity(cost.joules / JOULES_PER_KWH)
    return _time(cost.seconds), dollars, energy


def _money(dollars: float) -> str:
    return f"{dollars:,.0f}" if dollars >= 100 else f"{dollars:.2g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    for limit, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:,.3g} {unit}" if seconds / limit < 1000 else f"{seconds / limit:,.0f} {unit}"
    return f"{seconds:.3g} s"


def _size(count: float) -> str:
    return f"{quantity(count)}B" if count else UNKNOWN


def _fits(fits: bool | None) -> str:
    return UNKNOWN if fits is None else "yes" if fits else "[bold red]no[/bold red]"


def _totals(made: Plan) -> list[str]:
    last, final, best = made.stages[-1], made.final_model, made.compute_optimal
    lines = []
    if made.tokens_per_joule is not None:
        lines.append(f"{quantity(made.tokens_per_joule)} tokens per joule")
    if made.tokens_per_dollar is not None:
        lines.append(f"{quantity(made.tokens_per_dollar)} tokens per dollar")
    return [
        *([", ".join(lines)] if lines else []),
        f"the same FLOPs from scratch: {quantity(final.tokens)} tokens ({final.steps:,} steps) for the last stage's "
        f"{quantity(last.num_params)} parameters, which see {quantity(made.tokens)} tokens here while they grow",
        f"rule of thumb ({TOKENS_PER_PARAMETER} tokens a parameter, arXiv 2203.15556): {quantity(best.parameters)} "
        f"parameters on {quantity(best.tokens)} tokens spend them best",
    ]


def _misfits(made: Plan) -> list[str]:
    wrong = [stage for stage in made.stages if stage.fits is False]
    return [_misfit(stage, made) for stage in wrong]


def _misfit(stage: StagePlan, made: Plan) -> str:
    assert made.hardware is not None and made.hardware.memory_bytes is not None
    where = "the machine" if stage.memory.on_cpu else "a device"
    return (
        f"[bold red]does not fit[/bold red]: stage {escape(stage.stage.name)} needs {_size(stage.memory.device)} of "
        f"{where}, which has {made.hardware.memory_bytes / GB:,.0f}GB; try a smaller micro_batch_size, "
        "trainer.checkpoint_layers=true, trainer.loss_chunk_tokens, or trainer.strategy=fsdp with more devices"
    )
