"""Batches made by other processes: the same ones, in the same order, whoever makes them and however far ahead."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from growkit.config.recipe import DataConfig
from growkit.data.decomposed import Decomposed
from growkit.data.mixture import Mixture
from growkit.data.shape import StepShape
from growkit.data.stream import Batch, Batches, DataSource, TokenStream
from growkit.data.synthetic.source import TaskSource
from growkit.data.synthetic.tasks import task_of
from growkit.data.workers import InWorkers
from tests.support import in_child, recipe_dict, write_recipe
from tests.test_packing_runs import texts
from tests.test_resume import assert_same_run
from tests.test_rows import corpus, packed

SIZES = [9, 3, 17, 1, 30, 5, 12, 8]
BLOCK = 16
COUNT = 14  # micro-batches that are compared: several turns of the workers


def stream(*, bounded: bool, seed: int = 0) -> TokenStream:
    tokens, starts = corpus(SIZES)
    return TokenStream(tokens, block_tokens=BLOCK, seed=seed, starts=starts if bounded else None)


SOURCES: dict[str, Callable[[], DataSource]] = {
    "stream": lambda: stream(bounded=False),
    "documents": lambda: stream(bounded=True),
    "best_fit": lambda: packed(SIZES, BLOCK, 3),
    "decompose": lambda: Decomposed(*corpus(SIZES), lengths=(4, 8), seed=3),
    "mixture": lambda: Mixture([stream(bounded=False), packed(SIZES, BLOCK, 5)], [3.0, 1.0]),
    "task": lambda: TaskSource(task_of(DataConfig(source="synthetic/induction")), 7),  # type: ignore[arg-type]
}


def growing(step: int) -> StepShape:
    """Another length every second step; of some, rows are cut from longer ones."""
    length = (32, 64)[step // 2 % 2]
    return StepShape(4, length, None, 64 if step % 3 == 1 else None, 64 // length if step % 3 == 1 else 1)


def of_buckets(step: int) -> StepShape:
    return StepShape(4, (4, 8)[step // 2 % 2])


def first(batches: Batches | InWorkers, count: int = COUNT) -> list[Batch]:
    return list(itertools.islice(batches, count))


def assert_same(mine: list[Batch], theirs: list[Batch]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.state == b.state and a.weight == b.weight and a.unscored == b.unscored
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        assert (a.segments is None) == (b.segments is None)
        assert a.segments is None or torch.equal(a.segments, b.segments)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(("workers", "prefetch", "accumulate"), [(1, 1, 1), (3, 2, 2)])
def test_they_are_the_same_batches(kind: str, workers: int, prefetch: int, accumulate: int) -> None:
    source, shape = SOURCES[kind](), of_buckets if kind == "decompose" else growing
    batches = Batches(source, source.begin(), shape, accumulate=accumulate)
    wanted = first(batches)
    state = torch.get_rng_state()
    assert_same(first(InWorkers(batches, workers, prefetch)), wanted)
    assert torch.equal(torch.get_rng_state(), state), "what dropout draws next is another number"
    # Gone on from a state within, by another number of workers and as one of two processes.
    done = 2 * accumulate
    later = Batches(source, wanted[done - 1].state, shape, 2, accumulate)
    assert_same(first(InWorkers(later, workers + 1, prefetch), COUNT - done), wanted[done:])
    half = Batches(source, wanted[done - 1].state, shape, 2, accumulate, rank=1, world_size=2)
    assert_same(first(InWorkers(half, workers, prefetch), 4), first(half, 4))


def test_a_run_is_the_same_whoever_makes_its_batches(tmp_path: Path) -> None:
    small = recipe_dict(tmp_path, monitor={"ngram_order": 0, "sample_tokens": 0, "validation_tokens": 64})
    small["data"] = {"source": texts(tmp_path / "texts", "abc"), "packing": "best_fit", "validation_fraction": 0.2}
    path = write_recipe(tmp_path, small)
    assert in_child("train", path, "run.name=alone") == 0
    assert in_child("train", path, "run.name=helped", "data.workers=2") == 0
    assert_same_run(tmp_path / "runs" / "helped", tmp_path / "runs" / "alone")
    env = {"GROWKIT_FAULT": "after_rename:2"}
    assert in_child("train", path, "run.name=stopped", "data.workers=2", env=env) == -signal.SIGKILL
    assert in_child("resume", tmp_path / "runs" / "stopped") == 0
    assert_same_run(tmp_path / "runs" / "stopped", tmp_path / "runs" / "alone")
