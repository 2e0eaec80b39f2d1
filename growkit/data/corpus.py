"""A corpus: bytes to train on, bytes to validate on, and a hash that says which bytes.

Tokens are bytes (vocabulary 256). Documents are joined by ``END``; the validation split is cut by whole groups of
documents (packages, files, rows), never through one, unless the corpus is a single document.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from growkit.config.recipe import DataConfig
from growkit.errors import DataError
from growkit.registry import Registry

END = b"\x00"
VOCAB_SIZE = 256
STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
)
_HUB_NAME = re.compile(r"^(hf:)?[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class Document:
    """``group``: documents of one group are never split between training and validation."""

    group: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """``train`` and ``validation``: uint8 arrays. ``sha256``: of both, in order."""

    name: str
    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    sha256: str
    documents: int

    def require(self, context_length: int) -> None:
        """Raises DataError when a split is too short for one sequence."""
        for split, tokens in (("training", self.train), ("validation", self.validation)):
            if len(tokens) <= context_length:
                raise DataError(
                    "corpus-too-short",
                    f"its {split} split has {len(tokens)} tokens, a sequence needs {context_length + 1}",
                    key="data.source",
                    value=self.name,
                    mend="use more text, a shorter context_length, or another data.validation_fraction",
                )

    def require_same(self, sha256: str) -> None:
        """Raises DataError when these are not the bytes that a run was trained on."""
        if sha256 != self.sha256:
            raise DataError(
                "corpus-changed",
                "is not the text this run was trained on (its hash differs)",
                key="data.source",
                value=self.name,
                mend="restore that text; to go on with another, start a new run",
            )


SOURCES: Registry[Callable[[DataConfig], Iterable[Document]]] = Registry("data source")


@SOURCES.register("stdlib")
def standard_library(_: DataConfig) -> Iterable[Document]:
    """The Python standard library's own source text on this machine: real, offline, about 11 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, names, files in os.walk(root):
        names[:] = sorted(set(names) - STDLIB_LEFT_OUT)
        for file in sorted(files):
            path = Path(folder, file)
            if file.endswith(".py"):
                relative = path.relative_to(root)
                yield Document(relative.parts[0].removesuffix(".py"), path.read_bytes())


@SOURCES.register("path")
def file_or_folder(data: DataConfig) -> Iterable[Document]:
    root = Path(data.source).expanduser()
    if root.is_file():
        yield Document("", _read(root))
        return
    try:
        paths = sorted(root.glob(data.pattern))
    except (ValueError, NotImplementedError) as error:
        mend = "use a relative pattern such as '**/*' or '*.txt'"
        problem = f"is not a pattern of file names ({error})"
        raise DataError("bad-pattern", problem, key="data.pattern", value=data.pattern, mend=mend) from error
    for path in paths:
        relative = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield Document(str(relative), _read(path))


@SOURCES.register("hub")
def hugging_face(data: DataConfig) -> Iterable[Document]:
    """A data set that ``datasets.load_dataset`` knows: a hub name, or a local folder written as ``hf:folder``."""
    import datasets

    name = data.source.removeprefix("hf:")
    try:
        rows = datasets.load_dataset(name, split=data.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, AssertionError) as error:
        raise DataError(
            "dataset-unavailable",
            f"is neither a file or folder here nor a data set that could be loaded ({_first_line(error)})",
            key="data.source",
            value=data.source,
            mend="check the path, or the data set's name, data.split and the network",
        ) from error
    if data.text_field not in rows.column_names:
        mend = f"columns: {', '.join(rows.column_names)}"
        raise DataError("no-text-field", "is not a column", key="data.text_field", value=data.text_field, mend=mend)
    for i, row in enumerate(rows):
        text = row[data.text_field]
        if not isinstance(text, str):
            mend = "name a column of strings"
            raise DataError("not-text", f"row {i} is not text", key="data.text_field", value=data.text_field, mend=mend)
        yield Document(str(i), text.encode())


def load_corpus(data: DataConfig) -> Corpus:
    """Reads, splits and hashes ``data.source``. Raises DataError."""
    assert 0 < data.validation_fraction <= 0.5, "the schedule has checked it"
    documents = _documents(data)
    total = sum(len(doc.text) for doc in documents)
    train, validation = _split(documents, round(total * data.validation_fraction))
    digest = hashlib.sha256(train + b"|" + validation).hexdigest()
    return Corpus(
        data.source,
        np.frombuffer(train, dtype=np.uint8),
        np.frombuffer(validation, dtype=np.uint8),
        digest,
        len(documents),
    )


def whole_text(data: DataConfig) -> NDArray[np.uint8]:
    """All of ``data.source``, nothing set aside. Raises DataError."""
    return np.frombuffer(END.join(doc.text for doc in _documents(data)), dtype=np.uint8)


def _documents(data: DataConfig) -> list[Document]:
    documents = [doc for doc in SOURCES.get(source_kind(data.source), key="data.source")(data) if doc.text]
    if not documents:
        mend = "name a file or folder with text" + (f" matching {data.pattern!r}" if data.pattern != "**/*" else "")
        raise DataError("corpus-empty", "has no text", key="data.source", value=data.source, mend=mend)
    return documents


def source_kind(source: str) -> str:
    """stdlib | path | hub. Raises DataError for a path where nothing is."""
    if source == "stdlib":
        return "stdlib"
    if source and os.path.exists(os.path.expanduser(source)):
        return "path"
    if source.startswith("hf:") or (_HUB_NAME.match(source) and not Path(source).suffix):
        return "hub"
    mend = "name an existing file or folder, 'stdlib', or hf:NAME, a Hugging Face data set"
    raise DataError("corpus-missing", "does not exist", key="data.source", value=source, mend=mend)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        mend = "check its permissions and its disk, or leave it out with data.pattern"
        problem = f"cannot be read ({error})"
        raise DataError("corpus-unreadable", problem, key="data.source", value=str(path), mend=mend) from error


def _split(documents: list[Document], wanted: int) -> tuple[bytes, bytes]:
    """Whole groups in the order of their names' hashes until ``wanted`` bytes are set aside for validation.

    The order is a hash's so that it is the same everywhere and unrelated to the content; a group that alone would
    overshoot by half is passed over.
    """
    if len({doc.group for doc in documents}) == 1:
        text = END.join(doc.text for doc in documents)
        return text[: len(text) - wanted], text[len(text) - wanted :]
    sizes: dict[str, int] = {}
    for doc in documents:
        sizes[doc.group] = sizes.get(doc.group, 0) + len(doc.text)
    chosen: set[str] = set()
    taken = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if taken < wanted and taken + sizes[group] <= max(1.5 * wanted, 1):
            chosen.add(group)
            taken += sizes[group]
    if not chosen:  # a few large groups: the smallest one
        chosen = {min(sizes, key=lambda name: (sizes[name], name))}
    parts = [[doc.text for doc in documents if (doc.group in chosen) == side] for side in (False, True)]
    return END.join(parts[0]), END.join(parts[1])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
