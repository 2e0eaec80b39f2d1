"""A growkit model as a Hugging Face folder, in its own format or in another family's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from growkit.checkpoint.hf import tokenizer
from growkit.checkpoint.hf.adapter import Adapter
from growkit.checkpoint.hf.folder import Cast, refuse_existing, write_folder
from growkit.checkpoint.hf.source import ADAPTERS
from growkit.errors import require
from growkit.models.config import ModelConfig
from growkit.registry import Registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAMILIES: Registry[Adapter] = Registry("format to export as")
for _adapter in ADAPTERS.values():
    FAMILIES.register(_adapter.name)(_adapter)


def export(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Tensor],
    *,
    family: str = "growkit",
    dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
) -> None:
    """Writes a byte-level model with its tokenizer as a new Hugging Face folder; tensors stream.

    ``context_length``: tokens of a sequence in training, which tools take for the most they may pass. Raises
    ConfigError without transformers, for an unknown ``family`` or for a model it cannot say, and CheckpointError as
    ``write_folder``.
    """
    require("transformers", extra="eval", key="export")
    refuse_existing(folder)
    fields, tensors = FAMILIES.get(family, key="--as").to_hf(config, params)
    fields["dtype"] = str(dtype).removeprefix("torch.")
    fields |= {"bos_token_id": None, "eos_token_id": tokenizer.END_ID, "pad_token_id": tokenizer.END_ID}
    if context_length is not None:
        fields.setdefault("max_position_embeddings", context_length)
    with tempfile.TemporaryDirectory() as made:
        files = tokenizer.write(Path(made))
        write_folder(folder, fields, Cast(tensors, dtype), beside=files)
