"""A growkit model as a Hugging Face folder, in its own format or in another family's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from growkit.checkpoint.hf.adapter import Adapter
from growkit.checkpoint.hf.folder import Cast, refuse_existing, said_besides, write_folder
from growkit.checkpoint.hf.settings import CONFIG, read_config
from growkit.checkpoint.hf.source import ADAPTERS, LINEAGE, travelling
from growkit.checkpoint.hf.tokenizer import write
from growkit.data.tokenizer import Tokenizer
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
    tokenizer: Tokenizer,
    *,
    family: str = "growkit",
    dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
    origin: Path | None = None,
    lineage: str | None = None,
) -> None:
    """Writes a model with its tokenizer as a new Hugging Face folder; tensors stream.

    ``context_length``: tokens of a sequence in training, which tools take for the most they may pass. ``origin``: where
    the model came from with that tokenizer, if from Hugging Face: the tokenizer's own files are copied, its ids stay
    those of the beginning, and what a config.json of the same family said besides goes on. ``lineage``: the text of
    growkit.json. Raises
    ConfigError without transformers, for an unknown ``family`` or for a model it cannot say, and CheckpointError as
    ``write_folder``.
    """
    require("transformers", extra="hf", key="export")
    refuse_existing(folder)
    adapter = FAMILIES.get(family, key="--as")
    fields, tensors = adapter.to_hf(config, params)
    said = read_config(origin) if origin is not None and (origin / CONFIG).is_file() else {}
    if said.get("architectures") == fields["architectures"]:
        fields = said_besides(said, adapter) | fields
    fields["dtype"] = str(dtype).removeprefix("torch.")
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
    fields |= {key: said.get(key, id) for key, id in ids.items()}
    if context_length is not None:
        fields["max_position_embeddings"] = max(fields.get("max_position_embeddings", 0), context_length)
    with tempfile.TemporaryDirectory() as made:
        files = write(Path(made), tokenizer) if origin is None else travelling(origin)
        if lineage is not None:
            history = Path(made) / LINEAGE
            history.write_text(lineage, encoding="utf-8")
            files.append(history)
        write_folder(folder, fields, Cast(tensors, dtype), beside=files)
