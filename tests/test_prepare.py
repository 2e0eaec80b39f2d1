"""Prepared corpora: what the cache holds is what a plain reading gives, is made once, and survives being killed; every
kind of source gives the same documents."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.config.load import parse_data
from growkit.config.recipe import DataConfig, SourceConfig
from growkit.data import cache, prepare
from growkit.data.bpe import END_OF_TEXT, train_bpe
from growkit.data.corpus import NOT_CONTENT, Corpus, load_corpus, whole_text
from growkit.data.document import Document
from growkit.data.sources import file_or_folder
from growkit.data.tokenizer import END, Encoded, FastTokenizer, Tokenizer, decoded, load_tokenizer
from growkit.errors import DataError
from tests.support import TEXT, cli, recipe_dict, write_recipe

ROWS = [f"row {i}: {TEXT[i:]} naïve 世界 😀" for i in range(30)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe") / "made"
    assert train_bpe([TEXT.encode() * 3], 300, folder) == 300
    return str(folder)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "growkit" / f"corpora-{cache.FORMAT}"


def folder_of(folder: Path, texts: Iterable[bytes]) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_bytes(text)
    return folder


class Counting(FastTokenizer):
    """Says what it is given to tokenise; stops before document number ``stop``, as an interruption would."""

    def __init__(self, folder: str, stop: int = 10**9) -> None:
        made = load_tokenizer(DataConfig(tokenizer=folder))
        assert isinstance(made, FastTokenizer)
        super().__init__(made.name, made._fast, made.end, made.bos)
        self.seen: list[bytes] = []
        self.stop = stop

    def encode_groups(self, groups: Iterable[Sequence[bytes]], *, ends: bool = False) -> Iterator[Encoded]:
        for group in groups:
            if len(self.seen) + len(group) > self.stop:
                raise KeyboardInterrupt
            self.seen += group
            yield self._encoded(group, ends)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of about five documents of ROWS, each a group of its own."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 600)
    monkeypatch.setattr("growkit.data.tokenizer._AT_ONCE", 1)


def same(one: Corpus, other: Corpus) -> bool:
    arrays = ("train", "validation", "train_text", "validation_text", "validation_ends")
    pairs = [(getattr(one, name), getattr(other, name)) for name in arrays]
    pairs += [(one.parts[0].train_starts, other.parts[0].train_starts)]
    return one.record == other.record and all(
        a is b is None or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in pairs
    )


def in_process(*words: object, **environment: str) -> int:
    """Runs ``growkit words...`` in a process that loads no torch; returns its exit code."""
    command = [sys.executable, "-m", "growkit.cli.main", *map(str, words)]
    return subprocess.run(command, env=os.environ | environment, check=False, capture_output=True).returncode


# What is in the cache.


def plain_split(documents: list[Document], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """As the first version of growkit had it, in memory."""
    wanted = round(sum(len(document.text) for document in documents) * fraction)
    if len({document.group for document in documents}) == 1:
        after, before = [document.text for document in documents], []
        left = sum(len(text) + 1 for text in after) - 1 - wanted
        while left > len(after[0]):
            left -= len(after[0]) + 1
            before.append(after.pop(0))
        return [*before, after[0][:left]], [after[0][left:], *after[1:]]
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.text)
    chosen: set[str] = set()
    taken = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if taken < wanted and taken + sizes[group] <= max(1.5 * wanted, 1):
            chosen.add(group)
            taken += sizes[group]
    chosen = chosen or {min(sizes, key=lambda name: (sizes[name], name))}
    train, held = ([d.text for d in documents if (d.group in chosen) == side] for side in (False, True))
    return train, held


texts = st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=20))


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 6), texts.filter(bool)), min_size=1, max_size=14),
    st.sampled_from([0.001, 0.1, 0.5]),
    st.booleans(),
)
def test_an_entry_is_what_a_plain_reading_gives(
    tmp_path_factory: pytest.TempPathFactory, bpe: str, found: list[tuple[int, bytes]], fraction: float, as_bytes: bool
) -> None:
    """Whatever the documents are: groups of several, few large ones, one alone, bytes that are not UTF-8."""
    documents = [Document(f"group {group}", text) for group, text in found]
    tokenizer = Tokenizer() if as_bytes else load_tokenizer(DataConfig(tokenizer=bpe))
    folder = tmp_path_factory.mktemp("entry")
    prepare.prepare(folder, documents, tokenizer, fraction, lambda *_: None)
    body = cache.read(folder)
    sides = plain_split(documents, fraction)
    written = [cache.mapped(folder / f"{side}.ids", tokenizer.dtype) for side in prepare.SIDES]
    for side, ids, name in zip(sides, written, prepare.SIDES, strict=True):
        wanted, ends = tokenizer.encode_documents(side, ends=True)
        assert np.array_equal(ids, wanted)
        starts = cache.mapped(folder / f"{name}.starts", np.int64)
        pieces = [len(text) if as_bytes else len(tokenizer.encode(decoded(text))) for text in side]
        begins = [sum(pieces[:number]) + number for number in range(len(pieces))]
        assert starts.tolist() == [begin for begin in begins if begin < len(ids)]
        if name == "validation" and ends is not None:
            assert np.array_equal(cache.mapped(folder / "validation.ends", np.int64), ends)
        if not as_bytes:
            assert cache.mapped(folder / f"{name}.text", np.uint8).tobytes() == END.join(side)
    assert body["text_sha256"] == hashlib.sha256(b"|".join(map(END.join, sides))).hexdigest()
    assert body["sha256"] == hashlib.sha256(written[0].tobytes() + b"|" + written[1].tobytes()).hexdigest()
    assert body["train_bytes"] == len(END.join(sides[0])) and body["documents"] == len(documents)
    names = {"train.ids", "train.starts", "validation.ids", "validation.starts", cache.NAME}
    more = set() if as_bytes else {"train.text", "validation.text", "validation.ends"}
    assert {file.name for file in folder.iterdir()} == names | more, "something is left lying"


def test_what_is_prepared_is_not_tokenised_again(tmp_path: Path, bpe: str, fresh: Path) -> None:
    """Nor when it lies elsewhere under another name, or its weight is another; but when any of it changes."""
    source = folder_of(tmp_path / "a", [row.encode() for row in ROWS])
    first = Counting(bpe)
    corpus = load_corpus(DataConfig(source=str(source)), first)
    assert sorted(first.seen) == sorted(row.encode() for row in ROWS)
    shutil.move(source, tmp_path / "b")
    again = DataConfig(
        mixture=[SourceConfig(str(tmp_path / "b"), weight=3)], block_tokens=7, shuffle=False, packing="best_fit"
    )
    moved = load_corpus(again, Counting(bpe, stop=0))
    assert np.array_equal(moved.train, corpus.train) and moved.sha256 == corpus.sha256
    assert isinstance(moved.train.base, np.memmap) and not moved.train.flags.writeable
    assert len([entry for entry in fresh.iterdir() if entry.is_dir()]) == 1
    (tmp_path / "b" / "000.txt").write_bytes(b"another text of a document")
    for data in (again, DataConfig(source=str(tmp_path / "b"), validation_fraction=0.2)):
        other = Counting(bpe)
        assert load_corpus(data, other).sha256 != corpus.sha256 and len(other.seen) == 30
    load_corpus(again, Tokenizer())
    assert len([entry for entry in fresh.iterdir() if entry.is_dir()]) == 4


def test_an_interrupted_preparation_goes_on(tmp_path: Path, bpe: str, fresh: Path, small_shards: None) -> None:
    """From the last finished shard, to the bit; of a shard that is not as it was written, from the one before."""
    data = DataConfig(source=str(folder_of(tmp_path / "text", [row.encode() for row in ROWS])))
    whole = load_corpus(data, Counting(bpe))
    shutil.rmtree(fresh)
    stopped = Counting(bpe, stop=17)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(data, stopped)
    [unfinished] = fresh.glob(f"{cache.WRITING}*")
    shutil.copytree(unfinished, tmp_path / "kept")
    on = Counting(bpe)
    assert same(load_corpus(data, on), whole)
    assert 30 - 17 <= len(on.seen) < 30 - 17 + 6, "finished shards were made again"
    assert not list(fresh.glob(f"{cache.WRITING}*"))

    def damaged(change: Callable[[Path], object]) -> int:
        """Documents that are tokenised when the unfinished entry is changed so."""
        shutil.rmtree(fresh)
        shutil.copytree(tmp_path / "kept", unfinished)
        change(unfinished)
        on = Counting(bpe)
        assert same(load_corpus(data, on), whole)
        return len(on.seen)

    def flip(file: Path, place: int) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    least = len(on.seen)
    assert damaged(lambda folder: os.truncate(folder / "train.counts", 8)) == 30
    assert damaged(lambda folder: flip(folder / "train.ids", 0)) == 30
    journal = "train.journal"
    lines = (tmp_path / "kept" / journal).read_text().splitlines()
    assert len(lines) >= 3
    cut = "\n".join(lines)[:-9]
    assert least < damaged(lambda folder: (folder / journal).write_text(cut)) < 30
    assert damaged(lambda folder: flip(folder / "documents.text", 3)) == 30, "the text was not read again"


def test_a_killed_preparation_goes_on(tmp_path: Path, bpe: str, fresh: Path) -> None:
    source = folder_of(tmp_path / "text", [row.encode() for row in ROWS * 3])
    recipe = write_recipe(tmp_path, recipe_dict(tmp_path, model={"vocab_size": 300}))
    words = (
        "data",
        "prepare",
        recipe,
        f"data.source={source}",
        f"data.tokenizer={bpe}",
        "data.validation_fraction=0.3",
    )
    assert in_process(*words, GROWKIT_FAULT="mid_preparation:1") == -signal.SIGKILL
    [unfinished] = fresh.glob(f"{cache.WRITING}*")
    assert (unfinished / "train.journal").read_text().count("\n") == 1
    on = Counting(bpe)
    data = DataConfig(source=str(source), validation_fraction=0.3)
    corpus = load_corpus(data, on)
    assert 0 < len(on.seen) < 45, "what was finished was made again"
    shutil.rmtree(fresh)
    assert same(load_corpus(data, Counting(bpe)), corpus)


def test_one_process_at_a_time(tmp_path: Path, fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another one waits, says for whom, and takes what is there then."""
    (tmp_path / "a.txt").write_text(TEXT * 9)
    data = DataConfig(source=str(tmp_path / "a.txt"))
    entry = load_corpus(data).parts[0].folder
    shutil.move(entry, tmp_path / "aside")
    program = (
        "import fcntl, os, sys\nlock = open(sys.argv[1], 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(str(os.getpid())); lock.flush()\nprint('held', flush=True)\nsys.stdin.read()\n"
        "os.rename(sys.argv[2], sys.argv[3])\n"
    )
    command = [sys.executable, "-c", program, f"{entry}.lock", str(tmp_path / "aside"), str(entry)]
    made: list[Corpus] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        waiter = threading.Thread(target=lambda: made.append(load_corpus(data)))
        with caplog.at_level(logging.WARNING):
            waiter.start()
            deadline = time.monotonic() + 30
            while f"waiting for process {holder.pid}" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert not made
        holder.communicate()
    waiter.join(30)
    assert made and made[0].parts[0].folder == entry


def test_entries_of_another_format_are_left_alone(tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 9)
    old = load_corpus(DataConfig(source=str(tmp_path / "a.txt"))).parts[0].folder
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    new = load_corpus(DataConfig(source=str(tmp_path / "a.txt"))).parts[0].folder
    assert new.parent.name != old.parent.name and new.is_dir()
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"corpora-{cache.FORMAT}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.folder_of(None) == Path("/x/growkit", name) and cache.folder_of("/y") == Path("/y", name)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.folder_of(None) == Path("/home/me/.cache/growkit", name)
    assert cache.folder_of("~/z") == Path("/home/me/z", name)


def test_the_text_beside_ids_is_bounded(tmp_path: Path, bpe: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "TEXT_BYTES", 100)
    monkeypatch.setattr("growkit.data.corpus.TEXT_BYTES", 100)
    data = DataConfig(source=str(folder_of(tmp_path / "text", [row.encode() for row in ROWS])))
    ids, plain = (load_corpus(data, tokenizer) for tokenizer in (Counting(bpe), Tokenizer()))
    assert ids.train_text.tobytes() == plain.train_text.tobytes() == plain.train[:100].tobytes()
    assert ids.bytes_per_token == len(plain.train) / len(ids.train) and ids.train_bytes == len(plain.train)
    assert ids.validation_text.tobytes() == plain.validation.tobytes()


# Sources.


def written(folder: Path, kind: str) -> Path:
    """ROWS in a file of that kind, beside a column of numbers."""
    import pyarrow.parquet

    table = pyarrow.table({"number": list(range(len(ROWS))), "body": ROWS})
    file = folder / f"rows.{kind}"
    if kind.startswith("json"):
        lines = "".join(json.dumps({"number": i, "body": row}) + "\n" for i, row in enumerate(ROWS)).encode()
        file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=7)
    else:
        make = pyarrow.ipc.new_stream if kind == "stream.arrow" else pyarrow.ipc.new_file
        with make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=11)
    return file


KINDS = ("jsonl", "jsonl.gz", "json.gz", "parquet", "file.arrow", "stream.arrow")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a document, alone and in a folder with text beside it; they are split one by one."""
    monkeypatch.setattr("growkit.data.sources._ROWS", 4)
    file = written(tmp_path, kind)
    found = list(file_or_folder(DataConfig(source=str(file), text_field="body")))
    assert [document.text.decode() for document in found] == ROWS
    assert len({document.group for document in found}) == len(ROWS)
    (tmp_path / "a.txt").write_text("text")
    beside = list(file_or_folder(DataConfig(source=str(tmp_path), text_field="body")))
    assert [(document.group, document.text.decode()) for document in beside] == [
        ("a.txt", "text"),
        *((f"{file.name}:{document.group}", document.text.decode()) for document in found),
    ]
    corpus = load_corpus(DataConfig(source=str(file), text_field="body", validation_fraction=0.2))
    held_out = corpus.validation.tobytes().decode().split("\0")
    assert 4 <= len(held_out) <= 9 and set(held_out) < set(ROWS)
    assert sorted([*corpus.train.tobytes().decode().split("\0"), *held_out]) == sorted(ROWS)


def test_sources_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    rows = written(tmp_path, "jsonl")
    with open(rows, "a") as file:
        file.write("broken\n")
    documents = iter(file_or_folder(DataConfig(source=str(rows), text_field="body")))
    assert [next(documents).text.decode() for _ in ROWS] == ROWS
    with pytest.raises(DataError, match=r"rows.jsonl, line 31'; is not JSON"):
        next(documents)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_known_by_its_content(
    streaming: bool, tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also streamed: the same documents; and where it is prepared, nothing of it is read again."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    written(tmp_path / "set", "jsonl")
    data = DataConfig(source=f"hf:{tmp_path / 'set'}", text_field="body", streaming=streaming)
    corpus = load_corpus(data)
    assert sorted((corpus.train.tobytes() + END + corpus.validation.tobytes()).decode().split("\0")) == sorted(ROWS)
    assert list((tmp_path / "cache").rglob("*.arrow")) == [] or not streaming, "a copy of what is streamed was kept"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert load_corpus(data).sha256 == corpus.sha256
    assert not list((tmp_path / "cache").rglob("*.arrow")), "what is prepared was read again"
    text = (tmp_path / "set" / "rows.jsonl").read_text()
    stamp = os.stat(tmp_path / "set" / "rows.jsonl")
    (tmp_path / "set" / "rows.jsonl").write_text(text.replace("row 3:", "row 4:"))
    os.utime(tmp_path / "set" / "rows.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load_corpus(DataConfig(**(vars(data) | {"streaming": True}))).sha256 != corpus.sha256


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, fresh: Path) -> None:
    source = folder_of(tmp_path / "text", [b"one", b"two"])
    files = file_or_folder(DataConfig(source=str(source)))
    files.identity()
    documents = iter(files)
    assert next(documents).text == b"one"
    (source / "001.txt").write_bytes(b"three")
    with pytest.raises(DataError, match=r"001.txt'; changed while it was read.*corpus-changed"):
        list(documents)


def test_half_a_character_in_json_is_stray_bytes(tmp_path: Path, bpe: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83dz"}\n')
    [document] = file_or_folder(DataConfig(source=str(tmp_path / "a.jsonl")))
    assert document.text == b"a\xed\xa0\xbdz"
    tokenizer = load_tokenizer(DataConfig(tokenizer=bpe))
    ids, ends = whole_text(DataConfig(source=str(tmp_path / "a.jsonl")), tokenizer)
    assert tokenizer.decode(ids.tolist()) == "a\ufffd\ufffd\ufffdz" and ends is not None and ends[-1] == 5


# Mixtures.


def test_a_mixture_is_its_parts(tmp_path: Path, bpe: str) -> None:
    rows = written(tmp_path, "jsonl")
    (tmp_path / "one.txt").write_text(TEXT * 20)
    mixture = [SourceConfig(str(rows), weight=3, text_field="body"), SourceConfig(str(tmp_path / "one.txt"))]
    data = DataConfig(mixture=mixture, tokenizer=bpe, validation_fraction=0.2)
    corpus, tokenizer = load_corpus(data), load_tokenizer(data)
    alone = [
        load_corpus(DataConfig(source=str(rows), text_field="body", tokenizer=bpe, validation_fraction=0.2)),
        load_corpus(DataConfig(source=str(tmp_path / "one.txt"), tokenizer=bpe, validation_fraction=0.2)),
    ]
    assert [(part.name, part.weight) for part in corpus.parts] == [(str(rows), 3), (str(tmp_path / "one.txt"), 1)]
    for part, single in zip(corpus.parts, alone, strict=True):
        assert np.array_equal(part.train, single.train) and part.sha256 == single.sha256
        assert part.documents == single.documents
        pieces = np.split(part.train, part.train_starts[1:])
        assert all(piece[-1] == tokenizer.end for piece in pieces[:-1]) and part.train_starts[0] == 0
    assert [part.documents for part in corpus.parts] == [30, 1]
    stop = [tokenizer.end]
    assert corpus.train.tolist() == alone[0].train.tolist() + stop + alone[1].train.tolist()
    assert corpus.validation.tolist() == alone[0].validation.tolist() + stop + alone[1].validation.tolist()
    held_out = corpus.validation_text.tobytes()
    assert held_out == END.join(single.validation_text.tobytes() for single in alone)
    ids, ends = tokenizer.encode_documents(held_out.split(END), ends=True)
    assert np.array_equal(ids, corpus.validation) and np.array_equal(ends, corpus.validation_ends)
    rates = [single.bytes_per_token for single in alone]
    assert corpus.bytes_per_token == pytest.approx(0.75 * rates[0] + 0.25 * rates[1], rel=1e-12)
    assert corpus.train_tokens == len(corpus.train) - 1 and corpus.documents == 31
    assert corpus.sha256 not in {single.sha256 for single in alone}
    corpus.require_same(corpus.record)
    with pytest.raises(DataError, match="corpus-changed"):
        corpus.require_same(alone[0].record)
    assert (
        len(whole_text(data, tokenizer)[0])
        == sum(len(whole_text(DataConfig(mixture=[one]), tokenizer)[0]) for one in mixture) + 1
    )


def test_sources_of_one_name_have_names_of_their_own() -> None:
    overrides = ["data.mixture=[{source: a, pattern: '*.py'}, {source: a, pattern: '*.md'}, {source: b}]"]
    from growkit.config.mixture import names_of

    assert names_of(parse_data(overrides)) == ["a (*.py)", "a (*.md)", "b"]


def test_every_setting_of_data_is_known_to_decide_what_is_prepared_or_not() -> None:
    """A new one that is forgotten would have every text tokenised again."""
    decides = {"validation_fraction", "task"}  # a task is not prepared
    assert {field.name for field in dataclasses.fields(DataConfig)} == NOT_CONTENT | decides


# Commands.


def test_prepare_shows_what_came_of_it(tmp_path: Path, bpe: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")
    monkeypatch.setenv("COLUMNS", "200")
    recipe = write_recipe(tmp_path, recipe_dict(tmp_path, model={"vocab_size": 300}))
    words = ("data", "prepare", recipe, f"data.tokenizer={bpe}", "--workers", 1)
    code, out, err = cli(*words)
    assert (code, err) == (0, "") and os.environ["RAYON_NUM_THREADS"] == "1"
    corpus = load_corpus(DataConfig(source=str(tmp_path / "corpus.txt")), Counting(bpe, stop=0))
    assert str(corpus.parts[0].folder) in out and "41k" in out and "was there" not in out
    code, out, err = cli(*words)
    assert (code, err) == (0, "") and "was there" in out
    code, _, err = cli(*words, "model.vocab_size=299")
    assert code == 2 and "[vocab-too-small]" in err


def test_a_trained_tokenizer_is_used_by_its_name(tmp_path: Path, fresh: Path) -> None:
    """The same text gives the same one, in another process too, and what is held out has no say in it."""
    text = "".join(f"{TEXT[i % 40 :]} {i}\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text + "zqzqzq " * 60)
    words = ("tokenizer", "train", tmp_path / "a.txt", "--vocab-size", 400, "data.validation_fraction=0.1")
    code, out, err = cli(*words, "-o", tmp_path / "one")
    assert (code, err) == (0, "") and "model.vocab_size=400" in out
    assert in_process(*words, "-o", tmp_path / "two", RAYON_NUM_THREADS="1") == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    made = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "one")))
    assert made.vocab_size == 400 and made.decode([made.end]) == END_OF_TEXT
    assert made.decode(made.encode(text)) == text and len(made.encode(text)) < 0.5 * len(text)
    assert len(made.encode(" zqzqzq")) >= 6, "it has seen what is held out"
    (tmp_path / "short.txt").write_text("ab" * 40)
    code, out, err = cli("tokenizer", "train", tmp_path / "short.txt", "--vocab-size", 9999, "-o", tmp_path / "three")
    assert (code, err) == (0, "") and "not 9999" in out


def test_preparing_loads_no_torch(tmp_path: Path, fresh: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 99)
    code = (
        "import sys\nfrom growkit.cli.data import prepare_data\n"
        f"prepare_data('quickstart', ['data.source={tmp_path / 'a.txt'}'], None)\n"
        "assert not {'torch', 'lightning', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
