"""A growkit model as a Hugging Face folder, in its own format or in another family's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from growkit.checkpoint.hf import tokenizer
from growkit.checkpoint.hf.folder import refuse_existing, write_folder
from growkit.checkpoint.hf.format import ARCHITECTURE, MODEL_TYPE, described
from growkit.errors import require
from growkit.models.config import ModelConfig, to_json
from growkit.registry import Registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StateDictAdapter(Protocol):
    """Another side's names and shapes for growkit's tensors."""

    def to_hf(self, config: ModelConfig, params: Mapping[str, Tensor]) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """(the fields of config.json that describe the model, its tensors, made when asked for). Raises ConfigError for
        what that side's configuration cannot say."""
        ...


FAMILIES: Registry[StateDictAdapter] = Registry("format to export as")


@dataclass(frozen=True)
class Renamed(Mapping[str, Tensor]):
    """``tensors`` under ``prefix``, in ``dtype``, each made when it is asked for."""

    tensors: Mapping[str, Tensor]
    prefix: str = ""
    dtype: torch.dtype | None = None

    def __getitem__(self, name: str) -> Tensor:
        if not name.startswith(self.prefix):
            raise KeyError(name)
        tensor = self.tensors[name.removeprefix(self.prefix)]
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return (self.prefix + name for name in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _Growkit:
    """All of it, as it is: read by AutoModelForCausalLM once growkit is imported."""

    def to_hf(self, config: ModelConfig, params: Mapping[str, Tensor]) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        fields = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "growkit": to_json(config)}
        return fields | described(config), Renamed(params, "growkit.")


FAMILIES.register("growkit")(_Growkit())


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
        fields["max_position_embeddings"] = context_length
    with tempfile.TemporaryDirectory() as made:
        files = tokenizer.write(Path(made))
        write_folder(folder, fields, Renamed(tensors, dtype=dtype), beside=files)
