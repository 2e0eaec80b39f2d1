"""From documents to an entry of the cache: read, split, tokenise, each document once.

First the documents are copied into one file; then those of each side are tokenised, in shards. What a line of a side's
journal stands for is not made again when the preparation was interrupted, if it is found as it was written.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from growkit import faults
from growkit.config.recipe import BYTES
from growkit.data import cache
from growkit.data.document import Document
from growkit.data.reading import Observe
from growkit.data.screen import ScreenReport
from growkit.data.split import Spans, digest_of, split
from growkit.data.tokenizer import END, Tokenizer, groups_of
from growkit.errors import DataError

SHARD_BYTES = 1 << 26  # of text behind a line of the journal: what an interruption costs
TEXT_BYTES = 1 << 26  # of the training text that is kept beside ids, and that an n-gram model counts
SIDES = ("train", "validation")
_PIECE = 1 << 20  # bytes that are looked at together
_FIELDS = ("sizes", "digests", "text", "names")


class Copied(NamedTuple):
    """The documents as they lie in an unfinished entry. ``sizes``: bytes of each, ``digests`` and ``names``: of their
    groups, ``text``: all of it, nothing between them."""

    sizes: NDArray[np.int64]
    digests: NDArray[np.uint64]
    text: NDArray[np.uint8]
    names: Path
    screened: Mapping[str, Any] | None


def prepare(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    fraction: float,
    observe: Observe,
    report: ScreenReport | None = None,
) -> None:
    """Writes an entry into ``folder``, or goes on with what is there. ``report``: of what ``documents`` leaves out,
    filled as they are read. Raises DataError when ``documents`` are none."""
    copied = _copied(folder) or _copy(folder, documents, observe, report)
    sides = dict(zip(SIDES, split(copied.sizes, copied.digests, partial(_names, copied.names), fraction), strict=True))
    done, total = 0, len(copied.text)
    with ThreadPoolExecutor(1) as beside:  # what needs no ids is made while they are
        text_sha256 = beside.submit(_keep_text, folder, copied.text, sides) if tokenizer.identity != BYTES else None
        first = list(_first(_texts(copied.text, sides["validation"]), _PIECE))
        restores = beside.submit(tokenizer.restores, first)
        for side, spans in sides.items():
            _tokenise(folder, side, copied.text, spans, tokenizer, partial(_further, observe, done, total))
            done += _size(spans)
        sha256 = _sha256(*(_pieces(folder / f"{side}.ids") for side in SIDES))
    body = {
        "sha256": sha256,
        "text_sha256": sha256 if text_sha256 is None else text_sha256.result(),
        "documents": len(copied.sizes),
        "screened": copied.screened,
        "train_bytes": _size(sides["train"]) + (len(sides["train"]) - 1) * len(END),
        "restores": restores.result(),
    }
    for pattern in ("documents.*", "*.counts", "*.journal"):
        for file in folder.glob(pattern):
            file.unlink()
    cache.seal(folder, body)


# Reading.


def _copy(folder: Path, documents: Iterable[Document], observe: Observe, report: ScreenReport | None) -> Copied:
    for file in folder.iterdir():  # of an earlier reading, and what was made of it
        file.unlink()
    sizes, digests, done, seen = array("q"), bytearray(), 0, 0
    with open(folder / "documents.text", "wb") as text, open(folder / "documents.names", "w") as names:
        for document in documents:
            text.write(document.text)
            names.write(json.dumps(document.group) + "\n")
            sizes.append(len(document.text))
            digests += digest_of(document.group)
            done += len(document.text)
            if done - seen >= _PIECE:
                observe("read", done, 0)
                seen = done
    if not done:
        raise DataError("corpus-empty", "has no text", key="data.source")
    (folder / "documents.sizes").write_bytes(sizes.tobytes())
    (folder / "documents.digests").write_bytes(digests)
    hashes = {field: cache.hash_of(folder / f"documents.{field}") for field in _FIELDS}
    said = {"hashes": hashes, "screened": report.to_json() if report is not None else None}
    (folder / "documents.json").write_text(json.dumps(said))  # last: without it the others do not count
    copied = _copied(folder)
    assert copied is not None
    return copied


def _copied(folder: Path) -> Copied | None:
    """The documents, if all of them are there as they were written."""
    files = {field: folder / f"documents.{field}" for field in _FIELDS}
    try:
        said = json.loads((folder / "documents.json").read_bytes())
        if said["hashes"] != {field: cache.hash_of(file) for field, file in files.items()}:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return Copied(
        cache.mapped(files["sizes"], np.int64),
        cache.mapped(files["digests"], ">u8").reshape(-1, 4).astype(np.uint64),
        cache.mapped(files["text"], np.uint8),
        files["names"],
        said["screened"],
    )


def _names(file: Path) -> Iterator[str]:
    with open(file) as lines:
        yield from map(json.loads, lines)


# Tokenising.


def _further(observe: Observe, before: int, total: int, done: int) -> None:
    observe("tokenise", min(before + done, total), total)


def _tokenise(
    folder: Path, side: str, text: NDArray[np.uint8], spans: Spans, tokenizer: Tokenizer, observe: Callable[[int], None]
) -> None:
    """Writes ``ids`` and ``starts`` of one side, and ``ends`` where they are held out and not bytes."""
    ends = side == "validation" and tokenizer.identity != BYTES
    sizes = spans[:, 1] - spans[:, 0] + len(END)
    with _Shards(folder, side, ("ids", "counts", "ends") if ends else ("ids", "counts")) as shards:
        done = int(sizes[: shards.documents].sum())  # bytes of the joined text, the end behind each document too
        shard = done + SHARD_BYTES
        groups = groups_of(_texts(text, spans[shards.documents :]))
        for encoded in tokenizer.encode_groups(groups, ends=ends):
            last = shards.documents + len(encoded.counts) == len(spans)
            whole = slice(-1) if last else slice(None)  # nothing ends the last document
            shards.write("ids", encoded.ids[whole])
            shards.write("counts", encoded.counts)
            if encoded.ends is not None:
                shards.write("ends", done + encoded.ends[whole])
            done += int(sizes[shards.documents : shards.documents + len(encoded.counts)].sum())
            shards.documents += len(encoded.counts)
            observe(done)
            if last or done >= shard:
                shards.finish()
                shard = done + SHARD_BYTES
                faults.point("mid_preparation")
    ids = (folder / f"{side}.ids").stat().st_size // tokenizer.dtype.itemsize
    counts = cache.mapped(folder / f"{side}.counts", np.int64)
    starts = np.cumsum(counts) - counts
    starts[starts < ids].tofile(folder / f"{side}.starts")  # a last document of which no id is left begins nowhere
    if ends and ids:
        places = np.memmap(folder / f"{side}.ends", dtype=np.int64, mode="r+")
        places[-1] = sizes.sum() - len(END)  # what is passed over at the very end has no next id
        places.flush()


class _Shards:
    """The growing files of one side, one of each of ``kinds``. ``documents``: in them so far."""

    def __init__(self, folder: Path, side: str, kinds: tuple[str, ...]) -> None:
        self._paths = {kind: folder / f"{side}.{kind}" for kind in kinds}
        self._journal = folder / f"{side}.journal"
        self._sizes = dict.fromkeys(kinds, 0)  # of what is finished
        self.documents = 0
        finished = []
        for line in self._journal.read_text().splitlines() if self._journal.exists() else []:
            shard = self._sound(line)
            if shard is None:  # cut short, or what it stands for is not there
                break
            self.documents = shard["documents"]
            self._sizes = {kind: stop for kind, (stop, _) in shard["files"].items()}
            finished.append(line + "\n")
        self._journal.write_text("".join(finished))
        for kind, path in self._paths.items():
            path.touch()
            with open(path, "r+b") as file:
                file.truncate(self._sizes[kind])

    def _sound(self, line: str) -> dict[str, Any] | None:
        """A line of the journal, if the files are as it says."""
        try:
            shard: dict[str, Any] = json.loads(line)
        except ValueError:
            return None
        for kind, (stop, digest) in shard["files"].items():
            path = self._paths[kind]
            if (
                not path.exists()
                or path.stat().st_size < stop
                or cache.hash_of(path, self._sizes[kind], stop) != digest
            ):
                return None
        return shard

    def __enter__(self) -> _Shards:
        self._files = {kind: open(path, "ab") for kind, path in self._paths.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, kind: str, values: NDArray[Any]) -> None:
        self._files[kind].write(values.data)

    def finish(self) -> None:
        """Notes what is written, with its hash: what the disk has lost of it will be seen."""
        files = {}
        for kind, file in self._files.items():
            file.flush()
            stop = file.tell()
            files[kind] = (stop, cache.hash_of(self._paths[kind], self._sizes[kind], stop))
            self._sizes[kind] = stop
        with open(self._journal, "a") as journal:
            journal.write(json.dumps({"documents": self.documents, "files": files}) + "\n")


# The text of spans.


def _keep_text(folder: Path, text: NDArray[np.uint8], sides: Mapping[str, Spans]) -> str:
    """Writes the text that is kept beside ids; returns the hash of all of it."""
    train, validation = (_joined(text, sides[side]) for side in SIDES)
    return _sha256(_written(train, folder / "train.text", TEXT_BYTES), _written(validation, folder / "validation.text"))


def _texts(text: NDArray[np.uint8], spans: Spans) -> Iterator[bytes]:
    return (text[first:stop].tobytes() for first, stop in spans.tolist())


def _joined(text: NDArray[np.uint8], spans: Spans) -> Iterator[bytes]:
    """The documents and what stands between them."""
    for number, document in enumerate(_texts(text, spans)):
        if number:
            yield END
        yield document


def _first(documents: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """As many of ``documents`` as have ``limit`` bytes, or all."""
    for document in documents:
        yield document
        limit -= len(document)
        if limit <= 0:
            return


def _size(spans: Spans) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from iter(lambda: file.read(_PIECE), b"")


def _sha256(train: Iterable[bytes], validation: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in chain(train, (b"|",), validation):
        digest.update(piece)
    return digest.hexdigest()


def _written(pieces: Iterable[bytes], path: Path, limit: int | None = None) -> Iterator[bytes]:
    """``pieces`` as they are; the first ``limit`` bytes of them are written meanwhile."""
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece if limit is None else piece[: limit - file.tell()])
            yield piece
