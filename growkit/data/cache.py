"""Prepared corpora on disk, each in a folder named by a hash of what it was made of.

An entry is written into a folder beside its final name, every file is fsynced, the folder renamed: it is complete or
not there. What was not completed stays beside it and is gone on with. One process at a time writes an entry; another
one that needs it waits. Entries of another format lie in a folder of their own and are left alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from growkit.errors import DataError

log = logging.getLogger(__name__)
FORMAT = 1
NAME = "entry.json"
WRITING = ".writing-"


def folder_of(cache: str | None) -> Path:
    """Where entries of this format lie. ``cache``: as of ``data.cache``."""
    if cache is not None:
        root = Path(cache).expanduser()
    else:
        named = os.environ.get("XDG_CACHE_HOME")
        root = Path(named or "~/.cache").expanduser() / "growkit"
    return root / f"corpora-{FORMAT}"


def key_of(content: object) -> str:
    """The name of what is made of ``content``, which is JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def writing(final: Path) -> Iterator[Path | None]:
    """A folder to write the entry ``final`` into, with what an earlier process left there; it gets its name at the
    end. None: the entry is there, perhaps since another process that this one waited for has written it. Raises
    DataError where the disk will not."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.parent / f"{final.name}.lock", "a+") as lock:
            _take(lock, final)
            if final.is_dir():
                yield None
                return
            beside = final.parent / f"{WRITING}{final.name}"
            beside.mkdir(exist_ok=True)
            try:
                yield beside
            except DataError:  # what the source gives is wrong: nothing of it is worth keeping
                shutil.rmtree(beside)
                raise
            for file in beside.iterdir():
                fsync(file)
            fsync(beside)
            os.rename(beside, final)
            fsync(final.parent)
    except OSError as error:
        mend = "free space there, or name another folder with data.cache; what is prepared so far is kept"
        raise DataError("cannot-write", f"cannot be written ({error})", key=str(final), mend=mend) from error


def _take(lock: Any, final: Path) -> None:
    """The lock of an entry, until the file is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        log.warning("data: waiting for process %s, which is preparing this corpus in %s", owner, final)
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def seal(folder: Path, body: Mapping[str, Any]) -> None:
    """Completes an entry: ``body`` and the size and hash of every file there."""
    files = {
        file.name: {"bytes": file.stat().st_size, "xxh3_128": hash_of(file)}
        for file in sorted(folder.iterdir())
        if file.name != NAME
    }
    (folder / NAME).write_bytes(_sealed({**body, "format": FORMAT, "files": files}))


def read(folder: Path) -> dict[str, Any]:
    """What an entry says of itself, after a look at every byte of it. Raises DataError naming the file that is not
    what was written."""
    path = folder / NAME
    try:
        data = path.read_bytes()
        body: dict[str, Any] = json.loads(data)["body"]
        if _sealed(body) != data:
            raise _damaged(path, "is not what was written")
        for name, wanted in body["files"].items():
            path = folder / name
            size = path.stat().st_size
            if size != wanted["bytes"]:
                raise _damaged(path, f"has {size} bytes, {wanted['bytes']} were written")
            if hash_of(path) != wanted["xxh3_128"]:
                raise _damaged(path, "does not match its hash")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"cannot be read ({type(error).__name__}: {error})") from error
    return body


def mapped(path: Path, dtype: Any) -> NDArray[Any]:
    """The array in a file, read from the disk as it is used."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)  # which cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def hash_of(path: Path, start: int = 0, stop: int | None = None) -> str:
    """Of the bytes of a file from ``start`` to ``stop``, or its end."""
    return xxhash.xxh3_128(mapped(path, np.uint8)[start:stop].data).hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sealed(body: Mapping[str, Any]) -> bytes:
    """JSON with its own hash."""
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": json.loads(text)}).encode()


def _damaged(path: Path, problem: str) -> DataError:
    mend = f"delete the folder {path.parent}: it is made again from the source"
    return DataError("cache-damaged", problem, key=str(path), mend=mend)
