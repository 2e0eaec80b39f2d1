"""A corpus: tokens to train on, tokens to validate on, and a hash that says which tokens.

Tokens are bytes (vocabulary 256), or ids of a tokenizer. Documents are joined by its end (of bytes, ``END``); the
validation split is cut by whole groups of documents (packages, files, rows), never through one, unless the corpus is a
single document. Bytes decide what is cut, so that every tokenizer has the same text on each side. Each source is
prepared once, into a cache, and mapped from there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from growkit.config.mixture import sources_of
from growkit.config.recipe import BYTES, DataConfig
from growkit.data import cache
from growkit.data.document import Document as Document
from growkit.data.prepare import TEXT_BYTES, prepare
from growkit.data.reading import Observe, Sources
from growkit.data.screen import ScreenReport, screens
from growkit.data.sources import standard_library as standard_library
from growkit.data.tokenizer import END, Ends, Ids, Tokenizer, load_tokenizer
from growkit.errors import DataError

log = logging.getLogger(__name__)
# What does not decide what a prepared source holds, or is in its key in another form. Any other field of data is.
NOT_CONTENT = frozenset(
    {
        "source",
        "mixture",
        "bandit",
        "pattern",
        "split",
        "text_field",
        "streaming",
        "cache",
        "tokenizer",
        "end_token",
        "shuffle",
        "block_tokens",
        "packing",
        "screen",
        "select",
        "workers",
        "prefetch",
    }
)


@dataclass(frozen=True)
class Part:
    """One source. ``weight``: its share of the training tokens, relative to the other parts'. ``train`` and
    ``validation``: ids in the smallest unsigned type, mapped from the disk; ``..._starts``: the token at which each
    document begins, int64, the first 0. ``train_text``: the first bytes of the training text, ``TEXT_BYTES`` at most,
    ``validation_text``: all bytes held out; documents are joined by ``END``. ``validation_ends``: the byte of
    ``validation_text`` at which each token ends; None where tokens are bytes. ``sha256``: of both sides' ids, in order,
    ``text_sha256``: of their bytes. ``train_bytes``: of all the training text. ``screened``: what ``data.screen`` kept
    and dropped, a ``ScreenReport`` as JSON; None where nothing was asked. ``folder``: where it lies."""

    name: str
    weight: float
    train: Ids
    train_starts: NDArray[np.int64]
    validation: Ids
    validation_starts: NDArray[np.int64]
    validation_ends: Ends | None
    train_text: NDArray[np.uint8]
    validation_text: NDArray[np.uint8]
    train_bytes: int
    sha256: str
    text_sha256: str
    documents: int
    screened: dict[str, Any] | None
    folder: Path

    @property
    def bytes_per_token(self) -> float:
        """Of the training split, on average."""
        return self.train_bytes / len(self.train)


@dataclass(frozen=True)
class Corpus:
    """One source or several. What is said of all of them is what one would be that has their documents in order."""

    name: str
    tokenizer: Tokenizer
    parts: tuple[Part, ...]

    @cached_property
    def train(self) -> Ids:
        """Ids of all parts, joined by the tokenizer's end; of several they are in memory."""
        return self._joined([part.train for part in self.parts], self.tokenizer.end)

    @cached_property
    def validation(self) -> Ids:
        return self._joined([part.validation for part in self.parts], self.tokenizer.end)

    @cached_property
    def validation_ends(self) -> Ends | None:
        """The byte of ``validation_text`` at which each token ends; None where tokens are bytes."""
        found: list[Ends] = []
        done = 0
        for part in self.parts:
            if part.validation_ends is None:
                return None
            if found:
                found.append(np.array([done], dtype=np.int64))
            found.append(part.validation_ends + done if done else part.validation_ends)
            done += len(part.validation_text) + len(END)
        return found[0] if len(found) == 1 else np.concatenate(found)

    @cached_property
    def train_text(self) -> NDArray[np.uint8]:
        """The first bytes of the training text, ``TEXT_BYTES`` at most, as many of each part."""
        limit = TEXT_BYTES // len(self.parts)
        return self._joined([part.train_text[:limit] for part in self.parts], END[0])

    @cached_property
    def validation_text(self) -> NDArray[np.uint8]:
        return self._joined([part.validation_text for part in self.parts], END[0])

    @property
    def sha256(self) -> str:
        """Of the ids of both sides of every part, in order."""
        return _hash_of([part.sha256 for part in self.parts])

    @property
    def text_sha256(self) -> str:
        return _hash_of([part.text_sha256 for part in self.parts])

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.parts)

    @property
    def train_bytes(self) -> int:
        return sum(part.train_bytes for part in self.parts)

    @property
    def train_tokens(self) -> int:
        return sum(len(part.train) for part in self.parts)

    @property
    def screened(self) -> dict[str, Any] | None:
        """What ``data.screen`` kept and dropped of all parts; None where nothing was asked."""
        reports = [ScreenReport.from_json(part.screened) for part in self.parts if part.screened is not None]
        return ScreenReport.sum(reports).to_json() if reports else None

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        hashes = {"sha256": self.sha256, "text_sha256": self.text_sha256, "tokenizer": self.tokenizer.identity}
        screened = {} if self.screened is None else {"screened": self.screened}
        return {"name": self.name} | hashes | screened

    @property
    def bytes_per_token(self) -> float:
        """Of what is trained on, on average: each part counts by its weight."""
        if len(self.parts) == 1:
            return self.parts[0].bytes_per_token
        weights = sum(part.weight for part in self.parts)
        return sum(part.weight / weights * part.bytes_per_token for part in self.parts)

    def require(self, context_length: int) -> None:
        """Raises DataError when what is trained on, of any part, or what is held out is too short for one sequence."""
        splits = [(part.name, "training", len(part.train)) for part in self.parts]
        for name, split, tokens in (*splits, (self.name, "validation", len(self.validation))):
            if tokens <= context_length:
                raise DataError(
                    "corpus-too-short",
                    f"its {split} split has {tokens} tokens, a sequence needs {context_length + 1}",
                    key="data.source",
                    value=name,
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

    @staticmethod
    def _joined(arrays: list[NDArray[Any]], end: int) -> NDArray[Any]:
        if len(arrays) == 1:
            return arrays[0]
        between = np.array([end], dtype=arrays[0].dtype)
        return np.concatenate([piece for array in arrays for piece in (between, array)][1:])


def load_corpus(data: DataConfig, tokenizer: Tokenizer | None = None, observe: Observe = lambda *_: None) -> Corpus:
    """The corpus of ``data``, from the cache; what the cache lacks is prepared first, ``observe`` is told how far.
    ``tokenizer``: that of ``data``, if it is loaded already. Raises DataError."""
    tokenizer, sources = tokenizer or load_tokenizer(data), Sources(data)
    parts = tuple(load_part(sources, index, tokenizer, observe) for index in range(len(sources.names)))
    return Corpus(" + ".join(part.name for part in parts), tokenizer, parts)


def load_part(sources: Sources, index: int, tokenizer: Tokenizer, observe: Observe = lambda *_: None) -> Part:
    """The ``index``-th of ``sources``, as ``load_corpus``."""
    data = sources.data
    assert 0 < data.validation_fraction <= 0.5, "the schedule has checked it"
    with sources.named(index):
        settings = asdict(sources.settings(index))
        content = sources.content(index) | {
            "tokenizer": tokenizer.identity,
            "settings": {name: value for name, value in settings.items() if name not in NOT_CONTENT},
        }
        folder = cache.folder_of(data.cache) / cache.key_of(content)
        if not folder.is_dir():
            with cache.writing(folder) as unfinished:
                if unfinished is not None:
                    report = ScreenReport() if screens(data.screen) else None
                    documents = sources.documents(index, report, observe)
                    prepare(unfinished, documents, tokenizer, data.validation_fraction, observe, report)
    body = cache.read(folder)
    if not body["restores"]:
        log.warning(
            "data.tokenizer %s does not give its text back: what it drops is not predicted, so that bits per byte look "
            "better than they are",
            tokenizer.name,
        )
    bytes_too = tokenizer.identity == BYTES
    train, validation = (cache.mapped(folder / f"{side}.ids", tokenizer.dtype) for side in ("train", "validation"))
    return Part(
        sources.names[index],
        sources_of(data)[index].weight,
        train,
        cache.mapped(folder / "train.starts", np.int64),
        validation,
        cache.mapped(folder / "validation.starts", np.int64),
        None if bytes_too else cache.mapped(folder / "validation.ends", np.int64),
        train[:TEXT_BYTES] if bytes_too else cache.mapped(folder / "train.text", np.uint8),
        validation if bytes_too else cache.mapped(folder / "validation.text", np.uint8),
        body["train_bytes"],
        body["sha256"],
        body["text_sha256"],
        body["documents"],
        body["screened"],
        folder,
    )


def whole_text(data: DataConfig, tokenizer: Tokenizer) -> tuple[Ids, Ends | None]:
    """(ids, ends) of all of ``data``, nothing set aside, as ``encode_documents`` gives them. Raises DataError."""
    documents: list[bytes] = []
    sources = Sources(data)
    for index in range(len(sources.names)):
        with sources.named(index):
            found = [document.text for document in sources.documents(index)]
            if not found:
                raise DataError("corpus-empty", "has no text", key="data.source")
            documents += found
    return tokenizer.encode_documents(documents, ends=True)


def _hash_of(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("|".join(hashes).encode()).hexdigest()
