"""``growkit report``, ``compare`` and ``lineage``: what can be told from run folders alone. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.run_folder import MARK, RunFolder
from growkit.duration import quantity
from growkit.errors import ConfigError, cannot_write
from growkit.report.comparison import MOST_DIFFERENCES, Comparison, compare, shown
from growkit.report.curve import draw_curves
from growkit.report.history import AXES
from growkit.report.lineage import Growth, Node, Stage, forest, stages_of_manifest, tree
from growkit.report.page import write_report
from growkit.report.run_summary import RunSummary, read_runs

PNG = b"\x89PNG"


def show_report(paths: Sequence[Path], output: Path | None) -> None:
    """Writes the page of one run into its folder, of several into the current one, unless ``output`` says where."""
    runs = read_runs(paths)
    target = output or (runs[0].folder.report if len(runs) == 1 else Path("report.html"))
    write_report(runs, target)
    typer.echo(f"wrote {target} ({quantity(target.stat().st_size)}B); open it in a browser")
    for run in runs:
        if run.state != "complete":
            nothing = "" if len(run.history.steps["step"]) else ": no step has been logged"
            typer.echo(f"{run.name} is {run.state}{nothing}")


def show_comparison(paths: Sequence[Path], axis: str, png: Path | None, as_json: bool) -> None:
    """Raises ConfigError for fewer than two runs, or a file at ``png`` that is no picture."""
    if len(paths) < 2:
        mend = "name the reference first, then at least one other run"
        raise ConfigError("too-few-runs", "is the only run", key="runs", value=str(paths[0]), mend=mend)
    found = compare(read_runs(paths), axis)
    if png is not None:
        _draw(found, png)
    if as_json:
        typer.echo(json.dumps(plain(found), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    console.print(_figures(found.runs))
    console.print(_alignment(found))
    for line in _remarks(found):
        console.print(line, soft_wrap=True, markup=False)
    if png is not None:
        console.print(f"picture: {png}", soft_wrap=True, markup=False)


def show_lineage(path: Path, as_json: bool) -> None:
    """The tree of a run folder and its family, of one checkpoint, or of all runs in a folder. Files of tensors are not
    read: `growkit inspect` verifies them."""
    if (path / MARK).is_file():
        nodes: tuple[Node, ...] = (tree(RunFolder.open(path)),)
    elif (path / manifests.NAME).is_file() or not (nodes := forest(path)):
        found = manifests.read(path, verify=False)
        nodes = (Node(path.resolve().name, stages_of_manifest(found), here=True),)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(node) for node in nodes], indent=1, allow_nan=False))
        return
    for node in nodes:
        Console(highlight=False).print(_branch(node))


def plain(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON says it."""
    figures = ("name", "state", "parameters", "tokens", "flops", "seconds", "last", "best", "ngram", "growths")
    return {
        "axis": found.axis,
        "runs": [{key: getattr(run, key) for key in figures} for run in found.runs],
        "places": found.places,
        "target_bits_per_byte": found.target,
        "aligned": [dataclasses.asdict(row) for row in found.aligned],
        "differences": found.differences,
        "notes": found.notes,
    }


def refuse_other_file(png: Path) -> None:
    """Raises ConfigError when something that is no picture is at ``png``."""
    try:
        if png.exists():
            with open(png, "rb") as file:
                if file.read(len(PNG)) != PNG:
                    mend = "name another file; only a picture is replaced"
                    raise ConfigError("file-exists", "is already there", key="--png", value=str(png), mend=mend)
    except OSError as error:
        raise cannot_write(png, error) from error


def _draw(found: Comparison, png: Path) -> None:
    refuse_other_file(png)
    try:
        draw_curves([run.history for run in found.runs], png, x=found.axis)
    except OSError as error:
        raise cannot_write(png, error) from error


def _figures(runs: Sequence[RunSummary]) -> Table:
    table = _table("run", "parameters", "tokens", "FLOPs", "seconds", "last", "best", title="bits per byte: last, best")
    for run in runs:
        sizes = "–"
        if run.parameters:
            sizes = " → ".join(dict.fromkeys(quantity(size) for size in run.parameters))
        table.add_row(
            Text(run.name), sizes, *(_quantity(value) for value in (run.tokens, run.flops, run.seconds)),
            _score(run.last), _score(run.best),
        )  # fmt: skip
    return table


def _alignment(found: Comparison) -> Table:
    unit = AXES[found.axis]
    places = [f"at {quantity(place)}" for place in found.places]
    table = _table("run", *places, f"{unit} to {_score(found.target)}", "saving", title=f"validation over {unit}")
    for row in found.aligned:
        needed = "–" if found.target is None else "never reached"
        if row.needed is not None:
            needed = f"{'≤ ' if row.before_first else ''}{quantity(row.needed)}"
        saving = "–" if row.saving is None else f"{'≥ ' if row.before_first else ''}×{row.saving:.2f}"
        scores = row.at if row.at else ()
        table.add_row(Text(row.name), *(_score(score) for score in scores), needed, saving)
    return table


def _remarks(found: Comparison) -> list[str]:
    unit, first = AXES[found.axis], found.runs[0].name
    said = []
    if found.target is not None:
        said.append(
            f"saving: {unit} that {first} took to its last score ({found.target:.3f}), over what the run took to it"
        )
    if found.places:
        said.append("between two validations a score is read off the straight line, only where all runs overlap")
    else:
        said.append(f"the runs share no stretch of {unit} in which all were validated")
    said += [f"note: {note}" for note in found.notes]
    if found.differences:
        said.append("recipes differ in:")
        listed = list(found.differences.items())
        said += [f"  {key}: {' | '.join(map(shown, row))}" for key, row in listed[:MOST_DIFFERENCES]]
        if len(listed) > MOST_DIFFERENCES:
            said.append(f"  and {len(listed) - MOST_DIFFERENCES} more keys")
    return said


def _table(*headers: str, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column(headers[0], overflow="fold")
    for header in headers[1:]:
        table.add_column(header, justify="right")
    return table


def _branch(node: Node) -> Tree:
    label = Text(node.name, style="bold" if node.here else "")
    if node.from_step is not None:
        label.append(f" branched at step {node.from_step:.0f}", style="not bold")
    if node.missing:
        label.append(f" ({node.missing})", style="not bold dim")
    if node.here:
        label.append("  ← this one", style="not bold dim")
    branch = Tree(label, guide_style="dim")
    for stage in node.stages:
        line = branch.add(_stage(stage))
        if stage.growth is not None:
            line.add(_growth(stage.growth))
        for sentence in stage.decided:
            line.add(Text(sentence, style="dim"))
    branch.children += [_branch(child) for child in node.branches]
    return branch


def _stage(stage: Stage) -> Text:
    what = Text(stage.name)
    if stage.parameters is not None:
        what.append(f", {quantity(stage.parameters)} parameters")
    if stage.context_length is not None:
        what.append(f", context {stage.context_length:.0f}")
    where = "no steps yet"
    if stage.step is not None:
        at = f"{_quantity(stage.tokens)} tokens, {_quantity(stage.flops)} FLOPs"
        where = f"{'to' if stage.ended else 'now at'} step {stage.step:.0f}, {at}"
    if stage.bits_per_byte is not None:
        where += f", {stage.bits_per_byte:.3f} bits per byte"
    return what.append(f"\n{where}", style="dim")


def _growth(growth: Growth) -> Text:
    claim = "not measured" if growth.exact is None else "exact" if growth.exact else "not exact"
    delta = "" if growth.delta_logits is None else f": largest |Δlogit| {growth.delta_logits:.1e} in float64"
    sizes = f"{_quantity(growth.parameters_before)} → {_quantity(growth.parameters_after)}"
    return Text(f"grew by {' + '.join(growth.links)}, {sizes}").append(f"\n{claim}{delta}", style="dim")


def _quantity(value: float | None) -> str:
    return "–" if value is None else quantity(value)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
