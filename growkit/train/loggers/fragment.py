"""Reads what an offline session of wandb left: a ``.wandb`` file, LevelDB's log format around wandb's own records."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

_FILE_HEADER, _BLOCK = 7, 32768
_HEADER = struct.Struct("<IHB")  # checksum, bytes, and whether a record is whole or begins, goes on or ends here
_WHOLE, _LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """The records of ``file`` up to its end, or up to where it was cut."""
    data, at, record = file.read_bytes(), _FILE_HEADER, b""
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:  # a header does not cross a block's end
            at += left
            continue
        _, size, kind = _HEADER.unpack_from(data, at)
        at += _HEADER.size + size
        if at > len(data):
            return
        record += data[at - size : at]
        if kind in (_WHOLE, _LAST):
            yield protocol.Record.FromString(record)  # type: ignore[attr-defined]  # made at import
            record = b""


def is_whole(file: Path) -> bool:
    """Whether the session's end is in ``file``, and so all before it. wandb reports no full disk."""
    return any(record.HasField("exit") for record in records(file))
