"""Checkpoints of models split over processes: torch.distributed.checkpoint with its safetensors writer.

Its default format pickles metadata and is not used.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from growkit import faults
from growkit.checkpoint import store
from growkit.checkpoint.hashing import file_hash
from growkit.checkpoint.manifest import Manifest
from growkit.growth.state import TrainState

GROUPS = ("params", "moments")


def write(folder: Path, state: TrainState, manifest: Manifest) -> None:
    """Every process writes its shards; the first one seals and renames. Every process must call this."""
    first = dist.get_rank() == 0
    beside = store.beside(folder)
    with store.writing(folder) if first else nullcontext():
        dist.barrier()  # the folder is there
        for group, tensors in zip(GROUPS, (state.params, store.flat_moments(state.moments)), strict=True):
            if tensors:
                writer = HuggingFaceStorageWriter(str(beside / group), save_distributed=True)
                save(dict(tensors), storage_writer=writer)
                faults.point("mid_shard")
        dist.barrier()  # all shards are there
        if first:
            files = sorted(str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file())
            for name in files:
                store.fsync(beside / name)
            for group in GROUPS:
                if (beside / group).is_dir():
                    store.fsync(beside / group)
            steps = {name: moments.step for name, moments in state.moments.items()}
            sealed = dataclasses.replace(manifest, layout="sharded", adam_steps=steps, born=dict(state.born))
            store.seal(beside, sealed, {name: file_hash(beside / name) for name in files})
    dist.barrier()  # the checkpoint is complete before anyone trains on


def tensors(folder: Path, manifest: Manifest) -> tuple[Sharded, Sharded]:
    """(params, flat moments) as mappings that read one whole tensor at a time, in one process."""
    return Sharded(folder / "params"), Sharded(folder / "moments")


class Sharded(store.TensorTable):
    """Tensors of one group; a read gathers the shards of that tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        has_files = folder.is_dir() and any(folder.glob("*.safetensors"))
        found = self._reader().read_metadata().state_dict_metadata if has_files else {}
        self._meta = {name: meta for name, meta in found.items() if isinstance(meta, TensorStorageMetadata)}

    def _reader(self) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(str(self._folder))

    def __getitem__(self, name: str) -> Tensor:
        meta = self._meta[name]
        into = {name: torch.empty(meta.size, dtype=meta.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
            load(into, storage_reader=self._reader(), no_dist=True)
        return into[name]

    def shape(self, name: str) -> list[int]:
        return list(self._meta[name].size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta)

    def __len__(self) -> int:
        return len(self._meta)
