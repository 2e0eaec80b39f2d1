"""``growkit train`` and ``growkit resume``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from growkit.checkpoint.run_folder import RunFolder
from growkit.cli import recipes
from growkit.config.load import parse_recipe, to_yaml
from growkit.config.recipe import Recipe
from growkit.errors import ConfigError
from growkit.eval.generate import sample_text
from growkit.models.decoder import build
from growkit.models.presets import PRESETS
from growkit.report.curve import draw_curves
from growkit.schedule.plan import GrowthSchedule, growth_schedule
from growkit.train.display import Display, clock, quantity
from growkit.train.metrics_log import read_log
from growkit.train.hardware import process_rank
from growkit.train.run import Run, prepare_corpus

DONE, STOPPED = 0, 3
FOLDER_VARIABLE = "GROWKIT_RUN_FOLDER"  # tells the further processes of a distributed run where it is


def start(name: str, overrides: Sequence[str]) -> int:
    """Trains a recipe from the start; returns the exit code. Nothing is written before the recipe and the corpus
    are known to be sound."""
    recipe, schedule = recipes.read(name, overrides)
    _set_threads(recipe)
    corpus = prepare_corpus(recipe, schedule)
    folder = _joined_folder()
    if folder is None:
        title = recipe.run.name or f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = RunFolder.create(Path(recipe.run.folder) / title, to_yaml(recipe))
        os.environ[FOLDER_VARIABLE] = str(folder.path)
    return _run(Run(recipe, schedule, folder, corpus), schedule)


def go_on(path: Path, from_step: int | None, as_new: Path | None) -> int:
    """Resumes the run at ``path``; returns the exit code."""
    folder = _joined_folder()
    if folder is None:
        folder = RunFolder.open(path)
        if as_new is not None:
            step = from_step if from_step is not None else (folder.steps() or [0])[-1]
            folder = folder.branch(step, as_new if as_new.parent != Path() else path.parent / as_new)
            from_step = None
        else:
            folder.lock()
        os.environ[FOLDER_VARIABLE] = str(folder.path)
    # A run that died before its first save has lost nothing: it starts again, in its own folder.
    checkpoint = folder.load(from_step) if from_step is not None or folder.steps() else None
    if from_step is not None:
        folder.set_aside_after(from_step)
    recipe = parse_recipe(folder.recipe.read_text(), [], PRESETS, name=str(folder.recipe))
    schedule = growth_schedule(recipe)
    _set_threads(recipe)
    return _run(Run(recipe, schedule, folder, prepare_corpus(recipe, schedule), checkpoint), schedule)


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


def _run(run: Run, schedule: GrowthSchedule) -> int:
    began = time.monotonic()
    with Display(schedule, run.recipe.monitor.progress if run.rank == 0 else "off") as display:
        run.log.listeners.append(display)
        display.print(f"run folder: [bold]{run.folder.path}[/bold]  corpus: {run.corpus.name}, "
                      f"{quantity(len(run.corpus.train))} bytes of training text, {quantity(len(run.corpus.validation))} held out")
        done = run.train()
    if run.rank != 0:
        return DONE if done else STOPPED
    _finish(run, display.console, began, done)
    return DONE if done else STOPPED


def _finish(run: Run, console: Console, began: float, done: bool) -> None:
    recipe = run.recipe
    if recipe.monitor.progress == "off":
        return
    picture = run.folder.path / "curve.png"
    draw_curves({run.folder.path.name: list(read_log(run.folder.metrics))}, picture)
    if done and recipe.monitor.sample_tokens:
        model = build(run.state.config, run.state.params, backend=recipe.trainer.backend)
        text = sample_text(model, recipe.monitor.sample_prompt, recipe.monitor.sample_tokens, seed=recipe.run.seed)
        console.rule("a sample")
        console.print(text, markup=False)
        console.rule()
    at = run.progress
    console.print(
        f"{'done' if done else 'stopped early'}: {at.step} steps, {quantity(at.tokens)} tokens, "
        f"{quantity(at.flops)} FLOPs in {clock(time.monotonic() - began)}"
    )
    console.print(f"run folder: {run.folder.path}   curve: {picture}", soft_wrap=True)
    if not done:
        console.print(f"go on with: growkit resume {run.folder.path}", soft_wrap=True)


