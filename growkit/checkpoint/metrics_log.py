"""The local record of a run: one JSON object a line, rewound to a checkpoint when the run resumes from it.

Kinds of line: ``step``, ``validation``, ``blocks``, ``growth``, ``stage``, ``trial``, ``decision``, ``ngram``,
``sample``. All carry step, tokens and flops.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from growkit.errors import CheckpointError, cannot_write

Record = dict[str, Any]
log = logging.getLogger(__name__)


class MetricsLog:
    """Appends to ``path``, flushed line by line. ``listeners`` see every record as it is written."""

    def __init__(self, path: Path, *, rewind_to: int | None = None) -> None:
        self._path = path
        try:
            self._file = open(path, "ab")
            if rewind_to is not None and self._file.seekable():
                if self._file.seek(0, os.SEEK_END) < rewind_to:  # truncating would fill the gap with zero bytes
                    log.warning("%s lacks records that were there when the checkpoint was written", path)
                else:
                    self._file.truncate(rewind_to)
                self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise cannot_write(path, error) from error
        self.listeners: list[Callable[[Record], None]] = []

    def write(self, record: Record) -> None:
        """Writes and passes on one record."""
        try:
            self._file.write(encoded(record))
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        for listener in self.listeners:
            listener(record)

    def sync(self) -> int:
        """Forces the log to disk; returns its length in bytes."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from error
        return self._file.tell()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been reported by write
            self._file.close()


def encoded(record: Record) -> bytes:
    """A record as a line of a log; numbers that are not finite become null."""
    return json.dumps(without_nan(record), allow_nan=False).encode() + b"\n"


def read_log(path: Path) -> Iterator[Record]:
    """The records of a log, which may still be written: nothing if there is none yet, and a last line that is not whole
    is left out. Raises CheckpointError for a line in between that is not a record, or a log that cannot be read."""
    return LogReader(path).new()


class LogReader:
    """Reads a log that may still be written: ``new()`` gives the records since the last call, as ``read_log`` does."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._lines = path, 0, 0

    def new(self) -> Iterator[Record]:
        try:
            file = open(self._path, "rb")
        except FileNotFoundError:
            return
        except OSError as error:
            mend = "check its permissions and its disk"
            raise CheckpointError("unreadable", f"cannot be read ({error})", key=str(self._path), mend=mend) from error
        with file:
            file.seek(self._offset)
            for line in file:
                if line.endswith(b"\n"):
                    self._offset, self._lines = self._offset + len(line), self._lines + 1
                    yield _record(line, self._path, self._lines)


def _record(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not {"kind", "step", "tokens", "flops"} <= record.keys():
            raise ValueError("it lacks kind, step, tokens or flops")
    except ValueError as error:
        mend = "delete that line, or restore the file; the checkpoints do not need it"
        problem = f"line {number} is not a record ({error})"
        raise CheckpointError("damaged-log", problem, key=str(path), mend=mend) from error
    return record


def without_nan(value: Any) -> Any:
    """``value``, None in the place of every number that is not finite: what JSON can say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value
