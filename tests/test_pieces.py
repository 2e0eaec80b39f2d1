"""Dataset decomposition: every pair of tokens in one piece, every row from one bucket, whatever shape steps have and
however many processes share them; runs on it are stopped and resumed bitwise."""

from __future__ import annotations

import itertools
import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from growkit.checkpoint.run_folder import RunFolder
from growkit.data.decomposed import Decomposed
from growkit.data.mixture import Mixture
from growkit.data.pieces import pieces_of
from growkit.data.shape import StepShape
from growkit.data.stream import Batches, DataSource, State, joined
from growkit.schedule.pieces import same_pieces
from tests.support import cli, in_child, recipe_dict, records, write_recipe
from tests.test_resume import assert_same_run
from tests.test_rows import corpus, stored

documents = st.lists(st.integers(1, 60), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) + len(sizes) > 2)
starts_of = st.integers(1, 5)
doublings = st.integers(1, 4)
seeds = st.integers(0, 2**63 - 1)


def lengths_from(start: int, count: int) -> list[int]:
    return [start * 2**power for power in range(count)]


def decomposed(sizes: Sequence[int], lengths: Sequence[int], seed: int, *, shuffle: bool = True) -> Decomposed:
    tokens, starts = corpus(sizes)
    return Decomposed(tokens, starts, lengths=lengths, seed=seed, shuffle=shuffle)


def document_of(sizes: Sequence[int], at: Sequence[int] | NDArray[np.int64]) -> list[int]:
    """Of pairs; the end token before a document is the first of its pairs."""
    found: list[int] = np.searchsorted(corpus(sizes)[1][1:] - 1, at, side="right").tolist()
    return found


@given(documents, starts_of, doublings)
def test_documents_are_cut_by_their_binary_digits(sizes: list[int], start: int, count: int) -> None:
    """Every pair is in one piece or tail; a document of n pairs has a piece of start · 2^k where n // start has the
    digit 2^k, longest first, and as many of the longest as it holds."""
    tokens, starts = corpus(sizes)
    pieces = pieces_of(starts, len(tokens) - 1, lengths_from(start, count))
    spans = [(int(begin), length) for length, begins in pieces.begins.items() for begin in begins]
    spans += zip(pieces.tails.tolist(), pieces.tail_sizes.tolist(), strict=True)
    assert sorted(i for begin, size in spans for i in range(begin, begin + size)) == list(range(len(tokens) - 1))
    assert sum(pieces.pairs(length) for length in pieces.begins) == len(tokens) - 1
    for number in range(len(sizes)):
        pairs = sizes[number] + (number > 0) - (number == len(sizes) - 1)  # the end before it; after the last is none
        mine = sorted(span for span in spans if document_of(sizes, [span[0]]) == [number])
        assert all(set(document_of(sizes, range(begin, begin + size))) == {number} for begin, size in mine)
        many, rest = divmod(pairs // start, 2 ** (count - 1))
        wanted = [start * 2 ** (count - 1)] * many
        wanted += [start * 2**power for power in reversed(range(count - 1)) if rest >> power & 1]
        wanted += [pairs % start] if pairs % start else []
        assert [size for _, size in mine] == wanted


@given(documents, starts_of, doublings, seeds, st.booleans())
def test_a_bucket_gives_each_of_its_pairs_once_an_epoch(
    sizes: list[int], start: int, count: int, seed: int, shuffle: bool
) -> None:
    source = decomposed(sizes, lengths_from(start, count), seed, shuffle=shuffle)
    for length, begins in source.pieces.begins.items():
        pairs = source.pieces.pairs(length)
        if not pairs:
            continue
        # As many rows as the bucket has pairs are ``length`` epochs of it, whatever tails are joined.
        rows, state = source.take(stored(source.begin()), pairs, length, slice(None))
        assert torch.equal(rows.targets, rows.tokens + 1) and rows.scored == rows.tokens.numel() == state["cursor"]
        own = {i for begin in begins.tolist() for i in range(begin, begin + length)}
        tails = set()
        if length == start:
            spans = zip(source.pieces.tails.tolist(), source.pieces.tail_sizes.tolist(), strict=True)
            tails = {i for begin, size in spans for i in range(begin, begin + size)}
        assert Counter(rows.tokens.flatten().tolist()) == Counter(dict.fromkeys(own | tails, length))
        assert state["joined"] == len(tails) * length
        epoch = rows.tokens[: pairs // length].flatten().tolist()
        assert len(set(epoch)) == len(epoch), "a pair came twice in an epoch"
        if not shuffle and len(begins):
            assert rows.tokens[: len(begins), 0].tolist() == begins.tolist()


@given(documents, starts_of, doublings, seeds)
def test_rows_are_of_one_document(sizes: list[int], start: int, count: int, seed: int) -> None:
    """Rows of tails too, as far as attention sees: their segments are."""
    source = decomposed(sizes, lengths_from(start, count), seed)
    for length in source.pieces.begins:
        if not source.pieces.pairs(length):
            continue
        rows, _ = source.take(source.begin(), 12, length, slice(None))
        assert (rows.segments is not None) == (length == start)
        segments = torch.zeros_like(rows.tokens) if rows.segments is None else rows.segments
        for row, own in zip(rows.tokens, segments, strict=True):
            for number in own.unique():
                piece = row[own == number].tolist()
                assert piece == list(range(piece[0], piece[0] + len(piece)))
                assert len(set(document_of(sizes, piece))) == 1


def test_an_epoch_is_in_an_order_of_its_own() -> None:
    sizes = [40] * 30
    for length in (4, 8):
        source = decomposed(sizes, [4, 8, 16], 3)
        rows = source.pieces.pairs(length) // length
        first, state = source.take(source.begin(), rows, length, slice(None))
        second, _ = source.take(state, rows, length, slice(None))
        other, _ = decomposed(sizes, [4, 8, 16], 4).take(source.begin(), rows, length, slice(None))
        assert not torch.equal(first.tokens, second.tokens) and not torch.equal(first.tokens, other.tokens)


# Sharing.

SIZES = [5, 17, 3, 40, 1, 9, 31]


def sources() -> list[DataSource]:
    alone = decomposed(SIZES, [3, 6, 12], 1)
    tokens, starts = corpus([20, 8, 50])
    other = Decomposed(tokens + 1000, starts, lengths=[3, 6, 12], seed=1)
    return [alone, Mixture([alone, other], [1.0, 3.0])]


@pytest.mark.parametrize("source", sources(), ids=lambda source: type(source).__name__)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.sampled_from([3, 6, 12]), min_size=6, max_size=6),
    st.integers(0, 4),
)
def test_a_step_has_the_same_rows_however_it_is_cut(
    source: DataSource, world: int, accumulate: int, other_world: int, rows: int, lengths: list[int], cut: int
) -> None:
    """Resumed with another number of processes and of micro-batches, no token is seen twice and none is lost."""
    rows = max(rows, world * accumulate, other_world)
    shape = lambda step: StepShape(rows + step % 2, lengths[step])  # noqa: E731
    alone = list(itertools.islice(Batches(source, source.begin(), shape), 6))
    state = source.begin()
    for step in range(6):
        parts = (world, accumulate) if step <= cut else (other_world, 1)
        readers = [
            itertools.islice(Batches(source, stored(state), shape, step, parts[1], rank, parts[0]), parts[1])
            for rank in range(parts[0])
        ]
        batches = list(zip(*readers, strict=True))
        assert len({json.dumps(batch.state) for batch in batches[-1]}) == 1
        state = batches[-1][0].state
        flat = [batch for micro in batches for batch in micro]
        assert torch.equal(torch.cat([batch.tokens for batch in flat]), alone[step].tokens)
        assert (alone[step].segments is None) == (flat[0].segments is None)
        if alone[step].segments is not None:
            assert torch.equal(torch.cat([b.segments for b in flat if b.segments is not None]), alone[step].segments)
        assert not any(batch.unscored for batch in flat)
    assert state == alone[-1].state and joined(state) == joined(alone[-1].state)


def test_a_state_says_which_lengths_it_is_of() -> None:
    (alone, mixture), lengths = sources(), (3, 6, 12)
    for source in (alone, mixture):
        state: State = json.loads(json.dumps(source.begin(), sort_keys=True))  # where 12 is before 3
        assert same_pieces(lengths, state)
        assert not same_pieces((3, 6), state) and not same_pieces((3, 6, 24), state)
    assert same_pieces((7,), {}) and same_pieces((7,), {"cursor": 3})


# Runs.


def texts(folder: Path, letters: str) -> str:
    """A folder of documents of 5 to 150 bytes."""
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text((letters * 60)[number : number + 5 + number * 37 % 146])
    return str(folder)


STAGES: list[dict[str, Any]] = [
    {
        "name": "short",
        "duration": "6 steps",
        "context_length": 32,
        "global_batch_tokens": 128,
        "micro_batch_size": 2,
        "context": {"schedule": "buckets", "start": 8, "odds": [2, 1, 1]},
    },
    {
        "name": "rising",
        "duration": "4 steps",
        "grow": {"attention_tokens": 12},
        "context": {"schedule": "discrete", "start": 16, "at": {"50%": 32}},
    },
    {"name": "long", "duration": "3 steps", "micro_batch_size": 2},  # one length: the bucket of it
]


def recipe(folder: Path, data: dict[str, Any], stages: list[dict[str, Any]] = STAGES) -> Path:
    small = recipe_dict(folder, monitor={"ngram_order": 0, "sample_tokens": 0, "validation_tokens": 64})
    small["data"] = {"packing": "decompose", "validation_fraction": 0.2} | data
    small["trainer"] |= {"save_every": "3 steps"}
    return write_recipe(folder, small | {"stages": stages})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pieces")
    path = recipe(folder, {"source": texts(folder / "texts", "abcdefg")})
    assert in_child("train", path, "run.name=whole") == 0
    return path, folder / "runs" / "whole"


def test_stopped_in_every_stage(whole: tuple[Path, Path]) -> None:
    path, reference = whole
    run = reference.parent / "stopped"
    command: tuple[object, ...] = ("train", path, "run.name=stopped")
    for nth, index in ((1, 0), (3, 1)):  # saves: every 3 steps, and ends of stages
        assert in_child(*command, env={"GROWKIT_FAULT": f"after_rename:{nth}"}) == -signal.SIGKILL
        saved = RunFolder.open(run).load().manifest.progress
        assert saved.stage == index and saved.stage_step > 0
        command = ("resume", run)
    assert in_child(*command) == 0
    assert_same_run(run, reference)
    progress = RunFolder.open(reference).load().manifest.progress
    assert progress.cursor == progress.tokens == sum(int(length) * n for length, n in progress.data["rows"].items())
    tails = [record["joined_tokens"] for record in records(reference, "step")]
    assert tails == sorted(tails) and 0 < tails[-1] == joined(progress.data) < progress.tokens
    assert all("padding" not in record for record in records(reference, "step"))


def test_a_mixture_whose_lengths_a_bandit_chooses(tmp_path: Path) -> None:
    sources = [{"source": texts(tmp_path / name, name), "weight": weight} for name, weight in (("abc", 3), ("xyz", 1))]
    stage = STAGES[0] | {"context": STAGES[0]["context"] | {"odds": [1, 1, 1]}}
    path = recipe(tmp_path, {"mixture": sources, "bandit": {"over": "lengths"}}, [stage])
    assert in_child("train", path, "run.name=whole") == 0
    env = {"GROWKIT_FAULT": "after_rename:1"}
    assert in_child("train", path, "run.name=stopped", env=env) == -signal.SIGKILL
    assert in_child("resume", tmp_path / "runs" / "stopped") == 0
    assert_same_run(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole")
    lengths = [record["context_length"] for record in records(tmp_path / "runs" / "whole", "step")]
    assert len(set(lengths)) > 1


def test_other_lengths_are_another_order(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """A run that was stopped keeps its lengths; an extended one with others reads from the beginning."""
    path, reference = whole
    run = reference.parent / "changed"
    env = {"GROWKIT_FAULT": "after_rename:1"}
    assert in_child("train", path, "run.name=changed", env=env) == -signal.SIGKILL
    saved = run / "recipe.yaml"
    head, _, last = saved.read_text().rpartition("context_length: 32")  # of the last stage
    saved.write_text(f"{head}context_length: 64{last}")
    code, _, err = cli("resume", run)
    assert code == 2 and "[recipe-changed]" in err and "lengths" in err
    more = tmp_path / "more.yaml"
    for length, afresh in ((32, False), (64, True)):
        context = f"{{schedule: buckets, start: 8, odds: {[1] * (3 + afresh)}}}"
        stage = f"{{name: more, duration: 2 steps, context_length: {length}, context: {context}, micro_batch_size: 2}}"
        more.write_text(f"stages:\n  - {stage}\n")
        code, _, err = cli("extend", reference, more, f"run.name=more-{length}")
        assert code == 0, err
        progress = RunFolder.open(reference.parent / f"more-{length}").load().manifest.progress
        assert (progress.cursor == progress.tokens) != afresh


def test_preparing_shows_what_each_length_has(whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = cli("data", "prepare", whole[0])
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.rstrip().endswith("%")}
    assert list(rows) == ["8", "16", "32", "left"]
    assert sum(float(rows[length].rstrip("%")) for length in ("8", "16", "32")) == pytest.approx(100, abs=0.2)
