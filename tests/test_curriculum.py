"""Context lengths and windows within a stage: each schedule against its formula, what steps of different lengths come
to, the learning rate by tokens, and the rows that are read. Runs and resumes: test_curriculum_runs.py."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.config.load import parse_recipe, to_yaml
from growkit.config.recipe import ContextConfig, CurriculumConfig
from growkit.data.shape import StepShape
from growkit.data.stream import Batches, TokenStream
from growkit.duration import Duration
from growkit.models.presets import PRESETS
from growkit.report.schedule_picture import points, schedule_lines
from growkit.schedule.curriculum import Curriculum, Drawn, Lengths, Pace, Rising, fewest, nearest
from growkit.schedule.lr import LRSchedule
from growkit.schedule.plan import growth_schedule, settled
from growkit.schedule.stage import GrowthSchedule, Stage
from tests.support import cli, model_config, recipe_dict, write_recipe

MODEL = model_config("transformer")


def deepspeed(step: int, total: int, low: int, high: int, multiple: int, root: float) -> int:
    """deepspeed/runtime/data_pipeline/curriculum_scheduler.py, __fixed_root_get_difficulty."""
    next_difficulty = (float(step) / total) ** (1.0 / root)
    next_difficulty = math.floor(next_difficulty * (high - low) + low)
    next_difficulty -= next_difficulty % multiple
    return min(next_difficulty, high)


def lengths_of(config: CurriculumConfig, longest: int, whole: int, pace: Pace | None = None) -> Lengths:
    made = Curriculum(config, "stages.0.context", longest, "0/0")
    return made.require(whole, pace or Pace(MODEL, 8, longest, 1))


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([("linear", 1.0), ("root", 2.0), ("root", 3.0), ("root", 0.5)]),
)
def test_linear_and_root_are_deepspeeds(low: int, more: int, total: int, kind: tuple[str, float]) -> None:
    """A window has every multiple; a context's lengths are those, down to the next of at most six."""
    start, longest = 8 * low, 8 * (low + more)
    schedule, root = kind
    said: dict[str, Any] = {"schedule": schedule, "start": start, "over": f"{total} steps"}
    said |= {"root": root} if schedule == "root" else {}
    window = lengths_of(CurriculumConfig(**said), longest, 2 * total)
    context = lengths_of(ContextConfig(**said), longest, 2 * total)
    assert len(context.values) <= 6
    rungs = set(Curriculum(ContextConfig(**said), "k", longest, "")._rungs())
    assert {start, longest} <= rungs and len(rungs) == min(6, more + 1)
    for step in range(2 * total):
        exact = deepspeed(step, total, start, longest, 8, root) if step < total else longest
        assert window.at(step) == exact, step
        assert context.at(step) == max(rung for rung in rungs if rung <= exact)


@given(st.integers(1, 20), st.integers(1, 200), st.integers(1, 300))
def test_exponential(low: int, more: int, total: int) -> None:
    start, longest = 8 * low, 8 * (low + more)
    made = lengths_of(CurriculumConfig("exponential", start, f"{total} steps"), longest, total + 1)
    for step in range(total):
        value = math.floor(start * (longest / start) ** (step / total) + 1e-9)
        assert made.at(step) == value - value % 8
    assert made.at(total) == longest
    context = lengths_of(ContextConfig("exponential", start, f"{total} steps"), longest, total + 1)
    assert len(context.values) <= 6 and all(context.at(step) <= made.at(step) for step in range(total + 1))


def test_lengths_that_double_double() -> None:
    made = lengths_of(ContextConfig("exponential", 64, "100 steps"), 2048, 200)
    assert made == Rising((0, 20, 40, 60, 80, 100), (64, 128, 256, 512, 1024, 2048))


def test_composers_warm_up() -> None:
    """Linear from 8 over the first 30 %, each length a multiple of 8: the share of the whole, rounded down."""
    made = lengths_of(CurriculumConfig("linear", 8, "30%"), 512, 1000)
    for step in range(300):
        assert made.at(step) == (8 + 504 * step // 300) // 8 * 8
    assert made.at(299) == 504 and made.at(300) == made.at(999) == 512


def test_discrete_lists() -> None:
    """DeepSpeed's difficulty [16, 32, 64], max_step [5, 8]: the step t, from 1, has the first whose max_step is ≥ t."""
    made = lengths_of(ContextConfig("discrete", 16, at={"5 steps": 32, "80%": 64}), 64, 10)
    assert [made.at(step) for step in range(10)] == [16] * 5 + [32] * 3 + [64] * 2


def test_places_in_tokens_and_flops() -> None:
    """They count what the steps before them really train on: 8 rows, whatever their length."""
    pace = Pace(MODEL, 8, 64, 1, constant="rows")
    flops = [MODEL.flops_per_token(16) * 8 * 16, MODEL.flops_per_token(32) * 8 * 32]
    at = {"500 tokens": 32, f"{4 * flops[0] + 2.4 * flops[1]} flops": 64}
    made = lengths_of(ContextConfig("discrete", 16, at=at, constant="rows"), 64, 20, pace)
    assert made == Rising((0, 4, 6), (16, 32, 64))
    over = lengths_of(ContextConfig("linear", 16, "5k tokens", constant="rows"), 64, 40, pace)
    assert isinstance(over, Rising)
    span = over.starts[-1]
    assert pace.tokens(over, span) >= 5000 > pace.tokens(over, span - 1)


odds = st.lists(st.integers(1, 9), min_size=2, max_size=6)


@given(odds, st.integers(1, 300), st.integers(0, 3))
def test_buckets_keep_their_odds(counts: list[int], steps: int, seed: int) -> None:
    longest = 8 * 2 ** (len(counts) - 1)
    config = ContextConfig("buckets", 8, odds=counts)
    made = Curriculum(config, "k", longest, f"{seed}/0").lengths(steps, Pace(MODEL, 8, longest, 1))
    assert isinstance(made, Drawn) and made.values == tuple(8 * 2**power for power in range(len(counts)))
    once = [made.at(step) for step in range(steps)]
    assert once == [made.at(step) for step in range(steps)]
    assert dict(made.counts(steps)) == dict.fromkeys(made.values, 0) | Counter(once)
    for turn in range(steps // sum(counts)):
        deck = once[turn * sum(counts) : (turn + 1) * sum(counts)]
        assert [deck.count(value) for value in made.values] == counts


def test_buckets_are_shuffled_by_their_seed() -> None:
    """What a seed draws must not move with a version of anything: it is part of what a run can resume."""
    first, other = (Drawn((8, 16), (2, 1), seed) for seed in ("0/0", "1/0"))
    drawn = [[deck.at(step) for step in range(12)] for deck in (first, other)]
    assert drawn[0] != drawn[1]
    assert drawn[0] == [8, 8, 16, 16, 8, 8, 8, 8, 16, 8, 8, 16]


@given(st.dictionaries(st.integers(1, 50), st.integers(1, 99), max_size=5), st.integers(0, 80))
def test_counts_are_of_the_steps(rises: dict[int, int], steps: int) -> None:
    starts = (0, *sorted(rises))
    values = tuple(itertools.accumulate([8, *rises.values()]))
    made = Rising(starts, values)
    assert dict(made.counts(steps)) == dict.fromkeys(values, 0) | Counter(made.at(step) for step in range(steps))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 100))
def test_the_fewest_and_the_nearest_steps(sizes: list[int], amount: int) -> None:
    sums = list(itertools.accumulate(sizes * (200 // len(sizes) + 1), initial=0))
    assert fewest(sums.__getitem__, amount) == next(n for n, total in enumerate(sums) if total >= amount)
    found = nearest(sums.__getitem__, amount)
    assert abs(sums[found] - amount) == min(abs(s - amount) for s in sums)


# What steps of different lengths come to.


def recipe_of(folder: Path, *stages: dict[str, Any], **sections: Any) -> GrowthSchedule:
    recipe = recipe_dict(folder, **sections) | {"stages": list(stages)}
    return growth_schedule(parse_recipe(write_recipe(folder, recipe).read_text(), [], PRESETS, name="r"))


def stage_of(folder: Path, context: dict[str, Any] | None = None, lr_by: str = "steps", **fields: Any) -> Stage:
    shape = {"context_length": 64, "global_batch_tokens": 512, "micro_batch_size": 2}
    stage = {"name": "one", "duration": "40 steps", "context": context} | shape | fields
    return recipe_of(folder, stage, optim={"lr_by": lr_by}).stages[0]


CONTEXTS: dict[str, dict[str, Any]] = {
    "rechunk": {"schedule": "root", "start": 8, "over": "50%"},
    "rows": {"schedule": "linear", "start": 8, "over": "75%", "constant": "rows"},
    "truncate": {"schedule": "linear", "start": 24, "over": "60%", "how": "truncate"},
    "reshape": {"schedule": "exponential", "start": 8, "over": "75%", "how": "reshape"},
    "discrete": {"schedule": "discrete", "start": 16, "at": {"30%": 40, "60%": 64}, "how": "truncate"},
    "early": {"schedule": "discrete", "start": 16, "at": {"20%": 40, "40%": 64}},
    "buckets": {"schedule": "buckets", "start": 8, "odds": [8, 4, 2, 1]},
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_stage_counts_what_its_steps_train_on(name: str, tmp_path: Path) -> None:
    stage = stage_of(tmp_path, CONTEXTS[name])
    shapes = [stage.shape(step) for step in range(stage.steps)]
    assert len({shape.context_length for shape in shapes}) in range(2, 7)
    assert stage.tokens == sum(shape.tokens for shape in shapes)
    per_token = {shape.context_length: stage.model.flops_per_token(shape.context_length) for shape in shapes}
    flops = [per_token[shape.context_length] * shape.tokens for shape in shapes]
    assert [stage.flops(step) for step in range(stage.steps)] == flops
    assert math.isclose(stage.total_flops, sum(flops), rel_tol=1e-12)
    assert stage.cut_after(stage.steps) == sum(shape.drawn_tokens - shape.tokens for shape in shapes)
    assert (stage.cut_after(stage.steps) > 0) == (name in ("truncate", "reshape", "discrete"))
    parts = stage.accumulate  # one process
    for shape in shapes:
        assert shape.rows % parts == 0, "micro-batches of a length have one shape"
        most = stage.global_batch_tokens
        if name == "rows":
            assert shape.rows == 8
        elif name == "reshape":
            assert most - 8 * shape.context_length < shape.tokens <= most and shape.drawn_tokens == most
        else:
            assert most - parts * shape.context_length < shape.tokens <= most
    assert shapes[-1].context_length == 64 or name == "buckets"


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_duration_is_met_by_the_sum_over_steps(name: str, tmp_path: Path) -> None:
    by_tokens = stage_of(tmp_path, CONTEXTS[name], duration="20k tokens")
    assert by_tokens.tokens_after(by_tokens.steps) >= 20_000 > by_tokens.tokens_after(by_tokens.steps - 1)
    by_flops = stage_of(tmp_path, CONTEXTS[name], duration="1e9 flops")
    off = [abs(by_flops.pace.flops(by_flops.lengths, by_flops.steps + more) - 1e9) for more in (-1, 0, 1)]
    assert off[1] == min(off)
    saved = tmp_path / "recipe.yaml"
    recipe = parse_recipe(saved.read_text(), [], PRESETS, name="r")
    again = parse_recipe(to_yaml(settled(recipe, growth_schedule(recipe))), [], PRESETS, name="r")
    assert growth_schedule(again).stages == growth_schedule(recipe).stages


def test_spans_of_a_stage_count_its_tokens(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, CONTEXTS["rows"], warmup="1k tokens", decay="6k tokens", validate_every="3k tokens")
    n, left = stage.lr.warmup_steps, stage.steps - stage.lr.decay_steps
    assert stage.tokens_after(n) >= 1000 > stage.tokens_after(n - 1)
    assert stage.tokens - stage.tokens_after(left) >= 6000 > stage.tokens - stage.tokens_after(left + 1)
    assert stage.validate_every is not None and stage.tokens_after(stage.validate_every) >= 3000


def test_without_a_curriculum_nothing_moved(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, duration="20k tokens")
    assert (stage.steps, stage.tokens) == (40, 40 * 512)
    assert stage.total_flops == 40 * stage.flops_per_step == 40 * stage.model.flops_per_token(64) * 512
    assert stage.shape(7) == StepShape(8, 64)
    assert stage.moving(7, 64) == {}


# Learning rates by tokens.


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_by_tokens_is_by_steps_where_these_are_alike(schedule: str, tmp_path: Path) -> None:
    fields = {"schedule": schedule, "warmup": "10%", "decay": "3k tokens", "min_lr_ratio": 0.1}
    steps, tokens = (stage_of(tmp_path, lr_by=by, **fields) for by in ("steps", "tokens"))
    assert [tokens.rate(step) for step in range(40)] == [steps.rate(step) for step in range(40)]
    assert steps.rate(39) == steps.lr.last


def test_a_rate_by_tokens(tmp_path: Path) -> None:
    """The warm-up goes by steps, what follows by the share of the stage's tokens."""
    stage = stage_of(tmp_path, CONTEXTS["rows"], "tokens", schedule="cosine", warmup="5 steps")
    peak, warm = stage.lr.peak, stage.tokens_after(5)
    assert [stage.rate(step) for step in range(5)] == pytest.approx([peak * (n + 1) / 5 for n in range(5)])
    for step in range(5, 40):
        share = (stage.tokens_after(step + 1) - warm) / (stage.tokens - warm)
        assert math.isclose(stage.rate(step), peak * (1 + math.cos(math.pi * share)) / 2, abs_tol=1e-15)
    wsd = stage_of(tmp_path, CONTEXTS["rows"], "tokens", decay="50%")
    mean = wsd.tokens / wsd.steps
    for step in range(40):
        left = (wsd.tokens - wsd.tokens_after(step)) / mean
        assert math.isclose(wsd.rate(step), wsd.lr.peak * min(1, left / 21) if left <= 20 else wsd.lr.peak)
    by_steps = stage_of(tmp_path, CONTEXTS["rows"], decay="50%")
    assert [wsd.rate(n) == wsd.lr.peak for n in range(40)].count(True) > 20 == by_steps.lr.decay_steps


def test_the_next_stage_goes_on_from_the_last_rate(tmp_path: Path) -> None:
    first = {"name": "a", "duration": "9 steps", "context_length": 64, "global_batch_tokens": 512}
    first |= {"context": CONTEXTS["rows"] | {"start": 16}, "decay": "70%"}
    schedule = recipe_of(
        tmp_path, first, {"name": "b", "duration": "9 steps", "warmup": "3 steps"}, optim={"lr_by": "tokens"}
    )
    a, b = schedule.stages
    assert b.lr.start == a.rate(8) != a.lr.last
    assert isinstance(b.lr, LRSchedule) and b.context_length == 64 and b.shape(0).context_length == 64


# What is read.


def ids(count: int = 40_000) -> TokenStream:
    """A corpus in which every token is its own id, in the order it is read."""
    return TokenStream(torch.arange(count + 1).numpy(), block_tokens=64, seed=0, shuffle=False)


def read(shape: Callable[[int], StepShape], steps: int, **options: Any) -> list[list[torch.Tensor]]:
    """Of each step, its micro-batches' tokens, with their checks."""
    stream, accumulate = ids(), options.get("accumulate", 1)
    taken = itertools.islice(Batches(stream, stream.begin(), shape, **options), steps * accumulate)
    flat, groups = list(taken), []
    for first in range(0, len(flat), accumulate):
        group = flat[first : first + accumulate]
        for batch in group:
            assert torch.equal(batch.targets, batch.tokens + 1)
        groups.append([batch.tokens for batch in group])
    return groups


def test_rechunked_rows_repeat_and_skip_nothing(tmp_path: Path) -> None:
    for name in ("rechunk", "rows", "buckets"):
        stage = stage_of(tmp_path, CONTEXTS[name])
        for world in (1, 2):
            accumulate = stage.accumulate // world
            ranks = [
                read(stage.shape, stage.steps, accumulate=accumulate, rank=r, world_size=world) for r in range(world)
            ]
            seen = [batch.flatten() for step in zip(*ranks) for micro in zip(*step) for batch in micro]
            assert torch.equal(torch.cat(seen), torch.arange(stage.tokens)), (name, world)


@pytest.mark.parametrize("accumulate", [1, 4, 8])
def test_truncated_rows_are_beginnings_of_full_ones(accumulate: int) -> None:
    shape = StepShape(16, 24, drawn_length=64)
    first, second = read(lambda _: shape, 2, accumulate=accumulate)
    whole = torch.arange(2 * 16 * 64).view(2, 16, 64)
    assert torch.equal(torch.cat(first), whole[0, :, :24]) and torch.equal(torch.cat(second), whole[1, :, :24])
    assert len({batch.shape for batch in first}) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_reshaped_rows_are_pieces_of_full_ones(world: int) -> None:
    """Also where a full row's pieces lie in several micro-batches and processes."""
    shape = StepShape(12, 24, drawn_length=64, pieces=2)
    ranks = [read(lambda _: shape, 2, accumulate=4 // world + 1, rank=r, world_size=world) for r in range(world)]
    whole = torch.arange(2 * 6 * 64).view(2, 6, 64)[..., :48].reshape(2, 12, 24)
    for step in range(2):
        rows = torch.cat([batch for micro in zip(*(rank[step] for rank in ranks)) for batch in micro])
        assert torch.equal(rows, whole[step])


def test_less_memory_reads_the_same_rows(tmp_path: Path) -> None:
    """A micro-batch that had to shrink: more of them, which weigh what they should."""
    for name, context in CONTEXTS.items():
        stage = stage_of(tmp_path, context, micro_batch_size=4)
        planned, smaller = (read(stage.shape, stage.steps, accumulate=stage.accumulate * more) for more in (1, 4))
        for one, other in zip(planned, smaller, strict=True):
            assert torch.equal(torch.cat(one), torch.cat(other)), name
        stream = ids()
        batches = itertools.islice(Batches(stream, stream.begin(), stage.shape, accumulate=8), 8 * stage.steps)
        weights = torch.tensor([batch.weight for batch in batches]).view(-1, 8)
        assert torch.allclose(weights.mean(1), torch.ones(stage.steps), rtol=1e-6)


# What is shown.


def test_the_plan_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shape = {"context_length": 64, "global_batch_tokens": 512}
    window = {"schedule": "linear", "start": 8, "over": "20 steps"}
    schedule = recipe_of(
        tmp_path,
        {"name": "longer", "duration": "40 steps", "context": CONTEXTS["truncate"]} | shape,
        {"name": "wider", "duration": "40 steps", "window": window},
        {"name": "mixed", "duration": "40 steps", "context": CONTEXTS["buckets"]},
    )
    table = points(schedule)
    longer = [point for point in table if point.stage == "longer"]
    stage = schedule.stages[0]
    assert {point.context[0] for point in longer} == {*stage.lengths.values}
    assert all(point.tokens == stage.tokens_after(point.stage_step) for point in longer)
    assert [point.context for point in table if point.stage == "mixed"] == [(8, 64)] * 3
    windows = [point.window for point in table if point.stage == "wider"]
    assert windows[0] == 8 and windows[-1] == 64 and windows == sorted(windows) and len(windows) <= 9
    lines = schedule_lines(schedule, 100)
    assert [line.split()[0] for line in lines] == ["stage", "parameters", "context", "window", "batch", "learning"]
    assert lines[2].endswith("8–64")
    code, out, err = cli("plan", tmp_path / "recipe.yaml", "--png", tmp_path / "plan.png")
    assert code == 0, err
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    for word in ("24–64", "8–64", "window", "saves no FLOPs", "tokens are read and cut off"):
        assert word in out, word
    assert cli("validate", tmp_path / "recipe.yaml")[1].count("8–64") == 1
    graphs = sum(len(stage.lengths.values) for stage in schedule.stages)
    compiled = ("trainer.compile=true", f"trainer.most_graphs={graphs}")
    out = cli("plan", tmp_path / "recipe.yaml", *compiled)[1]
    assert f"makes {graphs} graphs over the run" in " ".join(out.split())


def test_a_nearest_duration_of_nothing() -> None:
    assert Pace(MODEL, 8, 64, 1).steps(Duration(0, "tokens"), Rising((0, 2), (32, 64))) == 0
