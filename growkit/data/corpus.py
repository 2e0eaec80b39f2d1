"""A corpus: tokens to train on, tokens to validate on, and a hash that says which tokens.

Tokens are bytes (vocabulary 256), or ids of a tokenizer. Documents are joined by its end (of bytes, ``END``); the
validation split is cut by whole groups of documents (packages, files, rows), never through one, unless the corpus is a
single document. Bytes decide what is cut, so that every tokenizer has the same text on each side.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from growkit.config.recipe import BYTES, DataConfig
from growkit.data.synthetic.tasks import is_task
from growkit.data.tokenizer import END, Ends, Ids, Tokenizer, load_tokenizer
from growkit.errors import DataError
from growkit.registry import Registry

log = logging.getLogger(__name__)
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
    """``train`` and ``validation``: ids in the smallest unsigned type. ``sha256``: of both, in order.
    ``train_text`` and ``validation_text``: their bytes, documents joined by ``END``; ``text_sha256``: of those.
    ``validation_ends``: the byte of ``validation_text`` at which each token ends; None where tokens are bytes."""

    name: str
    tokenizer: Tokenizer
    train: Ids
    validation: Ids
    sha256: str
    train_text: NDArray[np.uint8]
    validation_text: NDArray[np.uint8]
    text_sha256: str
    validation_ends: Ends | None
    documents: int

    @property
    def record(self) -> dict[str, str]:
        """What a checkpoint says of it."""
        tokenizer = self.tokenizer.identity
        return {"name": self.name, "sha256": self.sha256, "text_sha256": self.text_sha256, "tokenizer": tokenizer}

    @property
    def bytes_per_token(self) -> float:
        """Of the training split, on average."""
        return len(self.train_text) / len(self.train)

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

    def require_same(self, record: Mapping[str, Any]) -> None:
        """Raises DataError when these are not the tokens that a run was trained on, as its ``record`` says."""
        self.tokenizer.require_same(record.get("tokenizer", BYTES))  # which records before there were others lack
        if record["sha256"] != self.sha256:
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


def load_corpus(data: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, splits, tokenises and hashes ``data.source``; ``tokenizer``: that of ``data``, if it is loaded already.
    Raises DataError."""
    assert 0 < data.validation_fraction <= 0.5, "the schedule has checked it"
    tokenizer = tokenizer or load_tokenizer(data)
    documents = _documents(data)
    total = sum(len(doc.text) for doc in documents)
    parts = _split(documents, round(total * data.validation_fraction))
    texts = [END.join(part) for part in parts]
    train, _ = tokenizer.encode_documents(parts[0])
    validation, ends = tokenizer.encode_documents(parts[1], ends=True)
    if not tokenizer.restores(parts[1]):
        log.warning(
            "data.tokenizer %s does not give its text back: what it drops is not predicted, so that bits per byte look "
            "better than they are",
            tokenizer.name,
        )
    return Corpus(
        data.source,
        tokenizer,
        train,
        validation,
        hashlib.sha256(train.tobytes() + b"|" + validation.tobytes()).hexdigest(),
        np.frombuffer(texts[0], dtype=np.uint8),
        np.frombuffer(texts[1], dtype=np.uint8),
        hashlib.sha256(texts[0] + b"|" + texts[1]).hexdigest(),
        ends,
        len(documents),
    )


def whole_text(data: DataConfig, tokenizer: Tokenizer) -> tuple[Ids, Ends | None]:
    """(ids, ends) of all of ``data.source``, nothing set aside, as ``encode_documents`` gives them. Raises
    DataError."""
    return tokenizer.encode_documents([doc.text for doc in _documents(data)], ends=True)


def _documents(data: DataConfig) -> list[Document]:
    documents = [doc for doc in SOURCES.get(source_kind(data.source), key="data.source")(data) if doc.text]
    if not documents:
        mend = "name a file or folder with text" + (f" matching {data.pattern!r}" if data.pattern != "**/*" else "")
        raise DataError("corpus-empty", "has no text", key="data.source", value=data.source, mend=mend)
    return documents


def source_kind(source: str) -> str:
    """stdlib | path | hub. Raises DataError for a path where nothing is, and for what is no text."""
    if is_task(source):
        mend = "name a file, a folder or hf:NAME"
        raise DataError("not-text", "is a synthetic task, not a text", key="data.source", value=source, mend=mend)
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


def _split(documents: list[Document], wanted: int) -> tuple[list[bytes], list[bytes]]:
    """(documents to train on, to validate on): whole groups in the order of their names' hashes until ``wanted`` bytes
    are set aside for validation.

    The order is a hash's so that it is the same everywhere and unrelated to the content; a group that alone would
    overshoot by half is passed over.
    """
    if len({doc.group for doc in documents}) == 1:
        return _cut([doc.text for doc in documents], wanted)
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
    train, validation = ([doc.text for doc in documents if (doc.group in chosen) == side] for side in (False, True))
    return train, validation


def _cut(texts: list[bytes], wanted: int) -> tuple[list[bytes], list[bytes]]:
    """``texts``, joined by ``END``, cut ``wanted`` bytes before the end: what is left of each on either side."""
    after = list(texts)
    before: list[bytes] = []
    left = sum(len(text) + len(END) for text in texts) - len(END) - wanted
    while left > len(after[0]):
        left -= len(after[0]) + len(END)
        before.append(after.pop(0))
    return [*before, after[0][:left]], [after[0][left:], *after[1:]]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
