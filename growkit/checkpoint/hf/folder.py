"""A model folder as Hugging Face lays it out: config.json, safetensors, and what travels along. Written, and read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkit.checkpoint.hf import source
from growkit.checkpoint.hf.adapter import Adapter, LaidOut, Rule
from growkit.checkpoint.hf.settings import CONFIG, read_config
from growkit.checkpoint.store import Checkpoint, Ordered, StoredTensors, copy_in, fsync, write_group, writing
from growkit.errors import CheckpointError, ConfigError
from growkit.growth.logits import stream_logits
from growkit.growth.state import TrainState
from growkit.models.config import ModelConfig
from growkit.models.spec import param_specs

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers asks a file whose framework it was written by
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TIED_HEADS = ("lm_head.weight", "embed_out.weight")  # which some files hold beside the table they are tied to


def refuse_existing(folder: Path, key: str = "") -> None:
    """Raises ConfigError, naming ``key`` if something said it, if something is at ``folder``."""
    if os.path.lexists(folder):
        mend = "name a folder that does not exist"
        raise ConfigError("file-exists", "is already there", key=key or "folder", value=str(folder), mend=mend)


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
    one shard is in memory at a time. A tied tensor is named once. ``beside``: files, and folders of files, that are
    copied in (a tokenizer's). Raises ConfigError if the folder is there already, CheckpointError if it cannot be
    written, or something of ``beside`` is missing.
    """
    refuse_existing(folder)
    for path in beside:
        assert path.name not in (CONFIG, WEIGHTS, INDEX), path
        if not path.exists():
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
            for file in copy_in(path, unfinished):
                fsync(file)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    fsync(path)


@dataclass(frozen=True)
class ModelFolder(Checkpoint):
    """A Hugging Face folder, opened as a checkpoint without progress: its tensors are read when asked for, as float32.

    ``config``: config.json. ``dtype``: the widest its tensors are stored in.
    """

    config: Mapping[str, Any]
    adapter: Adapter
    dtype: torch.dtype


def read_folder(folder: Path) -> ModelFolder:
    """Opens the Hugging Face folder ``folder``. Every tensor is looked up before any is read. Raises ConfigError for a
    model growkit does not know, CheckpointError for files that are missing, damaged, or not that model's."""
    manifest, config = source.manifest(folder), read_config(folder)
    adapter = source.adapter_of(config)
    stored = _stored(folder)
    rules = adapter.rules(manifest.model)
    names = _names(folder, adapter, manifest.model, rules, stored)
    found = {stored.dtype(name) for name in names.values()}
    for name in names.values():
        if stored.dtype(name) not in DTYPES:
            problem = f"holds {name} as {stored.dtype(name)}; growkit reads {', '.join(DTYPES)}"
            raise _wrong(stored.file(name), problem)
    dtype = DTYPES[found.pop()] if len(found) == 1 else torch.float32
    params = LaidOut(rules, _Wide(stored, names), ours=True)
    state = TrainState(manifest.model, Ordered(list(param_specs(manifest.model)), params))
    return ModelFolder(folder, manifest, state, config, adapter, dtype)


def write_grown(
    folder: ModelFolder, output: Path, grown: TrainState, event: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Writes ``grown``, made of ``folder``, as another folder of its family: what config.json said besides the model's
    description goes on, the tokenizer's files are copied, and growkit.json keeps the lineage with ``event``. Raises
    ConfigError for what the family cannot say, CheckpointError as ``write_folder``."""
    adapter = folder.adapter
    fields, tensors = adapter.to_hf(grown.config, grown.params)
    lineage = dataclasses.replace(folder.manifest, lineage=(*folder.manifest.lineage, dict(event)))
    with tempfile.TemporaryDirectory() as made:
        history = Path(made) / source.LINEAGE
        history.write_text(source.lineage_file(lineage), encoding="utf-8")
        config = said_besides(folder.config, adapter) | fields | {"dtype": str(dtype).removeprefix("torch.")}
        write_folder(output, config, Cast(tensors, dtype), beside=[*source.travelling(folder.folder), history])


def said_besides(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """What a config.json of the adapter's family says besides the model's description."""
    dropped = (*adapter.older, "dtype", "torch_dtype")
    return {key: value for key, value in config.items() if key not in dropped}


def rounding(grown: TrainState, dtype: torch.dtype, probe: Tensor) -> float:
    """How far the logits on ``probe`` (rows, context + 1) move, relative and in float64, when weights round to
    ``dtype``."""
    tokens = probe[:, :-1]
    whole = stream_logits(grown.config, grown.params, tokens, torch.float64)
    rounded = stream_logits(grown.config, Cast(grown.params, dtype), tokens, torch.float64)
    return float((rounded - whole).norm() / whole.norm())


def _stored(folder: Path) -> StoredTensors:
    """The tensors of model.safetensors, or of the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return StoredTensors(folder, [WEIGHTS])
    index = folder / INDEX
    if not index.is_file():
        mend = "growkit reads safetensors alone: load the model with transformers and save_pretrained it"
        raise CheckpointError("damaged", f"has neither {WEIGHTS} nor {INDEX}", key=str(folder), mend=mend)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        mend = "copy or fetch it again"
        raise CheckpointError("damaged", f"is not an index of shards ({error})", key=str(index), mend=mend) from error
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise _wrong(index, f"names the shard {file}, which is not in the folder")
    stored = StoredTensors(folder, files)
    for name, file in weight_map.items():
        if name not in stored or stored.file(name).name != file:
            raise _wrong(index, f"says that {name} is in {file}, and it is not")
    return stored


def _names(
    folder: Path, adapter: Adapter, model: ModelConfig, rules: list[Rule], stored: StoredTensors
) -> dict[str, str]:
    """The adapter's name of each tensor → its name in the files, all of the shapes of ``model``. Raises
    CheckpointError for one that is missing, of another shape, or unknown."""
    names = {adapter.aliases.get(name, name): name for name in stored}
    ours = {name: torch.empty(spec.shape, device="meta") for name, spec in param_specs(model).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in LaidOut(rules, ours, ours=False).items()}
    for name, shape in expected.items():
        if name not in names:
            raise _wrong(folder, f"lacks the tensor {name}, which its {CONFIG} asks for")
        found = tuple(stored.shape(names[name]))
        if found != shape:
            raise _wrong(stored.file(names[name]), f"holds {name} of shape {found}, and its {CONFIG} asks for {shape}")
    for name in names.keys() - expected.keys():
        file = stored.file(names[name])
        if model.tied_head and name in TIED_HEADS:
            table = next(rule.theirs[0] for rule in rules if rule.ours == ("embedding.weight",))
            if not torch.equal(stored[names[name]], stored[names[table]]):
                raise _wrong(file, f"holds {name} of its own, where {CONFIG} says that it is tied to {table}")
        elif not any(re.search(buffer, name) for buffer in adapter.buffers):
            raise _wrong(file, f"holds {name}, which a {adapter.architecture} of its {CONFIG} does not have")
    return {name: names[name] for name in expected}


def _wrong(path: Path, problem: str) -> CheckpointError:
    mend = "use the files as they were published, config.json and weights of one model"
    return CheckpointError("wrong-tensors", problem, key=str(path), mend=mend)


@dataclass(frozen=True)
class Cast(Mapping[str, Tensor]):
    """``tensors`` in ``dtype``, each made when it is asked for."""

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class _Wide(Mapping[str, Tensor]):
    """``stored`` under other names, as float32."""

    stored: Mapping[str, Tensor]
    names: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[self.names[name]].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
