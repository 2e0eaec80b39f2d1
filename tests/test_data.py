"""Data: the stream gives every (token, next token) pair once an epoch whatever shape batches have, and a corpus is the
same bytes, split the same way, wherever it is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.config.recipe import DataConfig
from growkit.data.corpus import END, Corpus, load_corpus, standard_library
from growkit.data.shape import StepShape
from growkit.data.stream import Batch, Batches, TokenStream, validation_windows, windows
from growkit.errors import DataError

lengths = st.integers(2, 90)
blocks = st.integers(1, 40)
seeds = st.integers(0, 2**63 - 1)


def stream(length: int, block: int, seed: int = 0, *, shuffle: bool = True) -> TokenStream:
    """Token i is i, so that a token says where it comes from."""
    return TokenStream(np.arange(length, dtype=np.int32), block_tokens=block, seed=seed, shuffle=shuffle)


def read(source: TokenStream, start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` as a plain list, after a check that targets are the next tokens."""
    tokens, targets = source.read(start, 1, count)
    assert torch.equal(targets, tokens + 1) and tokens.dtype == targets.dtype == torch.int64
    return tokens.flatten().tolist()


def batches(
    source: TokenStream, cursor: int, rows: int, context: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """One micro-batch a step, of ``rows`` for each of ``world`` processes."""
    shape = StepShape(rows * world, context)
    return iter(Batches(source, {"cursor": cursor}, lambda _: shape, rank=rank, world_size=world))


@given(lengths, blocks, seeds, st.booleans())
def test_every_pair_once_an_epoch(length: int, block: int, seed: int, shuffle: bool) -> None:
    source = stream(length, block, seed, shuffle=shuffle)
    for epoch in range(3):
        found = read(source, epoch * (length - 1), length - 1)
        assert sorted(found) == list(range(length - 1))
        if not shuffle:
            assert found == list(range(length - 1))
        for start in range(0, length - 1, block):  # a block is one piece of the corpus, shuffled or not
            piece = found[start : start + block]
            assert piece == list(range(piece[0], piece[0] + len(piece)))


@given(lengths, blocks, seeds, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3)), min_size=1))
def test_changing_the_shape_repeats_and_skips_nothing(
    length: int, block: int, seed: int, stages: list[tuple[int, int, int]]
) -> None:
    """Stages of other micro-batch sizes and contexts, each from the cursor of the one before, over epoch ends."""
    source = stream(length, block, seed)
    found, cursor = [], 0
    for rows, context, count in stages:
        for batch in itertools.islice(batches(source, cursor, rows, context), count):
            assert batch.tokens.shape == batch.targets.shape == (rows, context)
            found += batch.tokens.flatten().tolist()
            cursor = batch.cursor
    assert cursor == len(found)
    assert found == read(source, 0, cursor)


@given(lengths, blocks, seeds, st.integers(1, 4), st.integers(1, 9), st.integers(2, 5), st.integers(0, 300))
def test_processes_share_what_one_would_read(
    length: int, block: int, seed: int, rows: int, context: int, world: int, cursor: int
) -> None:
    source = stream(length, block, seed)
    alone = itertools.islice(batches(source, cursor, rows * world, context), 4)
    shares = [batches(source, cursor, rows, context, rank, world) for rank in range(world)]
    for whole, *parts in zip(alone, *shares):
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert {part.cursor for part in parts} == {whole.cursor}


@given(lengths, blocks, seeds, st.integers(1, 3), st.integers(1, 9), st.integers(0, 8))
def test_the_cursor_of_a_batch_resumes_after_it(
    length: int, block: int, seed: int, rows: int, context: int, at: int
) -> None:
    """Bitwise, from a stream built afresh, also when the reader had run ahead."""

    def afresh(cursor: int, rank: int) -> Iterator[Batch]:
        return batches(stream(length, block, seed), cursor, rows, context, rank, 2)

    for rank in (0, 1):
        whole = list(itertools.islice(afresh(0, rank), 12))
        resumed = afresh(whole[at].cursor, rank)
        for wanted, batch in zip(whole[at + 1 :], resumed):
            assert torch.equal(batch.tokens, wanted.tokens) and torch.equal(batch.targets, wanted.targets)
            assert batch.cursor == wanted.cursor


def test_order_is_the_seeds_and_the_epochs() -> None:
    first, same, other = stream(1001, 10, seed=1), stream(1001, 10, seed=1), stream(1001, 10, seed=2)
    epochs = [read(first, epoch * 1000, 1000) for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [read(same, epoch * 1000, 1000) for epoch in reversed(range(3))] == epochs[::-1], "order matters"
    assert read(other, 0, 1000) != epochs[0]
    assert epochs[0] != list(range(1000))
    torch.manual_seed(5)
    np.random.seed(5)
    assert read(stream(1001, 10, seed=1), 0, 1000) == epochs[0], "a global random state matters"


def test_far_into_a_long_run() -> None:
    """Positions are 64-bit: a trillion tokens in, the epoch is still whole."""
    source = stream(1001, 7)
    start = 1000 * 10**9
    assert sorted(read(source, start, 1000)) == list(range(1000))
    assert read(source, start + 13, 400) == read(source, start, 1000)[13:413]


def test_one_token_is_too_few() -> None:
    with pytest.raises(DataError, match="corpus-too-short"):
        stream(1, 4)


@given(st.integers(1, 40), st.integers(1, 400), st.integers(0, 500), st.data())
def test_validation_windows(context: int, extra: int, wanted: int, data: st.DataObject) -> None:
    """Inside, scoring no target twice, spread to both ends, as many as asked for or as there are."""
    tokens = np.arange(context + extra)
    unscored = data.draw(st.integers(0, context - 1))
    scored = context - unscored
    starts, count = validation_windows(tokens, context, wanted, unscored)
    possible = (len(tokens) - 1 - unscored) // scored
    assert len(starts) == max(1, min(possible, wanted // scored)) and count == len(starts) * scored
    assert starts[0] == 0 and starts[-1] + context < len(tokens)
    assert (np.diff(starts) >= scored).all()
    if len(starts) > 1:
        assert np.diff(starts).max() - np.diff(starts).min() <= scored, "not spread evenly"
        assert len(tokens) - starts[-1] <= 2 * context + np.diff(starts).max(), "the end is left out"
    x, y = windows(tokens, starts, context)
    assert torch.equal(y, x + 1) and torch.equal(x[:, 0], torch.from_numpy(starts))
    assert x.shape == y.shape == (len(starts), context)


# Corpora.


def files(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def load(source: object, **fields: Any) -> Corpus:
    return load_corpus(DataConfig(source=str(source), **fields))


def test_a_single_file_is_split_by_position(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    corpus = load(files(tmp_path, {"a.txt": text}) / "a.txt", validation_fraction=0.1)
    assert (corpus.train.tobytes() + corpus.validation.tobytes()).decode() == text
    assert len(corpus.validation) == round(len(text) * 0.1)
    assert corpus.train.dtype == corpus.validation.dtype == np.uint8 and corpus.documents == 1
    assert corpus.sha256 == hashlib.sha256(corpus.train.tobytes() + b"|" + corpus.validation.tobytes()).hexdigest()


@given(st.lists(st.integers(1, 60), min_size=2, max_size=30), st.sampled_from([0.05, 0.2, 0.5]))
def test_a_folder_is_split_by_whole_files(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], share: float
) -> None:
    """Every file whole on one side, in order, the validation side near its share."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = {f"{i:03d}.txt": chr(0x100 + i) * n for i, n in enumerate(lengths)}
    corpus = load(files(folder, texts), validation_fraction=share)
    sides = [side.tobytes().decode().split(END.decode()) for side in (corpus.train, corpus.validation)]
    assert sorted(sides[0] + sides[1]) == sorted(texts.values())
    assert all(side == sorted(side) for side in sides), "the order of files is kept"
    assert corpus.documents == len(texts)
    sizes = sorted(len(text.encode()) for text in texts.values())
    wanted, taken = share * sum(sizes), sum(len(text.encode()) for text in sides[1])
    assert taken <= max(1.5 * wanted + 1, sizes[0]), "more than asked for"
    assert taken >= min(wanted - 1, sum(n for n in sizes if n <= wanted / 2) / 2, sizes[0]), "less than there was"


def test_the_share_of_many_small_files_is_met(tmp_path: Path) -> None:
    folder = files(tmp_path, {f"{i}/{i}.txt": f"{i} " * (50 + i % 40) for i in range(200)})
    for share in (0.02, 0.1, 0.5):
        corpus = load(folder, validation_fraction=share)
        total = len(corpus.train) + len(corpus.validation)
        assert share <= len(corpus.validation) / total <= share + 0.01  # one file at most is more than asked for


def test_the_split_does_not_depend_on_the_machine(tmp_path: Path) -> None:
    """The same hash from another folder and from files written in another order, another one when a byte changes."""
    texts = {f"{i}.txt": f"text {i}\n" * 20 for i in range(30)}
    corpus = load(files(tmp_path / "a", texts))
    again = load(files(tmp_path / "b", dict(reversed(texts.items()))))
    assert corpus.sha256 == again.sha256
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(corpus.validation.tobytes().split(END))
    assert chosen == {texts[name].encode() for name in order[: len(chosen)]}, "not in the order of the names' SHA-256"
    assert np.array_equal(corpus.train, again.train) and np.array_equal(corpus.validation, again.validation)
    changed = load(files(tmp_path / "c", texts | {"7.txt": "text 8\n" + "text 7\n" * 19}))
    assert changed.sha256 != corpus.sha256
    assert load(tmp_path / "a", validation_fraction=0.3).sha256 != corpus.sha256


def test_a_pattern_chooses_files_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    texts = {"a.txt": "aa", "b/c.txt": "cc", "b/d.md": "dd", ".git/e.txt": "ee", "b/.f.txt": "ff", "empty.txt": ""}
    files(tmp_path, texts)
    assert (load(tmp_path).documents, load(tmp_path, pattern="**/*.txt").documents) == (3, 2)
    corpus = load(tmp_path, pattern="b/*.md")
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"dd"


def test_a_local_data_set_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = [{"content": f"row {i} " * 10, "number": i} for i in range(40)]
    folder = files(tmp_path / "set", {"train.jsonl": "\n".join(map(json.dumps, rows))})
    corpus = load(f"hf:{folder}", text_field="content", validation_fraction=0.2)
    texts = (corpus.train.tobytes() + END + corpus.validation.tobytes()).split(END)
    assert Counter(texts) == Counter(row["content"].encode() for row in rows)
    assert 6 <= len(corpus.validation.tobytes().split(END)) <= 10
    with pytest.raises(DataError, match=r"got 'text'; is not a column; columns: content, number"):
        load(f"hf:{folder}")
    with pytest.raises(DataError, match="not-text"):
        load(f"hf:{folder}", text_field="number")


def test_the_standard_library_without_tests_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["os.py", "json/decoder.py", "json/encoder.py", "unittest/case.py", "contest/a.py"]
    left_out = [
        "test/a.py",
        "unittest/test/a.py",
        "lib/tests/deep/a.py",
        "encodings/cp037.py",
        "idlelib/idle_test/a.py",
    ]
    left_out += ["site-packages/a/b.py", "dist-packages/a.py", "json/__pycache__/a.py", "LICENSE.txt", "lib.so"]
    files(tmp_path, {name: name for name in kept + left_out})
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    found = {document.text.decode(): document.group for document in standard_library(DataConfig())}
    groups = {"os.py": "os", "unittest/case.py": "unittest", "contest/a.py": "contest"}
    assert found == groups | {"json/decoder.py": "json", "json/encoder.py": "json"}
    some = {document.text.decode() for document in standard_library(DataConfig(pattern="json/*"))}
    assert some == {"json/decoder.py", "json/encoder.py"}


def test_the_standard_library_is_real_text() -> None:
    documents = list(standard_library(DataConfig()))
    assert {"json", "asyncio", "os", "typing"} <= {document.group for document in documents}
    corpus = load("stdlib")
    total = len(corpus.train) + len(corpus.validation)
    assert total >= 5_000_000 and corpus.documents == sum(bool(document.text) for document in documents)
    assert 0.04 <= len(corpus.validation) / total <= 0.075
    assert load("stdlib").sha256 == corpus.sha256
    held_out = [d.group for d in documents if len(d.text) > 500 and d.text in corpus.validation.tobytes()]
    trained_on = [d.group for d in documents if len(d.text) > 500 and d.text in corpus.train.tobytes()]
    assert held_out and not set(held_out) & set(trained_on), "a package is on both sides"


def test_too_short_a_split_is_named(tmp_path: Path) -> None:
    corpus = load(files(tmp_path, {"a.txt": "x" * 100}) / "a.txt", validation_fraction=0.1)
    corpus.require(9)
    with pytest.raises(DataError, match=r"validation split has 10 tokens, a sequence needs 11"):
        corpus.require(10)
    with pytest.raises(DataError, match=r"training split has 90 tokens"):
        corpus.require(90)
