"""``growkit export``: a checkpoint as a folder that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from growkit.checkpoint.hf.export import DTYPES, FAMILIES, export
from growkit.checkpoint.hf.folder import ModelFolder, refuse_existing
from growkit.checkpoint.hf.source import lineage_file
from growkit.checkpoint.opening import open_any
from growkit.cli.checkpoints import origin_of, tokenizer_of
from growkit.cli.evaluate import recipe_of, trained_context
from growkit.errors import ConfigError

console = Console(highlight=False)


def export_checkpoint(source: Path, folder: Path, family: str, dtype: str) -> None:
    """Writes ``source`` as ``folder``; tensors stream, so memory holds a shard at a time."""
    FAMILIES.get(family, key="--as")
    refuse_existing(folder)
    checkpoint = open_any(source)
    if isinstance(checkpoint, ModelFolder) and checkpoint.adapter.name != "growkit":
        mend = "`growkit grow` makes a larger one of it, with its tokenizer"
        problem = "is a Hugging Face folder already"
        raise ConfigError("not-supported", problem, key=str(source), mend=mend)
    manifest = checkpoint.manifest
    recipe = recipe_of(manifest)
    export(
        folder,
        manifest.model,
        checkpoint.state.params,
        tokenizer_of(checkpoint),
        family=family,
        dtype=DTYPES[dtype],
        context_length=trained_context(recipe, manifest) if recipe is not None else None,
        origin=origin_of(checkpoint),
        lineage=lineage_file(manifest) if manifest.lineage else None,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    console.print(
        f"wrote {folder}: {kind}, {manifest.model.num_params():,} parameters in {dtype}, {size:,} bytes",
        soft_wrap=True,
        markup=False,
    )
