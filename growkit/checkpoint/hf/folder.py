"""A model folder as Hugging Face lays it out: config.json, safetensors, and what travels along."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from growkit.checkpoint.store import fsync, write_group, writing
from growkit.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers asks a file whose framework it was written by


def refuse_existing(folder: Path) -> None:
    """Raises CheckpointError if something is at ``folder``."""
    if os.path.lexists(folder):
        mend = "name a folder that does not exist"
        raise CheckpointError("file-exists", "is already there", key=str(folder), mend=mend)


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    beside: Sequence[Path] = (),
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``config`` and ``tensors`` (which may be lazy) as the new folder ``folder``, complete or not at all.

    Tensors go into model.safetensors, or, beyond ``shard_bytes``, into model-NNNNN-of-NNNNN.safetensors with an index;
    one shard is in memory at a time. A tied tensor is named once. ``beside``: files that are copied in (a tokenizer's).
    Raises CheckpointError if the folder is there already or cannot be written, or a file of ``beside`` is missing.
    """
    refuse_existing(folder)
    for path in beside:
        assert path.name not in (CONFIG, WEIGHTS, INDEX), path
        if not path.is_file():
            mend = "restore it, or export without it"
            raise CheckpointError("damaged", "is missing", key=str(path), mend=mend)
    with writing(folder) as unfinished:
        shards = write_group(unfinished, "model", tensors, shard_bytes=shard_bytes, metadata=METADATA)
        weight_map: dict[str, str] = {}
        for number, (name, sizes) in enumerate(shards.items(), 1):
            final = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            os.rename(unfinished / name, unfinished / final)  # the count is known only now
            weight_map |= dict.fromkeys(sizes, final)
        if len(shards) > 1:
            total = sum(sum(sizes.values()) for sizes in shards.values())
            _write_json(unfinished / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(unfinished / CONFIG, config)
        for path in beside:
            shutil.copyfile(path, unfinished / path.name)
            fsync(unfinished / path.name)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    fsync(path)
