"""``growkit eval``: what a checkpoint is worth on a text, and what it costs to use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.checkpoint.manifest import Manifest
from growkit.cli.checkpoints import open_any, tokenizer_of
from growkit.config.load import parse_recipe
from growkit.config.recipe import DataConfig, Recipe, TrainerConfig
from growkit.data.corpus import load_corpus, whole_text
from growkit.data.tokenizer import Ends, Ids, Tokenizer
from growkit.duration import quantity
from growkit.errors import ConfigError, DataError
from growkit.eval.measure import cache_bytes_per_token, score, speed
from growkit.eval.ngram import bits
from growkit.growth.banks import first_banks
from growkit.models.decoder import build
from growkit.models.presets import PRESETS
from growkit.schedule.plan import growth_schedule
from growkit.train import hardware

console = Console(highlight=False)
WRITTEN = 128  # tokens whose writing is timed


def evaluate(
    folder: Path,
    source: str | None,
    text_field: str,
    context: int | None,
    tokens: int,
    *,
    banks: int | None = None,
    as_json: bool,
) -> None:
    """Prints loss, loss by position, speed and memory of the checkpoint at ``folder``; ``banks``: of parameter tokens
    that are read in each projection, None: all."""
    checkpoint = open_any(folder)
    manifest, config = checkpoint.manifest, checkpoint.manifest.model
    recipe = recipe_of(manifest)
    context = context or trained_context(recipe, manifest)
    name, text, ends = _text(source, text_field, recipe, tokenizer_of(checkpoint))
    if len(text) <= context:
        problem = f"has {len(text)} tokens, a window needs {context + 1}"
        raise DataError(
            "corpus-too-short", problem, key="--data", value=name, mend="use more text or a shorter --context"
        )
    device = hardware.accelerator(TrainerConfig())
    tensors = checkpoint.state.params
    if banks is not None:
        config, tensors = first_banks(config, tensors, banks)
    params = {key: tensors[key].to(device) for key in tensors}
    model = build(config, params, copy=False)
    result = score(model, text, context, tokens, ends)
    in_bits = bits(result.loss, result.bytes_per_token)
    pace = speed(model, context, WRITTEN)
    values: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "step": manifest.progress.step,
        "parameters": config.num_params(),
        "data": name,
        "context_length": context,
        "scored_tokens": result.tokens,
        "loss": result.loss,
        "bits_per_byte": in_bits,
        "bytes_per_token": result.bytes_per_token,
        "perplexity": float(np.exp(result.loss)),
        "loss_by_position": result.by_position,
        "device": device,
        "reads_tokens_per_second": pace.read,
        "writes_tokens_per_second": pace.write,
        "weight_bytes": sum(tensor.nbytes for tensor in params.values()),
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
    }
    if as_json:
        typer.echo(json.dumps(values))
        return
    console.print(f"{checkpoint.folder}", soft_wrap=True, markup=False)
    console.print(
        f"{escape(name)}: {result.loss:.4f} nats per token, [bold]{in_bits:.3f} bits per byte[/bold], "
        f"perplexity {values['perplexity']:.2f}, over {result.tokens:,} tokens in windows of {context} "
        "(their first eighth is only context)",
        soft_wrap=True,
    )
    table = Table("position", "nats", "bits per byte", title="loss by position in the window", title_justify="left")
    sizes = [size for *_, size in result.buckets(result.bytes_by_position)]
    for (first, last, nats), bytes_per_token in zip(result.buckets(), sizes, strict=True):
        where = f"{first}" if first == last else f"{first}–{last}"
        table.add_row(where, f"{nats:.4f}", f"{bits(nats, bytes_per_token):.3f}")
    console.print(table)
    size = {key: f"{quantity(values[key])}B" for key in ("weight_bytes", "cache_bytes_per_token", "peak_memory_bytes")}
    console.print(
        f"on {device}, one sequence: reads {quantity(pace.read)} tokens/s, writes {quantity(pace.write)} tokens/s; "
        f"weights {size['weight_bytes']}, cache {size['cache_bytes_per_token']} a token, peak memory of this process "
        f"{size['peak_memory_bytes']}",
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
