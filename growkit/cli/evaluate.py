"""``growkit eval``: what a checkpoint is worth on a text or a synthetic task, and what it costs to use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.opening import open_any
from growkit.cli.checkpoints import tokenizer_of
from growkit.cli.reports import refuse_other_file
from growkit.cli.synthetic import evaluate_task, task_to_score
from growkit.config.load import parse_recipe
from growkit.config.recipe import DataConfig, Recipe, TrainerConfig
from growkit.data.corpus import load_corpus, whole_text
from growkit.data.synthetic.tasks import is_task
from growkit.data.tokenizer import Ends, Ids, Tokenizer
from growkit.duration import quantity
from growkit.errors import ConfigError, DataError, cannot_write
from growkit.eval.measure import Score, cache_bytes_per_token, score, speed
from growkit.eval.ngram import bits
from growkit.growth.banks import first_banks
from growkit.models.decoder import build
from growkit.models.presets import PRESETS
from growkit.report.positions import draw_positions
from growkit.schedule.plan import growth_schedule
from growkit.train import hardware

console = Console(highlight=False)
WRITTEN = 128  # tokens whose writing is timed
TOKENS = 131072  # to score, unless told otherwise


@dataclass(frozen=True)
class TextOptions:
    """``tokens``: about how many to score. ``png``: where the loss by position is drawn."""

    text_field: str
    tokens: int | None
    png: Path | None


@dataclass(frozen=True)
class TaskOptions:
    """``sequences``: at each length. ``settings``: key=value, on top of the run's."""

    sequences: int | None
    settings: tuple[str, ...]


def evaluate(
    folder: Path,
    source: str | None,
    text: TextOptions,
    task: TaskOptions,
    contexts: Sequence[int],
    *,
    banks: int | None = None,
    as_json: bool,
) -> None:
    """Prints what the checkpoint at ``folder`` is worth on ``source``, a text or a synthetic task (None: what its run
    held out), in windows of ``contexts`` (none: as it was trained); ``banks``: of parameter tokens that are read in
    each projection, None: all."""
    checkpoint = open_any(folder)
    manifest, config = checkpoint.manifest, checkpoint.manifest.model
    recipe = recipe_of(manifest)
    name = source if source is not None or recipe is None else recipe.data.source
    synthetic = name is not None and is_task(name)
    if synthetic:
        _refuse({"--tokens": text.tokens, "--png": text.png}, "is for a text, and this is a synthetic task")
    else:
        _refuse({"--sequences": task.sequences, "--setting": task.settings or None}, "is for a synthetic task")
    contexts = contexts or [trained_context(recipe, manifest)]
    device = hardware.accelerator(TrainerConfig())
    tensors = checkpoint.state.params
    if banks is not None:
        config, tensors = first_banks(config, tensors, banks)
    about = {
        "checkpoint": str(checkpoint.folder),
        "step": manifest.progress.step,
        "parameters": config.num_params(),
    }
    if synthetic:
        assert name is not None
        chosen = task_to_score(name, task.settings, recipe)
        model = build(config, {key: tensors[key].to(device) for key in tensors}, copy=False)
        evaluate_task(model, chosen, contexts, task.sequences, about, as_json=as_json)
        return
    if text.png is not None:
        refuse_other_file(text.png)
    name, ids, ends = _text(source, text.text_field, recipe, tokenizer_of(checkpoint))
    if len(ids) <= max(contexts):
        problem = f"has {len(ids)} tokens, a window needs {max(contexts) + 1}"
        raise DataError(
            "corpus-too-short", problem, key="--data", value=name, mend="use more text or a shorter --context"
        )
    model = build(config, {key: tensors[key].to(device) for key in tensors}, copy=False)
    scores = {context: score(model, ids, context, text.tokens or TOKENS, ends) for context in contexts}
    if text.png is not None:
        trained = None if recipe is None else trained_context(recipe, manifest)
        try:
            draw_positions({context: found.by_position for context, found in scores.items()}, trained, text.png)
        except OSError as error:
            raise cannot_write(text.png, error) from error
    if not as_json:
        console.print(f"{checkpoint.folder}", soft_wrap=True, markup=False)
    for context, found in scores.items():
        pace = speed(model, context, WRITTEN)
        costs = {
            "device": device,
            "reads_tokens_per_second": pace.read,
            "writes_tokens_per_second": pace.write,
            "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
            "cache_bytes_per_token": cache_bytes_per_token(config),
            "peak_memory_bytes": hardware.peak_memory_bytes(device),
        }
        if as_json:
            typer.echo(json.dumps(about | {"data": name} | _values(found, context) | costs))
        else:
            _show(found, context, name)
            _show_costs(costs)
    if text.png is not None and not as_json:
        console.print(f"wrote {text.png}", soft_wrap=True, markup=False)


def _refuse(options: Mapping[str, Any], problem: str) -> None:
    """Raises ConfigError for an option that was given and is not for what is scored."""
    for option, value in options.items():
        if value is not None:
            shown = value if isinstance(value, int) else str(value)
            raise ConfigError("bad-command-line", problem, key=option, value=shown, mend="leave it out")


def _values(found: Score, context: int) -> dict[str, Any]:
    return {
        "context_length": context,
        "scored_tokens": found.tokens,
        "loss": found.loss,
        "bits_per_byte": bits(found.loss, found.bytes_per_token),
        "bytes_per_token": found.bytes_per_token,
        "perplexity": float(np.exp(found.loss)),
        "loss_by_position": found.by_position,
    }


def _show(found: Score, context: int, name: str) -> None:
    console.print(
        f"{escape(name)}: {found.loss:.4f} nats per token, "
        f"[bold]{bits(found.loss, found.bytes_per_token):.3f} bits per byte[/bold], "
        f"perplexity {np.exp(found.loss):.2f}, over {found.tokens:,} tokens in windows of {context} "
        "(their first eighth is only context)",
        soft_wrap=True,
    )
    table = Table("position", "nats", "bits per byte", title="loss by position in the window", title_justify="left")
    sizes = [size for *_, size in found.buckets(found.bytes_by_position)]
    for (first, last, nats), bytes_per_token in zip(found.buckets(), sizes, strict=True):
        where = f"{first}" if first == last else f"{first}–{last}"
        table.add_row(where, f"{nats:.4f}", f"{bits(nats, bytes_per_token):.3f}")
    console.print(table)


def _show_costs(costs: Mapping[str, Any]) -> None:
    size = {key: f"{quantity(costs[key])}B" for key in ("weight_bytes", "cache_bytes_per_token", "peak_memory_bytes")}
    console.print(
        f"on {costs['device']}, one sequence: reads {quantity(costs['reads_tokens_per_second'])} tokens/s, writes "
        f"{quantity(costs['writes_tokens_per_second'])} tokens/s; weights {size['weight_bytes']}, cache "
        f"{size['cache_bytes_per_token']} a token, peak memory of this process {size['peak_memory_bytes']}",
        soft_wrap=True,
    )


def recipe_of(manifest: Manifest) -> Recipe | None:
    return parse_recipe(manifest.recipe, [], PRESETS, name="the checkpoint's recipe") if manifest.recipe else None


def trained_context(recipe: Recipe | None, manifest: Manifest) -> int:
    """Tokens of a sequence in the stage that the checkpoint is of. Raises ConfigError without a recipe."""
    if recipe is None:
        mend = "say how long the windows are"
        raise ConfigError("missing-key", "is missing, and the checkpoint has no recipe", key="--context", mend=mend)
    return growth_schedule(recipe).stage(manifest.progress.stage).context_length


def _text(
    source: str | None, text_field: str, recipe: Recipe | None, tokenizer: Tokenizer
) -> tuple[str, Ids, Ends | None]:
    """(what to call it, its tokens, where each ends in it): all of ``source``, or the part that the checkpoint's run
    held out."""
    if source is not None:
        return source, *whole_text(DataConfig(source=source, text_field=text_field), tokenizer)
    if recipe is None:
        mend = "name a file, a folder or hf:NAME"
        raise ConfigError("missing-key", "is missing, and the checkpoint has no recipe", key="--data", mend=mend)
    corpus = load_corpus(recipe.data, tokenizer)
    return f"{corpus.name}, the part held out", corpus.validation, corpus.validation_ends
