"""Rows of documents: packed, mixed, bounded; every pair of tokens given once an epoch, whatever shape steps have and
however many processes share them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from growkit.data.mixture import Mixture
from growkit.data.packing import Packed
from growkit.data.shape import StepShape
from growkit.data.stream import Batches, DataSource, Rows, State, TokenStream
from growkit.models.decoder import build, init_params
from growkit.models.visible import visible
from growkit.ops.targets import UNSCORED
from tests.support import model_config, trained_like

SAME_LOGITS = 1e-11  # float64, sums in another order
documents = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) + len(sizes) > 2)
steps = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20)), min_size=1, max_size=8)
seeds = st.integers(0, 2**63 - 1)


def corpus(sizes: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(token i is i, so that a token says where it comes from; where documents of ``sizes`` tokens begin, an end token
    between them)."""
    starts = np.concatenate(([0], np.cumsum(np.array(sizes[:-1], dtype=np.int64) + 1))).astype(np.int64)
    return np.arange(sum(sizes) + len(sizes) - 1, dtype=np.int32), starts


def packed(sizes: Sequence[int], block: int, seed: int, *, shuffle: bool = True) -> Packed:
    tokens, starts = corpus(sizes)
    return Packed(tokens, starts, block_tokens=block, seed=seed, shuffle=shuffle)


def stored(state: State) -> Any:
    """As it comes back from a checkpoint."""
    return json.loads(json.dumps(state))


def taken(source: DataSource, shapes: Sequence[tuple[int, int]]) -> tuple[list[Rows], State]:
    found, state = [], source.begin()
    for rows, context in shapes:
        given_rows, state = source.take(stored(state), rows, context, slice(None))
        assert given_rows.tokens.shape == given_rows.targets.shape == (rows, context)
        found.append(given_rows)
    return found, state


def scored(rows: Rows) -> list[int]:
    """The tokens whose next one is predicted, after a check that the targets are those."""
    at = rows.targets != UNSCORED
    assert torch.equal(rows.targets[at], rows.tokens[at] + 1)
    assert int(at.sum()) == rows.scored
    return rows.tokens[at].tolist()


@given(documents, st.integers(1, 40), seeds, st.booleans(), steps)
def test_packed_rows_give_every_pair_of_the_pieces_once(
    sizes: list[int], block: int, seed: int, shuffle: bool, shapes: list[tuple[int, int]]
) -> None:
    """Across changes of shape, through JSON: what was given out and what waits is what was drawn."""
    source = packed(sizes, block, seed, shuffle=shuffle)
    found, state = taken(source, shapes)
    pairs = Counter(itertools.chain.from_iterable(map(scored, found)))
    waiting = Counter(i for begin, end in state["waiting"] for i in range(begin, end))
    epochs, rest = divmod(state["pieces"], len(source.begins))
    whole = Counter(range(len(source.tokens) - 1))
    drawn = Counter(i for n in range(rest) for i in range(*source._piece(epochs * len(source.begins) + n)))
    assert pairs + waiting == drawn + Counter({pair: count * epochs for pair, count in whole.items() if epochs})
    assert state["cursor"] == sum(pairs.values())
    assert state["padding"] == sum(rows * context for rows, context in shapes) - state["cursor"]


@given(documents, st.integers(1, 40), seeds, steps)
def test_segments_of_packed_rows_are_pieces_of_one_document(
    sizes: list[int], block: int, seed: int, shapes: list[tuple[int, int]]
) -> None:
    source = packed(sizes, block, seed)
    _, starts = corpus(sizes)
    for rows in taken(source, shapes)[0]:
        assert rows.segments is not None and rows.segments.dtype == torch.int32
        for tokens, targets, segments in zip(rows.tokens, rows.targets, rows.segments, strict=True):
            assert segments[0] == 0 and set(segments.diff().tolist()) <= {0, 1}
            for number in segments.unique():
                own = tokens[segments == number]
                padding = (targets[segments == number] == UNSCORED).tolist()
                assert all(padding) or not any(padding)
                if not padding[0]:
                    assert set(own.diff().tolist()) <= {1}
                    assert len(set(np.searchsorted(starts[1:] - 1, own.numpy(), side="right"))) == 1


def slow_row(waiting: list[tuple[int, int]], context: int) -> list[tuple[int, int]]:
    """Best fit as the paper says it, looking at every piece every time."""
    row, left = [], context
    at = 0
    while True:
        begin, end = waiting.pop(at)
        row.append((begin, min(end, begin + left)))
        if end > begin + left:
            waiting.insert(at, (begin + left, end))
        left -= row[-1][1] - row[-1][0]
        fitting = [(end - begin, -place) for place, (begin, end) in enumerate(waiting) if end - begin <= left]
        if not fitting or not left:
            return row
        at = -max(fitting)[1]


@given(documents, st.integers(1, 40), seeds, steps)
def test_packing_is_best_fit(sizes: list[int], block: int, seed: int, shapes: list[tuple[int, int]]) -> None:
    source = packed(sizes, block, seed)
    waiting: list[tuple[int, int]] = []
    drawn = 0
    for rows, (count, context) in zip(taken(source, shapes)[0], shapes, strict=True):
        for row in range(count):
            while sum(end - begin for begin, end in waiting) < 32 * context:
                waiting.append(source._piece(drawn))
                drawn += 1
            wanted = [i for begin, end in slow_row(waiting, context) for i in range(begin, end)]
            assert rows.tokens[row, : len(wanted)].tolist() == wanted
            assert (rows.targets[row, len(wanted) :] == UNSCORED).all()


def test_packing_wastes_little() -> None:
    """Of documents a third of a row long on average, less than two positions in a hundred; one to a row: two in
    three."""
    sizes = np.random.default_rng(0).integers(10, 180, size=400).tolist()
    _, state = taken(packed(sizes, 256, 0), [(16, 256)] * 5)
    assert state["padding"] < 0.02 * 16 * 256 * 5


@given(documents, st.integers(1, 40), seeds, st.integers(1, 4), st.integers(1, 20))
def test_segments_of_a_stream_end_with_documents_and_blocks(
    sizes: list[int], block: int, seed: int, rows: int, context: int
) -> None:
    tokens, starts = corpus(sizes)
    source = TokenStream(tokens, block_tokens=block, seed=seed, starts=starts)
    plain = TokenStream(tokens, block_tokens=block, seed=seed)
    ends = set((starts[1:] - 1).tolist())
    state: State = {"cursor": seed % 1000}
    found, after = source.take(state, rows, context, slice(None))
    without, other = plain.take(state, rows, context, slice(None))
    assert torch.equal(found.tokens, without.tokens) and torch.equal(found.targets, without.targets)
    assert after == other and without.segments is None and found.segments is not None
    for of_row, segments in zip(found.tokens.tolist(), found.segments.tolist(), strict=True):
        wanted = [0]
        for before, now in itertools.pairwise(of_row):
            wanted.append(wanted[-1] + (now in ends or now != before + 1))
        assert segments == wanted


# Mixtures.


def mixed(weights: Sequence[float], seed: int = 0) -> Mixture:
    sources: list[DataSource] = [
        TokenStream(np.arange(at * 1000, at * 1000 + 90), block_tokens=7, seed=seed) for at in range(len(weights) - 1)
    ]
    tokens, starts = corpus([5, 17, 3, 40])
    last = Packed(tokens + 1000 * len(sources), starts, block_tokens=30, seed=seed)
    return Mixture([*sources, last], weights)


shares = st.lists(st.floats(0.01, 100), min_size=1, max_size=4)


@given(shares, steps)
def test_a_mixture_keeps_its_shares_and_each_source_its_order(
    weights: list[float], shapes: list[tuple[int, int]]
) -> None:
    source = mixed(weights)
    found, state = taken(source, shapes)
    states: list[State] = [one.begin() for one in source.sources]
    counts = np.zeros(len(weights))
    for rows, (count, context) in zip(found, shapes, strict=True):
        for row in range(count):
            number = int(rows.tokens[row, 0]) // 1000
            alone, states[number] = source.sources[number].take(states[number], 1, context, slice(None))
            assert torch.equal(rows.tokens[row], alone.tokens[0]) and torch.equal(rows.targets[row], alone.targets[0])
            counts[number] += 1
            assert (abs(counts - counts.sum() * source.shares) < 1).all()
    assert stored(state["sources"]) == stored(states)
    assert state["cursor"] == sum(one["cursor"] for one in states)


def test_rows_of_a_source_without_documents_are_one_segment_in_a_mixture() -> None:
    rows, _ = mixed([1.0, 1.0]).take(mixed([1.0, 1.0]).begin(), 4, 20, slice(None))
    assert rows.segments is not None
    assert [int(segments.max()) > 0 for segments in rows.segments] == [False, True, False, True]


# Sharing, and what a micro-batch weighs.


def all_sources() -> list[DataSource]:
    tokens, starts = corpus([5, 17, 3, 40, 1, 9])
    return [
        TokenStream(tokens, block_tokens=7, seed=1),
        TokenStream(tokens, block_tokens=7, seed=1, starts=starts),
        Packed(tokens, starts, block_tokens=11, seed=1),
        mixed([1.0, 3.0]),
    ]


@pytest.mark.parametrize("source", all_sources(), ids=lambda source: type(source).__name__)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 12), st.data())
def test_a_step_has_the_same_rows_however_it_is_cut(
    source: DataSource, world: int, accumulate: int, other_world: int, rows: int, context: int, data: st.DataObject
) -> None:
    """Resumed with another number of processes and of micro-batches, no token is seen twice and none is lost."""
    rows = max(rows, world * accumulate, other_world)
    shape = lambda step: StepShape(rows + step % 2, context)  # noqa: E731
    alone = list(itertools.islice(Batches(source, source.begin(), shape), 5))
    cut = data.draw(st.integers(0, 3))
    found: list[torch.Tensor] = []
    state = source.begin()
    for step in range(5):
        parts = (world, accumulate) if step <= cut else (other_world, 1)
        readers = [
            itertools.islice(Batches(source, stored(state), shape, step, parts[1], rank, parts[0]), parts[1])
            for rank in range(parts[0])
        ]
        batches = list(zip(*readers, strict=True))
        assert len({json.dumps(batch.state) for batch in batches[-1]}) == 1
        state = batches[-1][0].state
        found.append(torch.cat([batch.tokens for micro in batches for batch in micro]))
        weights = [batch.weight for micro in batches for batch in micro]
        counts = [int((batch.targets != UNSCORED).sum()) for micro in batches for batch in micro]
        assert weights == pytest.approx([count * len(counts) / sum(counts) for count in counts], rel=1e-12)
    for step, batch in enumerate(alone):
        assert torch.equal(found[step], batch.tokens) and batch.weight == 1.0
    assert state == alone[-1].state


# What documents and windows hide.


PACKED: dict[str, dict[str, Any]] = {
    "transformer": {},
    "tokenformer": {},
    "mamba": {},
    "mamba-hybrid": {"pattern": "mamba+attention", "projection": "pattention"},
    "transformer-altup": {"altup_blocks": 2},
}


def test_a_document_is_predicted_as_if_it_were_alone() -> None:
    """In every family that there is: logits and gradients of packed rows are those of each document by itself."""
    for family, fields in PACKED.items():
        config = model_config(family.partition("-")[0], **fields)
        model = build(config, trained_like(config, dtype=torch.float64).params)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (2, 24), generator=generator)
        segments = torch.tensor([[0] * 5 + [1] * 12 + [2] * 7, [0] * 23 + [1]], dtype=torch.int32)
        together = model(tokens, mask=visible(tokens, segments, None))
        for row, own in enumerate(segments):
            for number in own.unique():
                at = own == number
                alone = model(tokens[row : row + 1, at])
                assert (together[row, at] - alone[0]).abs().max() <= SAME_LOGITS * alone.abs().max()


def test_a_window_hides_what_is_further_back() -> None:
    """Of two layers, what is 2 × (window − 1) back and nearer; that is said by gradients of the embedding."""
    config = model_config("transformer")
    assert len(config.layers) == 2
    model = build(config, init_params(config, torch.Generator().manual_seed(0)))
    tokens = torch.arange(20)[None] % config.vocab_size
    for window, reach in ((4, 6), (1, 0), (20, 19), (99, 19)):
        seen: list[torch.Tensor] = []
        handle = model.embedding.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        logits = model(tokens, mask=visible(tokens, None, window))
        handle.remove()
        (gradient,) = torch.autograd.grad(logits[0, -1].square().sum(), seen[0])
        felt = (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0]
        assert felt.min() == 19 - reach and len(felt) == reach + 1


def test_blocks_for_a_gpu_show_the_same_keys() -> None:
    """FlexAttention, uncompiled, forward: what runs of it without a GPU."""
    config = model_config("transformer", num_kv_heads=1)
    model = build(config, trained_like(config, dtype=torch.float64).params)
    tokens = torch.randint(config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 11 + [1] * 19, [0] * 30])
    for own, window in ((segments, None), (None, 7), (segments, 7)):
        with torch.no_grad():
            masks = (visible(tokens, own, window, blocks=blocks) for blocks in (False, True))
            plain, blocked = (model(tokens, mask=mask) for mask in masks)
        assert (plain - blocked).abs().max() <= SAME_LOGITS * plain.abs().max()


def test_unscored_targets_are_left_out_of_the_loss() -> None:
    """With chunks and without, and of the z-loss too."""
    config = model_config("transformer")
    model = build(config, trained_like(config, dtype=torch.float64).params)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(config.vocab_size, (3, 10), generator=generator) for _ in range(2))
    targets[0, 2:] = targets[2] = UNSCORED
    at = targets != UNSCORED
    logits = model(tokens)[at]
    nats = torch.nn.functional.cross_entropy(logits, targets[at])
    wanted = nats + 0.1 * logits.logsumexp(-1).square().mean()
    for chunk in (0, 4):
        loss = model(tokens, targets, unscored=True, z_loss=0.1, chunk_tokens=chunk)
        assert torch.allclose(loss.total, wanted, rtol=1e-12) and torch.allclose(loss.cross_entropy, nats, rtol=1e-12)
    assert model(tokens, torch.full_like(targets, UNSCORED), unscored=True).total == 0
