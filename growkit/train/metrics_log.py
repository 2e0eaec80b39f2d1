"""The local record of a run: one JSON object a line, rewound to a checkpoint when the run resumes from it.

Kinds of line: ``step``, ``validation``, ``growth``, ``stage``, ``ngram``. All carry step, tokens and flops.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class MetricsLog:
    """Appends to ``path``, flushed line by line. ``listeners`` see every record as it is written."""

    def __init__(self, path: Path, *, rewind_to: int | None = None) -> None:
        self._file = open(path, "ab")
        if rewind_to is not None and self._file.seekable():
            self._file.truncate(rewind_to)
            self._file.seek(0, os.SEEK_END)
        self.listeners: list[Callable[[Record], None]] = []

    def write(self, record: Record) -> None:
        """Writes and passes on one record; numbers that are not finite become null."""
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        for listener in self.listeners:
            listener(record)

    def sync(self) -> int:
        """Forces the log to disk; returns its length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> Iterator[Record]:
    """The records of a log; a last line that was cut off by a crash is left out."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
