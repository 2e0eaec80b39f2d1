"""``growkit plan``: what a recipe costs before it is run. No torch, unless the machine is to be measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.cli.recipes import grows, read
from growkit.config.recipe import Recipe
from growkit.duration import quantity
from growkit.errors import ConfigError
from growkit.planner.hardware import GB, THIS_MACHINE, hardware, keep
from growkit.planner.plan import COMPONENTS, JOULES_PER_KWH, TOKENS_PER_PARAMETER, Cost, Plan, plan, to_json
from growkit.report.schedule_picture import Point, draw_schedule, extent, points, schedule_lines
from growkit.schedule.stage import GrowthSchedule

console = Console(highlight=False)
UNKNOWN = "–"
LEGEND = "trial: a first pass before the stage; growth: while one model becomes the next"


def show_plan(
    name: str,
    overrides: Sequence[str],
    device: str | None,
    *,
    extends: Path | None,
    measure: bool,
    png: Path | None,
    as_json: bool,
) -> None:
    """Prints the plan of the recipe ``name``; ``device`` stands in the place of its hardware.preset."""
    recipe, schedule = read(name, overrides, extends)
    steps = None
    if measure:
        steps = _measure(recipe, schedule, device, quiet=as_json)
        device = THIS_MACHINE
    made = plan(recipe, schedule, hardware(recipe.hardware, device), step_seconds=steps)
    if png is not None:
        draw_schedule(schedule, png)
    if as_json:
        typer.echo(json.dumps(to_json(made) | {"schedule": [asdict(point) for point in points(schedule)]}))
        return
    _show(made, schedule)
    if png is not None:
        console.print(f"wrote {png}", soft_wrap=True, markup=False)


def _measure(recipe: Recipe, schedule: GrowthSchedule, device: str | None, *, quiet: bool) -> tuple[float, ...]:
    """Measures this machine for later plans; returns the seconds of a step in each stage of this one."""
    if device not in (None, THIS_MACHINE):
        mend = f"drop --measure, or use --hardware {THIS_MACHINE}"
        raise ConfigError("not-this-machine", "cannot be measured here", key="--hardware", value=device, mend=mend)
    from growkit.train.measure import measure

    def listener(line: str) -> None:
        if not quiet:
            console.print(f"measured {line}", soft_wrap=True, markup=False)

    machine, steps = measure(recipe, schedule, listener)
    listener(f"and kept in {keep(machine)}")
    return steps


def _show(made: Plan, schedule: GrowthSchedule) -> None:
    console.print(_hardware_line(made), soft_wrap=True)
    tables = [_stages(made), _parameters(made), *_streams(made), _memory(made)]
    for table in [*tables, _costs(made)] if made.hardware is not None else tables:
        console.print(table)
        if table is tables[-1]:
            console.print(LEGEND, style="dim", soft_wrap=True)
    console.print(_points(points(schedule)))
    for line in schedule_lines(schedule, min(console.width, 100)):
        console.print(line, markup=False, no_wrap=True)
    console.print()
    for line in (*_totals(made), *_misfits(made), *map(escape, made.notes)):
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
    table.add_column("stage", overflow="ellipsis", min_width=5)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _stages(made: Plan) -> Table:
    table = _table("stages", "grows", "params", "context", "batch", "steps", "tokens", "FLOPs")
    for stage in made.stages:
        of = stage.stage
        most = "≤" if of.until is not None else ""
        table.add_row(
            escape(of.name),
            grows(of, lambda link: link.operator),
            quantity(stage.num_params),
            _extent(extent(of, "context_length")),
            f"{'' if len(of.lengths.values) == 1 else '≤'}{_count(of.global_batch_tokens)}",
            *(f"{most}{amount}" for amount in (_count(of.steps), *map(quantity, (of.tokens, stage.flops)))),
        )
    steps = sum(stage.stage.steps for stage in made.stages)
    table.add_row("all", "", "", "", "", _count(steps), quantity(made.tokens), quantity(made.flops))
    return table


def _points(rows: Sequence[Point]) -> Table:
    """Where something begins to change; a window only where there is one."""
    windows = any(row.window is not None for row in rows)
    headers = ("step", "tokens", "params", "context", "batch", *(("window",) if windows else ()), "lr")
    table = _table("schedule", *headers)
    names = [row.stage for row in rows]
    for place, row in enumerate(rows):
        window = (UNKNOWN if row.window is None else str(row.window),) if windows else ()
        table.add_row(
            "" if place and names[place - 1] == row.stage else escape(row.stage),
            _count(row.stage_step),
            quantity(row.tokens),
            quantity(row.parameters),
            _extent(row.context),
            _extent(row.batch),
            *window,
            f"{row.lr:.3g}",
        )
    return table


def _parameters(made: Plan) -> Table:
    table = _table("parameters", *COMPONENTS)
    for stage in made.stages:
        table.add_row(escape(stage.stage.name), *(quantity(stage.parameters[part]) for part in COMPONENTS))
    return table


def _streams(made: Plan) -> list[Table]:
    """Only where there is a stream other than the residual one."""
    models = [stage.stage.model for stage in made.stages]
    if all(model.stream is None and all(layer.stride == 1 for layer in model.layers) for model in models):
        return []
    table = _table("streams", "blocks", "variant", "order", "stride", "moved per token")
    for stage in made.stages:
        model = stage.stage.model
        of = ("1", UNKNOWN, UNKNOWN)
        if (stream := model.stream) is not None:
            order = f"{stream.order}, routed" if stream.routed else stream.order
            of = (str(stream.blocks), "full" if stream.full else "recycled", order)
        stride = max(layer.stride for layer in model.layers)
        table.add_row(escape(stage.stage.name), *of, str(stride), _size(stage.stream_bytes_per_token))
    return [table]


def _memory(made: Plan) -> Table:
    """A GPU's memory and the process's are two; where the CPU trains they are one."""
    on_cpu = made.stages[0].memory.on_cpu
    title = "memory of the process" if on_cpu else "memory of one device, and of the process on the CPU"
    apart = () if on_cpu else ("CPU",)
    headers = ("weights", "grads", "moments", "activ.", "trial", "growth", "most", *apart, "fits")
    table = _table(title, *headers)
    for stage in made.stages:
        of = stage.memory
        sizes = (of.weights, of.gradients, of.moments, of.activations, of.trial, of.growth, of.device)
        beside = () if on_cpu else (of.host,)
        table.add_row(escape(stage.stage.name), *map(_size, (*sizes, *beside)), _fits(stage.fits))
    return table


def _costs(made: Plan) -> Table:
    table = _table("cost", "FLOPs", "time", "US dollars", "kWh")
    for stage in made.stages:
        table.add_row(escape(stage.stage.name), quantity(stage.flops), *_cost(stage.cost))
    table.add_row("all", quantity(made.flops), *_cost(made.total))
    return table


def _extent(values: tuple[int, int]) -> str:
    return "–".join(dict.fromkeys(map(_count, values)))


def _count(number: int) -> str:
    return str(number) if number < 100_000 else quantity(number)


def _cost(cost: Cost) -> tuple[str, str, str]:
    dollars = UNKNOWN if cost.dollars is None else _money(cost.dollars)
    energy = UNKNOWN if cost.joules is None else _energy(cost.joules / JOULES_PER_KWH)
    return _time(cost.seconds), dollars, energy


def _money(dollars: float) -> str:
    return f"{dollars:,.0f}" if dollars >= 100 else f"{dollars:.2f}" if dollars >= 0.01 else "<0.01"


def _energy(kwh: float) -> str:
    return quantity(kwh) if kwh >= 0.001 else "<0.001"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    for limit, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:,.3g} {unit}" if seconds / limit < 1000 else f"{seconds / limit:,.0f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else "<0.1 s"


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
    if not wrong or made.hardware is None or made.hardware.memory_bytes is None:
        return []
    needs = ", ".join(f"{escape(stage.stage.name)} {_size(stage.memory.device)}" for stage in wrong)
    where = "the machine" if wrong[0].memory.on_cpu else "a device"
    return [
        f"[bold red]does not fit[/bold red]: {where} has {made.hardware.memory_bytes / GB:,.0f}GB, and needed are: "
        f"{needs}; try a smaller micro_batch_size, trainer.checkpoint_layers=true, trainer.loss_chunk_tokens, or "
        "trainer.strategy=fsdp with more devices"
    ]
