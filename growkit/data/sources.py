"""Sources: what gives documents, one after the other, and says beforehand which text it is.

A file is a document, unless its name says that it holds rows (JSON lines, Parquet, Arrow; FASTA and WAV, signals.py):
then each row is one. What a source is known by is the content of its files, never where they lie or when they were
written.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import xxhash

from growkit.config.recipe import STDLIB, DataConfig
from growkit.data.document import Document
from growkit.data.signals import fasta, wav
from growkit.data.synthetic.tasks import is_task
from growkit.errors import DataError
from growkit.registry import Registry

STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
)
_HUB_NAME = re.compile(r"^(hf:)?[\w.-]+(/[\w.-]+)?$")
_PIECE = 1 << 20  # bytes of a file in memory together, to be hashed
_ROWS = 1024  # rows of a table in memory together


class Source(Protocol):
    def identity(self) -> object:
        """What decides its text, as JSON: equal where the text is. Raises DataError."""
        ...

    def __iter__(self) -> Iterator[Document]:
        """Its documents, in an order of their own, read as they are asked for. Raises DataError."""
        ...


SOURCES: Registry[Callable[[DataConfig], Source]] = Registry("data source")


def source_kind(source: str) -> str:
    """stdlib | path | hub. Raises DataError for a path where nothing is, and for what is no text."""
    if is_task(source):
        mend = "name a file, a folder or hf:NAME"
        raise DataError("not-text", "is a synthetic task, not a text", key="data.source", value=source, mend=mend)
    if source == STDLIB:
        return "stdlib"
    if source and os.path.exists(os.path.expanduser(source)):
        return "path"
    if source.startswith("hf:") or (_HUB_NAME.match(source) and not Path(source).suffix):
        return "hub"
    mend = "name an existing file or folder, 'stdlib', or hf:NAME, a Hugging Face data set"
    raise DataError("corpus-missing", "does not exist", key="data.source", value=source, mend=mend)


@dataclass(frozen=True)
class File:
    """``group``: of its document; of a row, followed by the row's number."""

    path: Path
    group: str


class Files:
    """Files, each read as its name says. A file that changes between ``identity`` and the end of its reading is
    refused."""

    def __init__(self, files: Sequence[File], text_field: str) -> None:
        self.files, self.text_field = files, text_field
        self._seen: dict[Path, tuple[int, ...]] = {}

    def identity(self) -> list[object]:
        known: list[object] = []
        for file in self.files:
            read = _reader(file.path)
            kind = "text" if read is None else [read.__name__, self.text_field]
            with _readable(file.path), open(file.path, "rb") as content:
                self._seen[file.path] = _stamp(content.fileno())
                known.append([file.group, kind, _hash_of(content)])
        return known

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            read = _reader(file.path)
            with _readable(file.path), open(file.path, "rb") as content:
                if read is None:
                    yield Document(file.group, content.read())
                else:
                    prefix = f"{file.group}:" if file.group else ""
                    for number, text in read(file.path, self.text_field):
                        yield Document(f"{prefix}{number}", text)
                if self._seen.get(file.path) not in (None, _stamp(content.fileno())):
                    mend = "start again when nothing writes there any more"
                    raise DataError(
                        "corpus-changed",
                        "changed while it was read",
                        key="data.source",
                        value=str(file.path),
                        mend=mend,
                    )


@SOURCES.register("stdlib")
def standard_library(data: DataConfig) -> Files:
    """The Python standard library's own source text on this machine: real, offline, about 11 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    wanted = None if data.pattern == DataConfig.pattern else set(_matching(root, data.pattern))
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(set(names) - STDLIB_LEFT_OUT)
        for file in sorted(files):
            path = Path(folder, file)
            if file.endswith(".py") and (wanted is None or path in wanted):
                found.append(File(path, path.relative_to(root).parts[0].removesuffix(".py")))
    return Files(found, "")


@SOURCES.register("path")
def file_or_folder(data: DataConfig) -> Files:
    """A file, or the files of a folder whose path has no part that begins with a dot."""
    assert data.source is not None
    root = Path(data.source).expanduser()
    if root.is_file():
        return Files([File(root, "")], data.text_field)
    found = []
    for path in _matching(root, data.pattern):
        relative = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found.append(File(path, str(relative)))
    return Files(found, data.text_field)


def _matching(root: Path, pattern: str) -> list[Path]:
    """What in the folder ``root`` has a name that fits. Raises DataError."""
    try:
        return sorted(root.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        mend = "use a relative pattern such as '**/*' or '*.txt'"
        problem = f"is not a pattern of file names ({error})"
        raise DataError("bad-pattern", problem, key="data.pattern", value=pattern, mend=mend) from error


@SOURCES.register("hub")
class HuggingFace:
    """A data set that the ``datasets`` library knows: a hub name, or a local folder written as ``hf:folder``.
    ``data.streaming``: row by row, nothing of it is kept in that library's own cache. Known by the revision or the
    content of its files."""

    def __init__(self, data: DataConfig) -> None:
        import datasets

        assert data.source is not None
        self.data = data
        with _available(data.source):
            self._builder = datasets.load_dataset_builder(data.source.removeprefix("hf:"))

    def identity(self) -> dict[str, object]:
        files: dict[str, object] = {}
        for split, listed in (self._builder.config.data_files or {}).items():
            if all(os.path.isfile(file) for file in listed):
                files[str(split)] = Files([File(Path(file), "") for file in listed], "").identity()
            else:  # a revision or an ETag of each, and its place in the data set
                files[str(split)] = [list(map(str, listed)), [list(origin) for origin in listed.origin_metadata]]
        names = [self._builder.name, self._builder.config.name, self.data.split, self.data.text_field]
        return {"names": names, "files": files}

    def __iter__(self) -> Iterator[Document]:
        field, split = self.data.text_field, self.data.split
        with _available(self.data.source):
            if self.data.streaming:
                rows = self._builder.as_streaming_dataset(split=split)
            else:
                self._builder.download_and_prepare()
                rows = self._builder.as_dataset(split=split)
            columns = rows.column_names
            if columns is not None:
                _require_column(field, columns)
                rows = rows.select_columns([field])
            tables = iter(rows.with_format("arrow").iter(batch_size=_ROWS))
        done = 0
        while True:
            with _available(self.data.source):
                table = next(tables, None)
            if table is None:
                return
            _require_column(field, table.column_names)
            for number, text in _texts(table[field], field, self.data.source, done):
                yield Document(str(number), text)
            done += len(table)


Rows = Iterator[tuple[int, bytes]]


def _lines(path: Path, field: str) -> Rows:
    """(number of the line from 1 on, text) of JSON lines, also gzipped; a blank line is no row."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                mend = "mend the line, or leave the file out with data.pattern"
                said = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
                raise DataError(
                    "broken-line", f"is not JSON ({said})", key="data.source", value=where, mend=mend
                ) from error
            if not isinstance(row, dict):
                mend = 'write {"text": "..."} on each line'
                raise DataError(
                    "broken-line", "is not a row of named columns", key="data.source", value=where, mend=mend
                )
            _require_column(field, list(row), where)
            yield number, _encoded(row[field], field, where)


def _parquet(path: Path, field: str) -> Rows:
    """(number of the row from 0 on, text), a batch of rows in memory at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _require_column(field, file.schema_arrow.names, str(path))
        done = 0
        for batch in file.iter_batches(_ROWS, columns=[field]):
            yield from _texts(batch[field], field, str(path), done)
            done += len(batch)


def _arrow(path: Path, field: str) -> Rows:
    """(number of the row from 0 on, text) of an Arrow file or stream, mapped from the disk."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        try:
            reader: Any = pyarrow.ipc.open_file(mapped)
            batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:  # a stream, as the ``datasets`` library keeps it
            mapped.seek(0)
            batches = reader = pyarrow.ipc.open_stream(mapped)
        _require_column(field, reader.schema.names, str(path))
        done = 0
        for batch in batches:
            for first in range(0, len(batch), _ROWS):
                yield from _texts(batch[field][first : first + _ROWS], field, str(path), done + first)
            done += len(batch)


_READERS = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".jsonl.gz": _lines,
    ".ndjson.gz": _lines,
    ".json.gz": _lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    **{f"{suffix}{packed}": fasta for suffix in (".fasta", ".fa", ".fna", ".faa") for packed in ("", ".gz")},
    ".wav": wav,
}


def _reader(path: Path) -> Callable[[Path, str], Rows] | None:
    """What reads the rows of a file; None where the file is text."""
    return next((read for suffix, read in _READERS.items() if path.name.endswith(suffix)), None)


def _require_column(field: str, columns: Sequence[str], where: str | None = None) -> None:
    if field not in columns:
        mend = f"columns{f' of {where}' if where is not None else ''}: {', '.join(columns)}"
        raise DataError("no-text-field", "is not a column", key="data.text_field", value=field, mend=mend)


def _texts(column: Any, field: str, where: str | None, first: int) -> Rows:
    """(number, text) of the values of an Arrow column whose first is row ``first``."""
    for number, text in enumerate(column.to_pylist(), first):
        yield number, _encoded(text, field, f"{where}, row {number}")


def _encoded(text: object, field: str, where: str) -> bytes:
    if not isinstance(text, str):
        mend = "name a column of strings"
        raise DataError("not-text", f"{where} is not text", key="data.text_field", value=field, mend=mend)
    return text.encode(errors="surrogatepass")  # half a pair, which JSON can spell: stray bytes as in any file


def _hash_of(content: BinaryIO) -> str:
    digest = xxhash.xxh3_128(content.read(_PIECE))
    while piece := content.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _stamp(file: int) -> tuple[int, ...]:
    """Changes when the file does."""
    seen = os.fstat(file)
    return seen.st_size, seen.st_mtime_ns, seen.st_ino


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises DataError where a file cannot be read; pyarrow's errors are ValueErrors or OSErrors."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:
        mend = "check its permissions and its disk, or leave it out with data.pattern"
        problem = f"cannot be read ({_first_line(error)})"
        raise DataError("corpus-unreadable", problem, key="data.source", value=str(path), mend=mend) from error


@contextmanager
def _available(source: str | None) -> Iterator[None]:
    """Raises DataError for what the ``datasets`` library raises."""
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, AssertionError) as error:
        raise DataError(
            "dataset-unavailable",
            f"is neither a file or folder here nor a data set that could be loaded ({_first_line(error)})",
            key="data.source",
            value=source,
            mend="check the path, or the data set's name, data.split and the network",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
