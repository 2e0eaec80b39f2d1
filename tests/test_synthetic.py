"""Synthetic tasks: every sample is what its paper says, a function of seed, number and length alone, and only answers
are scored. What runs make of them: test_synthetic_training.py."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from growkit.config.recipe import DataConfig
from growkit.data.shape import StepShape
from growkit.data.stream import Batch, Batches, State
from growkit.data.synthetic.draws import GOLDEN, Draws
from growkit.data.synthetic.source import TaskSource
from growkit.data.synthetic.tasks import (
    EVALUATION_SEED,
    TASKS,
    VALIDATION_SEED,
    AssociativeRecall,
    Induction,
    Needle,
    SelectiveCopying,
    Task,
    task_of,
)
from growkit.errors import ConfigError
from growkit.eval import synthetic
from growkit.eval.synthetic import TaskScore, asked_logits, carries_state, task_sums, wilson
from growkit.models.decoder import DecoderLM, build
from growkit.ops.targets import UNSCORED
from tests.support import model_config, trained_like

MASK = 2**64 - 1
seeds = st.integers(0, 2**64 - 1)
SMALL: list[Task] = [
    SelectiveCopying(values=5, memorise=3),
    Induction(values=4),
    AssociativeRecall(pairs=3, keys=6, values=5),
    Needle(fillers=3, keys=2, values=7, length=3),
]
small_tasks = st.sampled_from(SMALL)


def pairs(task: Task, seed: int, count: int, length: int) -> list[tuple[list[int], dict[int, int]]]:
    """(tokens, place → answer) of each of the first samples."""
    tokens, targets = task.samples(seed, 0, count, length)
    assert tokens.dtype == targets.dtype == np.int64 and tokens.shape == targets.shape == (count, length)
    answers = [{t: int(y) for t, y in enumerate(row) if y != UNSCORED} for row in targets]
    return list(zip(tokens.tolist(), answers, strict=True))


def solved(task: Task, tokens: list[int]) -> dict[int, int]:
    """The answers, found in the tokens by reading them one at a time: what each task asks for, said another way."""
    if isinstance(task, SelectiveCopying):
        noise, marker = task.values, task.values + 1
        values = [token for token in tokens if token not in (noise, marker)]
        asked = [place for place, token in enumerate(tokens) if token == marker]
        assert asked == list(range(len(tokens) - task.memorise, len(tokens)))
        return dict(zip(asked, values, strict=True))
    if isinstance(task, Induction):
        first, last = (place for place, token in enumerate(tokens) if token == task.values)
        assert last == len(tokens) - 1 > first + 1
        return {last: tokens[first + 1]}
    found: dict[int, int] = {}
    if isinstance(task, AssociativeRecall):
        shown = tokens[: 2 * task.pairs]
        value_of = dict(zip(shown[::2], shown[1::2], strict=True))
        assert len(value_of) == task.pairs
        for place in range(2 * task.pairs, len(tokens)):
            if tokens[place]:
                assert place % 2 == 0
                found[place] = value_of.pop(tokens[place])
        assert not value_of, "a key is not asked for"
        return found
    assert isinstance(task, Needle)
    ends = [place for place, token in enumerate(tokens) if task.fillers <= token < task.fillers + task.keys]
    first, asked = ends
    assert tokens[first] == tokens[asked] and asked == len(tokens) - task.length
    values = tokens[first + 1 : first + 1 + task.length]
    assert len(set(values)) == task.length and min(values) >= task.fillers + task.keys
    assert tokens[asked + 1 :] == values[:-1], "what the model has said so far is not before it"
    hay = tokens[:first] + tokens[first + 1 + task.length : asked]
    assert all(token < task.fillers for token in hay)
    return {asked + i: value for i, value in enumerate(values)}


@given(small_tasks, seeds, st.integers(0, 40))
def test_answers_are_those_that_the_tokens_hold(task: Task, seed: int, longer: int) -> None:
    for tokens, answers in pairs(task, seed, 4, task.least_length + longer):
        assert answers == solved(task, tokens)
        assert len(answers) == task.answers
        assert min(tokens) >= 0 and max(tokens) < task.vocab_size and max(answers.values()) < task.vocab_size


@given(small_tasks, seeds, st.integers(0, 10**12), st.integers(0, 20), st.lists(st.integers(1, 7), min_size=1))
def test_a_sample_is_the_same_whatever_is_drawn_beside(
    task: Task, seed: int, first: int, longer: int, sizes: list[int]
) -> None:
    length = task.least_length + longer
    whole = task.samples(seed, first, sum(sizes), length)
    at = first
    for size in sizes:
        part = task.samples(seed, at, size, length)
        rows = slice(at - first, at - first + size)
        assert np.array_equal(part.tokens, whole.tokens[rows]) and np.array_equal(part.targets, whole.targets[rows])
        at += size


@given(seeds, st.integers(0, 10**9), st.integers(1, 9))
def test_draws_are_split_mix(seed: int, sample: int, columns: int) -> None:
    """Against the published generator in plain integers: a start for the sample, then for the call, then numbers."""

    def mixed(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
        return x ^ x >> 31

    draws, golden = Draws(seed, sample, 1), int(GOLDEN)
    key = mixed(mixed(seed) + golden * (sample + 1) & MASK)
    for call in (1, 2):
        start = mixed(key + mixed(call) & MASK)
        wanted = [(mixed(start + golden * i & MASK) >> 11) / 2**53 for i in range(1, columns + 1)]
        assert draws.uniform(columns).tolist() == [wanted]


@given(seeds, st.integers(1, 30), st.data())
def test_different_ones_are_the_first_of_an_order(seed: int, limit: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, limit))
    order = np.argsort(Draws(seed, 0, 3).uniform(limit), axis=1)
    assert np.array_equal(Draws(seed, 0, 3).different(limit, columns), order[:, :columns])


def test_draws_are_even() -> None:
    """Means over 20,000 samples within five standard deviations of what they should be."""
    count, size = 20_000, 6
    for found in (Draws(0, 0, count).below(size, 1), Draws(1, 0, count).different(size, 2)):
        for column in found.T:
            share = np.bincount(column, minlength=size) / count
            assert np.abs(share - 1 / size).max() < 5 * math.sqrt(1 / size / count)
    weights = np.array([5.0, 3.0, 2.0])
    first, second = Draws(2, 0, count).weighted(weights, 2).T
    assert np.abs(np.bincount(first) / count - [0.5, 0.3, 0.2]).max() < 5 * math.sqrt(0.25 / count)
    after = np.bincount(second[first == 0], minlength=3) / (first == 0).sum()
    assert np.abs(after - [0, 0.6, 0.4]).max() < 5 * math.sqrt(0.5 / count), "not in proportion among those left"
    a, b = Draws(3, 0, count).uniform(2).T
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(count)
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 5 / math.sqrt(count), "neighbours are alike"


def test_places_reach_both_ends() -> None:
    length, count = 12, 2000
    tokens = Induction(values=4).samples(0, 0, count, length).tokens
    assert {row.index(4) for row in tokens.tolist()} == set(range(length - 2))
    tokens = Needle(fillers=2, keys=1, values=2, length=2).samples(0, 0, count, length).tokens
    assert {row.index(2) for row in tokens.tolist()} == set(range(length - 2 - 2))
    for depth, place in ((0.0, 0), (0.5, 4), (1.0, 7)):
        tokens = Needle(fillers=2, keys=1, values=2, length=2, depth=depth).samples(0, 0, 5, length).tokens
        assert {row.index(2) for row in tokens.tolist()} == {place}
    tokens = SelectiveCopying(values=3, memorise=2).samples(0, 0, count, length).tokens
    assert {place for row in tokens.tolist() for place in range(10) if row[place] < 3} == set(range(10))
    task = AssociativeRecall(pairs=2, keys=2, values=1)
    asked = {place for _, answers in pairs(task, 0, count, length) for place in answers}
    assert asked == {4, 6, 8, 10}


def test_questions_come_soon_after_the_pairs() -> None:
    """P(g) ∝ g^(power − 1): of one question, so that none is left out of the draw."""
    task = AssociativeRecall(pairs=1, keys=2, values=2, power=0.01)
    places = [next(iter(answers)) for _, answers in pairs(task, 0, 20_000, 18)]
    gaps = np.arange(1, 9) ** -0.99
    share = np.bincount(places, minlength=18)[2::2] / 20_000
    assert np.abs(share - gaps / gaps.sum()).max() < 5 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_any_length_at_once(task: Task) -> None:
    """Long sequences are drawn without a loop over their tokens."""
    ((tokens, answers),) = pairs(task, EVALUATION_SEED, 1, 2**18)
    assert answers == solved(task, tokens)


def test_the_defaults_are_the_papers() -> None:
    assert SelectiveCopying().vocab_size == Induction().vocab_size == 16
    assert SelectiveCopying().answers == 16 and SelectiveCopying().least_length <= 4096
    assert AssociativeRecall().vocab_size == 8193


def test_the_samples_stay_what_they_were() -> None:
    """Scores of another year are of the same sequences. If this must change, VERSION goes up."""
    digest = hashlib.sha256()
    for task in SMALL:
        for seed in (0, VALIDATION_SEED, EVALUATION_SEED):
            for array in task.samples(seed, 5, 9, 31):
                digest.update(array.tobytes())
    assert digest.hexdigest() == "75f3358c408d46a9dd24fd0ff49762bb15b3be48cb0c312804438669f757572c"


def test_scoring_seeds_are_no_runs() -> None:
    """A run's seed is below 2^63; the sequences of the three differ."""
    assert min(VALIDATION_SEED, EVALUATION_SEED) >= 2**63 and VALIDATION_SEED != EVALUATION_SEED
    task = Induction()
    rows = [task.samples(seed, 0, 300, 24).tokens for seed in (0, 1, 2**63 - 1, VALIDATION_SEED, EVALUATION_SEED)]
    assert len({tuple(row) for part in rows for row in part.tolist()}) == 5 * 300


def test_what_a_task_is_called_says_its_settings() -> None:
    assert {task.name for task in SMALL} == set(TASKS)
    tasks = [*SMALL, Induction(values=5), Induction(values=6), Needle(depth=0.5)]
    assert len({task.sha256 for task in tasks}) == len(tasks)
    assert task_of(DataConfig()) is None
    assert task_of(DataConfig(source="synthetic/needle", task={"depth": "0.5"})) == Needle(depth=0.5)


@pytest.mark.parametrize(
    ("fields", "code", "key", "part"),
    [
        ({"source": "synthetic/inducton"}, "unknown-choice", "data.source", "did you mean 'synthetic/induction'"),
        ({"task": {"size": 3}}, "unknown-key", "data.task.size", "values"),
        ({"task": {"values": 0}}, "too-small", "data.task.values", "at least 1"),
        ({"task": {"values": "many"}}, "wrong-type", "data.task.values", "whole number"),
        ({"source": "stdlib", "task": {"values": 3}}, "not-a-task", "data.task", "synthetic/needle"),
        ({"tokenizer": "t.json"}, "not-for-a-task", "data.tokenizer", "'bytes'"),
        ({"validation_fraction": 0.1}, "not-for-a-task", "data.validation_fraction", "0.05"),
        ({"source": "synthetic/needle", "task": {"depth": 1.5}}, "out-of-range", "data.task.depth", "[0, 1]"),
        ({"source": "synthetic/needle", "task": {"values": 3}}, "too-small", "data.task.values", "length = 4"),
        ({"source": "synthetic/associative-recall", "task": {"keys": 3}}, "too-small", "data.task.keys", "pairs = 8"),
        ({"source": "synthetic/associative-recall", "task": {"power": 0}}, "not-positive", "data.task.power", "zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_that_cannot_be(fields: dict[str, Any], code: str, key: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_of(DataConfig(**({"source": "synthetic/induction"} | fields)))
    assert (caught.value.code, caught.value.key) == (code, key)
    assert part in str(caught.value)


@given(small_tasks)
def test_the_least_length_is_the_least(task: Task) -> None:
    for tokens, answers in pairs(task, 0, 3, task.least_length):
        assert answers == solved(task, tokens)
    with pytest.raises(ConfigError, match=rf"use {task.least_length} or more") as caught:
        task.samples(0, 0, 1, task.least_length - 1)
    assert caught.value.code == "context-too-short"


# As a source.


def micro_batches(source: TaskSource, state: State, shape: StepShape, rank: int, world: int, count: int) -> list[Batch]:
    """Two a step."""
    return list(itertools.islice(Batches(source, state, lambda _: shape, 0, 2, rank, world), count))


@given(
    small_tasks,
    seeds,
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 3),
)
@settings(max_examples=40)
def test_processes_share_what_one_would_read(
    task: Task, seed: int, stages: list[tuple[int, int, int]], world: int
) -> None:
    """Stages of other batch sizes and lengths, each from the state of the one before: the next samples, whole."""
    source, state, sample, cursor = TaskSource(task, seed), TaskSource(task, seed).begin(), 0, 0
    for rows, longer, steps in stages:
        length = task.least_length + longer
        shape = StepShape(rows * world * 2, length)
        shares = [micro_batches(source, state, shape, rank, world, 2 * steps) for rank in range(world)]
        for parts in zip(*shares, strict=True):
            wanted = task.samples(seed, sample, rows * world, length)
            assert torch.equal(torch.cat([part.tokens for part in parts]), torch.from_numpy(wanted.tokens))
            assert torch.equal(torch.cat([part.targets for part in parts]), torch.from_numpy(wanted.targets))
            sample, cursor = sample + rows * world, cursor + rows * world * length
            assert [part.state for part in parts] == [{"cursor": cursor, "sample": sample}] * world
            assert all(part.unscored for part in parts) == (task.answers < length)
            assert [part.weight for part in parts] == pytest.approx([1.0] * world)
        state = parts[0].state


# As a score.


class Oracle(nn.Module):
    """Says of each token what ``say`` makes of the row, one-hot."""

    def __init__(self, task: Task, wrong: int = 0) -> None:
        super().__init__()
        self.task, self.wrong, self.seen = task, wrong, 0
        self.rows: set[tuple[int, ...]] = set()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, self.task.vocab_size)
        for i, row in enumerate(tokens.tolist()):
            for place, answer in solved(self.task, row).items():
                logits[i, place, answer] = 50.0
            if self.seen < self.wrong:  # the last answer of the first sequences
                logits[i, place] = logits[i, place].roll(1)
            self.seen += 1
            self.rows.add(tuple(row))
        return logits


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_who_knows_all_is_right_and_one_mistake_costs_the_sequence(task: Task) -> None:
    length, count = task.least_length + 7, 60
    perfect = TaskScore.of(task_sums(Oracle(task), task, EVALUATION_SEED, count, length), task.answers)
    assert (perfect.sequence_accuracy, perfect.token_accuracy, perfect.sequences) == (1.0, 1.0, count)
    assert perfect.loss < 1e-6
    flawed = TaskScore.of(task_sums(Oracle(task, wrong=15), task, EVALUATION_SEED, count, length), task.answers)
    assert flawed.sequence_accuracy == 0.75
    assert flawed.token_accuracy == pytest.approx(1 - 0.25 / task.answers)


class Guess(nn.Module):
    """Knows nothing: the logits of a place are noise of its own."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.values, self.size = task.vocab_size, nn.Parameter(torch.ones(1))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.randn(*tokens.shape, self.values, generator=self.generator)


def test_who_knows_nothing_is_right_by_chance() -> None:
    task, count = Needle(fillers=1, keys=1, values=3, length=2), 4000
    score = TaskScore.of(task_sums(Guess(task), task, VALIDATION_SEED, count, 12), task.answers)
    assert abs(score.token_accuracy - 1 / 5) < 5 * math.sqrt(0.16 / (2 * count))
    assert abs(score.sequence_accuracy - 1 / 25) < 5 * math.sqrt(0.04 / count)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_of_processes_add_up(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some have nothing to score; every one runs as many passes as the others."""
    monkeypatch.setattr(synthetic, "PASS_TOKENS", 40)  # two sequences
    task, count = SelectiveCopying(values=5, memorise=3), 7
    alone = task_sums(Oracle(task, wrong=7), task, EVALUATION_SEED, count, 20)
    models = [Oracle(task, wrong=99) for _ in range(world)]
    shares = [
        task_sums(model, task, EVALUATION_SEED, count, 20, rank=rank, world_size=world)
        for rank, model in enumerate(models)
    ]
    assert torch.allclose(sum(shares), alone)
    assert len({model.seen for model in models}) == 1
    whole = {tuple(row) for row in task.samples(EVALUATION_SEED, 0, count, 20).tokens.tolist()}
    assert whole <= set().union(*(model.rows for model in models)), "a sequence is left out for another one"


def mamba(**fields: Any) -> DecoderLM:
    config = model_config("mamba", vocab_size=16, **fields)
    return build(config, trained_like(config, dtype=torch.float32).params).eval()


@pytest.mark.parametrize("task", [SelectiveCopying(memorise=5), Induction(), Needle(4, 6, 6, 3, depth=0.5)])
def test_a_sequence_in_pieces_is_the_whole_sequence(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits of about 1: sums over pieces that are cut elsewhere differ by a rounding."""
    model = mamba()
    tokens, targets = map(torch.from_numpy, task.samples(EVALUATION_SEED, 0, 3, 150))
    with torch.no_grad():
        whole = asked_logits(model, tokens, targets != UNSCORED)
        one_pass = task_sums(model, task, EVALUATION_SEED, 20, 150)
        assert torch.equal(whole, model(tokens)[targets != UNSCORED])
        for size in (1, 7, 64, 149):
            monkeypatch.setattr(synthetic, "PASS_TOKENS", size)
            pieces = asked_logits(model, tokens, targets != UNSCORED)
            assert (pieces - whole).abs().max() <= 1e-4 * whole.abs().max(), size
        monkeypatch.setattr(synthetic, "PASS_TOKENS", 64)
        assert torch.allclose(task_sums(model, task, EVALUATION_SEED, 20, 150), one_pass, rtol=1e-4)


def most_held(run: Callable[[], object]) -> int:
    """The most bytes that tensors made within ``run`` have held at once."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


def test_memory_of_pieces_does_not_grow_with_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held beside the tokens and the answers. A model with one layer of attention reads a sequence whole, for
    its keys would grow all the same."""
    monkeypatch.setattr(synthetic, "PASS_TOKENS", 64)

    def held(model: DecoderLM, length: int) -> int:
        tokens, targets = map(torch.from_numpy, Induction().samples(EVALUATION_SEED, 0, 1, length))
        asked = targets != UNSCORED
        return most_held(lambda: asked_logits(model, tokens, asked))

    model, hybrid = mamba(), mamba(pattern="mamba+attention")
    assert carries_state(model) and not carries_state(hybrid) and not carries_state(Oracle(Induction()))  # type: ignore[arg-type]
    short, long = held(model, 4 * 64), held(model, 64 * 64)
    assert short == long > 0
    assert held(hybrid, 64 * 64) > 10 * held(hybrid, 4 * 64)


def test_wilsons_interval() -> None:
    """Against the roots of (p̂ − p)² = z² p(1 − p)/n, and figures of Newcombe (1998, table I: 81 of 263, 0 of 20)."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1.0, 20)[0] == pytest.approx(1 - 0.1611, abs=1e-4) and wilson(1.0, 20)[1] == 1.0
    for share, count in ((0.3, 10), (0.999, 1000)):
        for p in wilson(share, count):
            assert (share - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / count)
