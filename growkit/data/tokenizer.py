"""Text to token ids and back: bytes, or a tokenizer that Hugging Face's libraries load.

A document is bytes. Where it is not UTF-8, each stray byte is read as U+FFFD and still counted as the one byte it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from growkit.config.recipe import BYTES, DataConfig
from growkit.data.spelling import Spelling, spelling_of
from growkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

Ids = NDArray[np.unsignedinteger[Any]]
Ends = NDArray[np.int64]

END = b"\x00"
VOCAB_SIZE = 256
FILE = "tokenizer.json"
# What AutoTokenizer reads a tokenizer from, besides a vocabulary of the model's own format.
FILES = (FILE, "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_NAME = re.compile(r"(hf:)?[\w.-]+(/[\w.-]+)?")
_STRAY = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape has them
_AT_ONCE = 1 << 20  # bytes of documents that are encoded together: after the last ones the cores wait for each other
_AHEAD = 2  # groups that are encoded while one is taken: the library's threads wait for no one
_LOOK = 1 << 16  # bytes of text that are decoded again, to see whether it comes back


class Encoded(NamedTuple):
    """A group of documents. ``ids``: of each, with the end behind it. ``counts``: ids of each, the end among them.
    ``ends``: as of ``encode_documents``, from the beginning of the group; an end is the byte behind its document."""

    ids: Ids
    counts: NDArray[np.int64]
    ends: Ends | None


class Tokenizer:
    """Bytes: an id is a byte. (``FastTokenizer`` is every other one.)

    ``name``: as the recipe has it. ``vocab_size``: every id is below. ``end``: the id between documents.
    ``bos``: the id before each, if any. ``identity``: says which tokenizer it is, whatever its name.
    """

    name = identity = BYTES
    vocab_size = VOCAB_SIZE
    end = END[0]
    bos: int | None = None
    dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint8)  # of its ids: the smallest that holds them

    def encode_documents(self, documents: Sequence[bytes], *, ends: bool = False) -> tuple[Ids, Ends | None]:
        """(ids of ``documents``, joined by ``end``; byte of the text, the documents joined by ``END``, at which each id
        ends, or None: each id is a byte, or nobody asked for ``ends``). Every byte is some id's: one that the tokenizer
        passes over is the next id's, one that several ids spell is the first one's."""
        return np.frombuffer(END.join(documents), dtype=np.uint8), None

    def encode_groups(self, groups: Iterable[Sequence[bytes]], *, ends: bool = False) -> Iterator[Encoded]:
        """Each of ``groups``, which are read as they are asked for."""
        for group in groups:
            text = b"".join(part for document in group for part in (document, END))
            counts = np.array([len(document) + 1 for document in group], dtype=np.int64)
            yield Encoded(np.frombuffer(text, dtype=np.uint8), counts, None)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone."""
        return list(text.encode(errors="surrogateescape"))  # what a command line has that is not UTF-8 stays what it is

    def prompt(self, text: str) -> list[int]:
        """What a model is given to go on from ``text``: at least one id."""
        return self.encode(text) or [10]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; those that the tokenizer does not have (a model may have more) are left out."""
        return bytes(id for id in ids if id < VOCAB_SIZE).decode(errors="replace")

    def restores(self, documents: Sequence[bytes]) -> bool:
        """Whether ids give the text back, so that bits per byte measure all of it."""
        return True

    def require_same(self, identity: str) -> None:
        """Raises DataError when this is not the tokenizer that a checkpoint's ids are of."""
        if identity != self.identity:
            raise DataError(
                "tokenizer-changed",
                f"is not the tokenizer that the checkpoint was trained with ({identity[:12]}, this is "
                f"{self.identity[:12]})",
                key="data.tokenizer",
                value=self.name,
                mend="restore that one: its ids are what the embedding's rows mean",
            )

    def require_room(self, vocab_size: int) -> None:
        """Raises ConfigError when a model of ``vocab_size`` lacks some of the ids."""
        if vocab_size < self.vocab_size:
            raise ConfigError(
                "vocab-too-small",
                f"cannot hold the ids of data.tokenizer {self.name!r}, which reach {self.vocab_size - 1}",
                key="model.vocab_size",
                value=vocab_size,
                mend=f"use {self.vocab_size} or more, or the tokenizer that the model was made for",
            )


class FastTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library. ``end``: the id between documents. ``bos``: the id before each, if its
    own configuration asks for one."""

    def __init__(self, name: str, fast: tokenizers.Tokenizer, end: int, bos: int | None = None) -> None:
        fast.no_padding()
        fast.no_truncation()
        self.name, self.end, self.bos, self._fast = name, end, bos, fast
        self._before = [] if bos is None else [bos]
        self.vocab_size = 1 + max(end, *self._before, *fast.get_vocab(with_added_tokens=True).values())
        self.dtype = np.min_scalar_type(self.vocab_size - 1)
        self.identity = hashlib.sha256(json.dumps([self.file, end, bos]).encode()).hexdigest()

    @property
    def file(self) -> str:
        """What a tokenizer.json of it says."""
        return str(self._fast.to_str())

    def token(self, id: int) -> str:
        """How ``id`` is spelled."""
        return str(self._fast.id_to_token(id))

    def encode_documents(self, documents: Sequence[bytes], *, ends: bool = False) -> tuple[Ids, Ends | None]:
        ids: list[Ids] = []
        places: list[Ends] = []
        done = 0  # bytes of the text before the group
        for encoded in self.encode_groups(groups_of(documents), ends=ends):
            ids.append(encoded.ids)
            if encoded.ends is not None:
                places.append(done + encoded.ends)
                done = int(places[-1][-1])
        joined = np.concatenate(ids)[:-1]  # nothing ends the last document
        if not ends:
            return joined, None
        reached = np.concatenate(places)[:-1]
        reached[-1:] = done - 1  # what is passed over at the very end has no next id
        return joined, reached

    def encode_groups(self, groups: Iterable[Sequence[bytes]], *, ends: bool = False) -> Iterator[Encoded]:
        waiting: deque[Future[Encoded]] = deque()
        with ThreadPoolExecutor(_AHEAD) as threads:
            for group in groups:
                waiting.append(threads.submit(self._encoded, group, ends))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _encoded(self, group: Sequence[bytes], ends: bool) -> Encoded:
        spelling = self._spelling if ends else None
        offsets = ends and spelling is None
        encode = self._fast.encode_batch if offsets else self._fast.encode_batch_fast  # the fast one keeps no offsets
        texts = [decoded(document) for document in group]
        found = encode(texts, add_special_tokens=False)
        ids = array(self.dtype.char)
        counts = np.empty(len(group), dtype=np.int64)
        inside: list[Ends | None] = []
        for index, (document, encoding) in enumerate(zip(group, found, strict=True)):
            own = encoding.ids
            ids.fromlist(self._before)
            ids.fromlist(own)
            ids.append(self.end)
            counts[index] = len(self._before) + len(own) + 1
            if offsets:
                inside.append(_offset_ends(document, encoding))
            elif spelling is not None:
                inside.append(spelling.ends(own, document))
        if not ends:
            return Encoded(np.frombuffer(ids, dtype=self.dtype), counts, None)
        missing = [index for index, known in enumerate(inside) if known is None]
        again = self._fast.encode_batch([texts[index] for index in missing], add_special_tokens=False)
        for index, encoding in zip(missing, again, strict=True):
            inside[index] = _offset_ends(group[index], encoding)
        return Encoded(np.frombuffer(ids, dtype=self.dtype), counts, self._places(group, inside))

    def _places(self, group: Sequence[bytes], inside: Sequence[Ends | None]) -> Ends:
        """``ends`` of a group, of those within each document."""
        before = np.zeros(len(self._before), dtype=np.int64)
        places: list[Ends] = []
        done = 0  # bytes of the group before the document
        for document, known in zip(group, inside, strict=True):
            assert known is not None
            places += [done + before, done + known, np.array([done + len(document) + 1])]
            done += len(document) + 1
        return np.maximum.accumulate(np.concatenate(places))

    @cached_property
    def _spelling(self) -> Spelling | None:
        return spelling_of(self._fast)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._fast.encode(_STRAY.sub("\ufffd", text), add_special_tokens=False).ids
        return ids

    def prompt(self, text: str) -> list[int]:
        return self._before + self.encode(text) or [self.end]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode([id for id in ids if id < self.vocab_size], skip_special_tokens=False))

    def restores(self, documents: Sequence[bytes]) -> bool:
        """Of the first ``_LOOK`` bytes, but for spaces before a document."""
        left = _LOOK
        for document in documents:
            text = decoded(document[: max(left, 0)])
            if self.decode(self.encode(text)).lstrip(" ") != text.lstrip(" "):
                return False
            left -= len(document)
        return True


def load_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names: ``bytes``, a ``tokenizer.json``, or a folder or name on the hub that
    ``AutoTokenizer`` knows. No code of its own is run. Raises DataError."""
    name = data.tokenizer
    if name == BYTES:
        if data.end_token is not None:
            mend = "leave it out: a zero byte is between documents"
            raise DataError("no-end-token", "is for a tokenizer", key="data.end_token", value=data.end_token, mend=mend)
        return Tokenizer()
    path = os.path.expanduser(name)
    is_file, is_folder = os.path.isfile(path), os.path.isdir(path)
    if not (is_file or is_folder or (_HUB_NAME.fullmatch(name) and not name.endswith(".json"))):
        mend = "name 'bytes', a tokenizer.json, a folder that holds one, or NAME on the Hugging Face hub"
        raise DataError("tokenizer-unavailable", "does not exist", key="data.tokenizer", value=name, mend=mend)
    library = "tokenizers" if is_file else "transformers"
    if find_spec(library) is None:
        mend = "pip install 'growkit[hf]'"
        raise DataError("not-installed", f"needs {library}", key="data.tokenizer", value=name, mend=mend)
    end, bos = None, None
    with _blame(name):
        if is_file:
            import tokenizers

            fast = tokenizers.Tokenizer.from_file(path)
        else:
            from transformers import AutoTokenizer
            from transformers.models.auto.tokenization_auto import get_tokenizer_config

            where = path if is_folder else name.removeprefix("hf:")
            auto = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=is_folder)
            said = get_tokenizer_config(where, local_files_only=is_folder)  # the object drops add_bos_token
            if not auto.is_fast:
                raise ValueError("it has no version for the tokenizers library")
            fast, end = auto.backend_tokenizer, auto.eos_token_id
            bos = auto.bos_token_id if said.get("add_bos_token") else None
    if data.end_token is not None:
        end = fast.token_to_id(data.end_token)
        if end is None:
            problem, mend = f"is not a token of data.tokenizer {name!r}", "name one of its tokens"
            raise DataError("no-end-token", problem, key="data.end_token", value=data.end_token, mend=mend)
    if end is None:
        problem = "is a file that does not say which" if is_file else "has no"
        mend = "set data.end_token to the token that is to stand between documents"
        mend += ", or name the folder with its tokenizer_config.json" if is_file else ""
        problem += " token ends a text" if is_file else " eos token"
        raise DataError("no-end-token", problem, key="data.tokenizer", value=name, mend=mend)
    return FastTokenizer(name, fast, end, bos)


def tokenizer_in(folder: Path) -> str | None:
    """What ``data.tokenizer`` is for a checkpoint whose own tokenizer lies beside its weights; None if none does."""
    return str(folder) if any((folder / name).is_file() for name in FILES) else None


class _blame:
    """Makes of what a broken tokenizer raises a DataError. The ``tokenizers`` library raises the bare ``Exception``,
    which no ``except`` names without naming everything."""

    KINDS = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is not None and (kind is Exception or isinstance(error, self.KINDS)):
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DataError(
                "tokenizer-unavailable",
                f"could not be loaded ({type(error).__name__}: {said})",
                key="data.tokenizer",
                value=self.name,
                mend="check that its files are whole and that AutoTokenizer loads it without code of its own, or the "
                "name and the network",
            ) from error


def groups_of(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """``documents`` in groups that are encoded together."""
    group: list[bytes] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= _AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def decoded(document: bytes) -> str:
    """The text of a document, each byte that is not UTF-8 as U+FFFD."""
    try:
        return document.decode()
    except UnicodeDecodeError:
        return _STRAY.sub("\ufffd", document.decode(errors="surrogateescape"))


def _offset_ends(document: bytes, encoding: tokenizers.Encoding) -> Ends:
    """Byte of the document at which each id ends, by the library's offsets, which count characters."""
    return _byte_offsets(document)[[end for _, end in encoding.offsets]]


def _byte_offsets(document: bytes) -> Ends:
    """Where each character of the document begins in bytes, and the document's length."""
    text = document.decode(errors="surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
    return np.concatenate(([0], np.cumsum(sizes)))
