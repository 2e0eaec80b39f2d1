"""Finding, copying and checking recipes. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.checkpoint.extension import extended_recipe
from growkit.checkpoint.reference import described
from growkit.checkpoint.run_folder import manifest_of
from growkit.config.load import load_recipe, read_text
from growkit.config.mixture import sources_of
from growkit.config.recipe import SYNTHETIC, Recipe
from growkit.data.screen import ScreenReport, screen
from growkit.duration import quantity
from growkit.errors import ConfigError, DataError
from growkit.growth.path import Link
from growkit.models.presets import PRESETS
from growkit.registry import closest
from growkit.report.schedule_picture import extent
from growkit.schedule.decisions import NONE
from growkit.schedule.plan import growth_schedule, settled
from growkit.schedule.stage import GrowthSchedule, Stage

_INEXACT = ("", " (not exact)")


def recipes_folder() -> Path:
    """Where the built-in recipes are: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def built_in() -> dict[str, Path]:
    """Name → file of every built-in recipe, folders included in the name."""
    root = recipes_folder()
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file ``name``, or the built-in recipe of that name. Raises ConfigError."""
    path = Path(name)
    if os.path.isfile(path):
        return path
    known = built_in()
    if name in known:
        return known[name]
    mend = f"name a YAML file or a built-in recipe; {closest(name, known)}"
    problem = "is not a file" if os.path.exists(path) else "does not exist"
    raise ConfigError("no-such-recipe", problem, key="recipe", value=name, mend=mend)


def read(name: str, overrides: Sequence[str], extends: Path | None = None) -> tuple[Recipe, GrowthSchedule]:
    """The recipe with everything settled, and its schedule; ``extends``: the run or checkpoint its stages go on from.
    Raises ConfigError and CheckpointError."""
    path = find_recipe(name)
    if extends is None:
        recipe = load_recipe(path, overrides, PRESETS)
    else:
        recipe = extended_recipe(manifest_of(extends), str(extends), read_text(path), overrides, name=str(path))
    recipe = described(recipe)
    schedule = growth_schedule(recipe)
    return settled(recipe, schedule), schedule


def grows(stage: Stage, said: Callable[[Link], str]) -> str:
    """What a stage grows by, a line each, every link as ``said``; of candidates, their names."""
    if stage.trials:
        return "\n".join(f"{trial.name}?" for trial in stage.trials if trial.name != NONE)
    return "\n".join(map(said, stage.links)) or "–"


def list_recipes() -> None:
    table = Table("recipe", "what it does")
    for name, path in built_in().items():
        first = path.read_text().partition("\n")[0]
        table.add_row(name, first.removeprefix("#").strip())
    Console().print(table)


def show_recipe(name: str) -> None:
    typer.echo(read_text(find_recipe(name)), nl=False)


def copy_recipe(name: str, target: Path | None) -> None:
    source = find_recipe(name)
    target = target or Path(source.name)
    write_new(target, read_text(source), key="target")
    typer.echo(f"wrote {target}; change it, then: growkit train {target}")


def write_new(target: Path, text: str, *, key: str) -> None:
    """Writes a file that is not there yet, whole or not at all; ``key`` is what named it. Raises ConfigError."""
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        mend = "name another file"
        raise ConfigError("file-exists", "is already there", key=key, value=str(target), mend=mend) from None
    except OSError as error:
        if target.is_file():
            target.unlink()
        mend = "name a file in a folder that exists and can be written to"
        raise ConfigError("cannot-write", f"cannot be written ({error})", key=str(target), mend=mend) from error


def show_schedule(name: str, overrides: Sequence[str], extends: Path | None) -> None:
    recipe, schedule = read(name, overrides, extends)
    screen([], recipe.data.screen, ScreenReport())  # its function, its languages and its libraries are there
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in ("stage", "grows", "params", "context", "batch", "steps", "tokens", "FLOPs"):
        table.add_column(header, no_wrap=True)
    for stage in schedule.stages:
        most = "≤" if stage.until is not None else ""
        table.add_row(
            escape(stage.name),
            grows(stage, lambda link: f"{link.operator} {link.method}{_INEXACT[link.exactness.kind != 'exact']}"),
            quantity(stage.model.num_params()),
            "–".join(dict.fromkeys(map(str, extent(stage, "context_length")))),
            f"{'' if len(stage.lengths.values) == 1 else '≤'}{stage.global_batch_tokens}",
            f"{most}{stage.steps}",
            f"{most}{quantity(stage.tokens)}",
            f"{most}{quantity(stage.total_flops + stage.probe_flops)}",
        )
    console = Console()
    console.print(table)
    if any(stage.links for stage in schedule.stages):
        console.print("growth keeps what the model computes, but where it says (not exact)")
    most = "at most " if any(stage.until for stage in schedule.stages) else ""
    console.print(f"valid: {most}{schedule.tokens:,} tokens, {schedule.flops:.3g} FLOPs in all")
    if (recipe.data.source or "").startswith(SYNTHETIC):
        return
    from growkit.data.sources import source_kind  # numpy, which a plan does without
    from growkit.data.tokenizer import load_tokenizer

    try:
        for source in sources_of(recipe.data):
            source_kind(source.source)
        load_tokenizer(recipe.data).require_room(schedule.start_model.vocab_size)
    except DataError as missing:  # no fault of the recipe: it may be meant for another machine
        console.print(f"but to train it here: {missing}", soft_wrap=True, markup=False)
