"""``growkit train``, ``resume`` and ``extend``."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from growkit.checkpoint import store
from growkit.checkpoint.extension import extended_recipe, first_progress, same_tokenizer
from growkit.checkpoint.metrics_log import read_log
from growkit.checkpoint.opening import open_any
from growkit.checkpoint.reference import described
from growkit.checkpoint.run_folder import RunFolder, log_before, run_of
from growkit.checkpoint.store import Checkpoint
from growkit.cli import recipes
from growkit.config.load import load_recipe, read_text, to_yaml
from growkit.config.recipe import BYTES, Recipe
from growkit.data.screen import ScreenReport
from growkit.duration import quantity
from growkit.errors import CheckpointError, ConfigError, cannot_write
from growkit.models.presets import PRESETS
from growkit.report.curve import draw_curves
from growkit.report.page import write_report
from growkit.report.run_summary import RunSummary
from growkit.schedule.arms import same_arms
from growkit.schedule.pieces import same_pieces
from growkit.schedule.plan import growth_schedule, settled
from growkit.schedule.stage import GrowthSchedule
from growkit.train import hardware, loggers
from growkit.train.data import RunData, prepare_data
from growkit.train.display import Display, clock
from growkit.train.hardware import process_rank
from growkit.train.run import Run

DONE, STOPPED = 0, 3
FOLDER_VARIABLE = "GROWKIT_RUN_FOLDER"  # tells the further processes of a distributed run where it is


def start(name: str, overrides: Sequence[str]) -> int:
    """Trains a recipe from the start; returns the exit code. Nothing is written before the recipe and the corpus
    are known to be sound."""
    recipe, schedule = recipes.read(name, overrides)
    if recipe.start is not None:
        mend = "go on with `growkit resume RUN`, or write new stages and `growkit extend CHECKPOINT RECIPE`"
        raise ConfigError("needs-a-checkpoint", "the recipe is of an extended run", key="start", mend=mend)
    _set_threads(recipe)
    loggers.require(recipe.logger)
    data = prepare_data(recipe, schedule)
    hardware.accelerator(recipe.trainer)
    folder = _joined_folder()
    if folder is None:
        folder = RunFolder.create(_new_folder(recipe, Path(name)), to_yaml(recipe))
        os.environ[FOLDER_VARIABLE] = str(folder.path)
    return _run(Run(recipe, schedule, folder, data))


def go_on(path: Path, from_step: int | None, as_new: Path | None) -> int:
    """Resumes the run at ``path``; returns the exit code. Nothing is written before all that the run needs is known to
    be there and to be what it was."""
    joined = _joined_folder()
    folder = joined or RunFolder.open(path)
    if joined is None and as_new is None:
        folder.lock()
    recipe = load_recipe(folder.recipe, [], PRESETS)
    schedule = growth_schedule(recipe)
    _set_threads(recipe)
    loggers.require(recipe.logger)
    data = prepare_data(recipe, schedule)
    hardware.accelerator(recipe.trainer)
    # A run that died before its first save has lost nothing: it starts again, in its own folder.
    begun = from_step is not None or as_new is not None or bool(folder.steps())
    checkpoint = folder.load(from_step) if begun else None
    if checkpoint is not None:
        schedule = growth_schedule(recipe, checkpoint.manifest.progress.decisions)
        _require_same(checkpoint, schedule, data, folder)
        at = checkpoint.manifest.progress
        if as_new is None and (at.stage, at.stage_step) == (schedule.last.index, schedule.last.steps):
            done = f"{folder.path} is complete at step {at.step}: nothing is left to train"
            Console(highlight=False).print(done, soft_wrap=True, markup=False)
            if not (folder.curve.exists() and folder.report.exists()):  # killed between its last save and its pictures
                _draw(folder)
            folder.unlock()
            return DONE
    if joined is None:
        if as_new is not None and checkpoint is not None:
            target = as_new if as_new.parent != Path() else path.parent / as_new
            folder = folder.branch(checkpoint.manifest.progress.step, target)
            checkpoint = folder.load()
        elif from_step is not None:
            folder.set_aside_after(from_step)
        os.environ[FOLDER_VARIABLE] = str(folder.path)
    return _run(Run(recipe, schedule, folder, data, checkpoint))


def extend(source: Path, name: str, overrides: Sequence[str], from_step: int | None) -> int:
    """Trains further stages on a checkpoint, in a new run folder; returns the exit code. Nothing is written before
    recipe, checkpoint and corpus are known to be sound."""
    joined = _joined_folder()
    if joined is not None:
        return go_on(joined.path, None, None)
    checkpoint = open_any(source, from_step)
    manifest, path = checkpoint.manifest, recipes.find_recipe(name)
    recipe = described(extended_recipe(manifest, str(checkpoint.folder), read_text(path), overrides, name=str(path)))
    schedule = growth_schedule(recipe)
    recipe = settled(recipe, schedule)
    _set_threads(recipe)
    loggers.require(recipe.logger)
    data = prepare_data(recipe, schedule)
    if data.corpus is not None and same_tokenizer(manifest, recipe):  # not the recipe's wish for another one
        data.corpus.tokenizer.require_same(manifest.corpus.get("tokenizer", BYTES))
    hardware.accelerator(recipe.trainer)
    step, log = manifest.progress.step, log_before(checkpoint.folder, manifest)
    parent = {"run": _origin(checkpoint), "step": step}
    folder = RunFolder.create(_new_folder(recipe, path), to_yaml(recipe), parent=parent)
    first = dataclasses.replace(
        manifest,
        progress=first_progress(manifest, recipe, schedule, data.sha256),
        recipe=to_yaml(recipe),
        corpus=data.record,
        log_bytes=len(log),
        layout="whole",
    )
    with folder.beginning():
        folder.metrics.write_bytes(log)
        store.write(folder.checkpoint(step), checkpoint.state, first)
    os.environ[FOLDER_VARIABLE] = str(folder.path)
    return _run(Run(recipe, schedule, folder, data, folder.load()))


def _origin(checkpoint: Checkpoint) -> str:
    """The run a checkpoint is of, also when it was grown by hand since; else its folder."""
    run = run_of(checkpoint.folder)
    if run is not None:
        return run.path.name
    by_hand = checkpoint.manifest.lineage[-1] if checkpoint.manifest.lineage else {}
    return str(by_hand.get("run", checkpoint.folder))


def _require_same(checkpoint: Checkpoint, schedule: GrowthSchedule, data: RunData, folder: RunFolder) -> None:
    """Raises DataError or CheckpointError when ``checkpoint`` is not one of these data and this schedule."""
    manifest, at = checkpoint.manifest, checkpoint.manifest.progress
    data.require_same(manifest.corpus)
    if at.stage_step and not same_arms(schedule.stage(at.stage).arms, at.data):
        problem = f"does not say what chose the steps that led to {checkpoint.folder.name}"
        mend = "undo the changes to data.bandit and to what it chooses among; a new run may have others"
        raise CheckpointError("recipe-changed", problem, key=str(folder.recipe), mend=mend)
    if not same_pieces(schedule.lengths, at.data):
        problem = f"has steps of other lengths than those that documents were cut into up to {checkpoint.folder.name}"
        mend = "undo the changes to the lengths of its stages, later ones too; a new run may have others"
        raise CheckpointError("recipe-changed", problem, key=str(folder.recipe), mend=mend)
    if schedule.model_at(at) != manifest.model:
        problem = f"does not describe the model and the stage {at.stage + 1} that {checkpoint.folder.name} holds"
        mend = "undo the changes to its model and its past stages; later stages may change"
        raise CheckpointError("recipe-changed", problem, key=str(folder.recipe), mend=mend)


def _new_folder(recipe: Recipe, source: Path) -> Path:
    """The folder that run.name says; without a name, one of the recipe's name and the time that is there, empty, for
    this run alone. Raises CheckpointError if it cannot be made."""
    folder = Path(recipe.run.folder)
    if recipe.run.name is not None:
        return folder / recipe.run.name
    stem = f"{source.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = folder / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except OSError as error:
            if not os.path.lexists(path):  # else begun in the same second: runs of a sweep, say
                raise cannot_write(path, error) from error
    return path


def _joined_folder() -> RunFolder | None:
    """For a further process of a distributed run, the folder its first process made; None in the first one."""
    if process_rank() == 0:
        return None
    if FOLDER_VARIABLE not in os.environ:
        mend = f"start with `growkit train` and trainer.devices, or set {FOLDER_VARIABLE} for every process"
        raise ConfigError("no-run-folder", "is not set in a further process", key=FOLDER_VARIABLE, mend=mend)
    return RunFolder(Path(os.environ[FOLDER_VARIABLE]))


def _set_threads(recipe: Recipe) -> None:
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)


def _run(run: Run) -> int:
    began = time.monotonic()
    try:
        with (
            Display(lambda: run.schedule, run.recipe.monitor.progress if run.rank == 0 else "off") as display,
            _logger(run, display) as logger,
        ):
            run.log.listeners += [display, *([logger] if logger is not None else [])]
            if run.progress.step and run.folder.metrics.is_file():  # shown beside, as before the stop
                for record in read_log(run.folder.metrics):
                    if record["kind"] == "ngram":
                        display(record)
            display.print(
                f"run folder: [bold]{escape(str(run.folder.path))}[/bold]   corpus: {escape(run.data.name)}, "
                f"{run.data.amount}"
            )
            if run.data.corpus is not None and run.data.corpus.screened is not None:
                display.print(f"data.screen: {ScreenReport.from_json(run.data.corpus.screened).summary()}")
            done = run.train()
        if run.rank == 0:
            _finish(run, display.console, began, done)
    finally:
        run.folder.unlock()
    return DONE if done else STOPPED


def _logger(run: Run, display: Display) -> AbstractContextManager[loggers.Listener | None]:
    if run.rank:
        return nullcontext()
    return loggers.open_logger(run.recipe.logger, run.folder, lambda line: display.print(escape(line)))


def _draw(folder: RunFolder) -> None:
    run = RunSummary.read(folder.path)
    try:
        draw_curves([run.history], folder.curve)
    except OSError as error:
        raise cannot_write(folder.curve, error) from error
    write_report([run], folder.report)


def _finish(run: Run, console: Console, began: float, done: bool) -> None:
    _draw(run.folder)
    if run.recipe.monitor.progress == "off":
        return
    at = run.progress
    console.print(
        f"{'done' if done else f'stopped early ({run.stop_cause})'}: {at.step} steps, {quantity(at.tokens)} tokens, "
        f"{quantity(at.flops)} FLOPs; {clock(time.monotonic() - began)} since "
        f"{f'step {run.first_step}' if run.first_step else 'the start'}"
    )
    console.print(f"run folder: {run.folder.path}   report: {run.folder.report}", soft_wrap=True, markup=False)
    if not done:
        console.print(f"go on with: growkit resume {run.folder.path}", soft_wrap=True, markup=False)
