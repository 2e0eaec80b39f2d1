"""A safetensors file written as a stream: one tensor at a time, none of them known beforehand.

The format wants the header in front of the data, and it says shapes and places: room is left for it, and what it does
not need is filled with the spaces that the format allows there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

ENTRY_BYTES = 256  # of one tensor in the header beside its name: a dtype, two offsets and up to eight sizes
DTYPES = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)


class ShardWriter:
    """Writes ``path``; ``names``: of the tensors that may come. Raises OSError."""

    def __init__(self, path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        self.path, self.bytes = path, 0
        self._sizes: dict[str, int] = {}
        self._header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        room = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
        self._room = -(-room // 8) * 8  # data begin where eight divides
        self._file = open(path, "xb")  # what is there may be linked, and be a file of another checkpoint as well
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a contiguous ``tensor`` of the CPU."""
        self._sizes[name] = tensor.nbytes
        end = self.bytes + tensor.nbytes
        shape = list(tensor.shape)
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [self.bytes, end]}
        if tensor.nbytes:
            self._file.write(tensor.flatten().view(torch.uint8).numpy().data)
        self.bytes = end

    def close(self) -> dict[str, int]:
        """Completes the file; returns name → bytes."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(text) <= self._room, (len(text), self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.close()
        return self._sizes

    def abandon(self) -> None:
        """Closes the file if it is open still; it is not complete then."""
        self._file.close()
