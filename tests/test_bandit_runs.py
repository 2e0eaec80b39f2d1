"""Runs in which a bandit chooses: each step is of one source or one length, chosen by what was measured, whatever was
fetched ahead; killed after any step and resumed, they are bitwise the runs that never stopped."""

from __future__ import annotations

import random
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.recipes import read
from growkit.data.mixture import Mixture
from growkit.data.shape import StepShape
from growkit.data.stream import Batch, Batches, TokenStream
from growkit.models.decoder import DecoderLM, build
from growkit.models.loss import TokenLoss
from growkit.schedule.progress import Progress
from growkit.train import measure, trial
from growkit.train.choices import Choices
from growkit.train.data import prepare_data
from growkit.train.gain import PredictionGain
from growkit.train.loggers.rows import Rows
from tests.support import cli, corpus_file, in_child, recipe_dict, records, write_recipe
from tests.test_distributed import LOSS_TOLERANCE, two_processes
from tests.test_resume import assert_same_run

ROUNDING = 2e-6  # of a difference of two losses of some nats, float32
QUIET = {"ngram_order": 0, "sample_tokens": 0, "validation_tokens": 64}
SHAPE = {"context_length": 16, "global_batch_tokens": 64, "micro_batch_size": 2}
BUCKETS = {"schedule": "buckets", "start": 4, "multiple": 4, "odds": [1, 1, 1]}
LONGER = {"schedule": "buckets", "start": 32, "odds": [1, 1]}


def sources(folder: Path) -> dict[str, Any]:
    """A text, and bytes of which nothing can be learned but that they are all as likely."""
    draw = random.Random(0)
    noise = folder / "noise.bin"
    noise.write_bytes(bytes(draw.randrange(256) for _ in range(20_000)))
    return {"mixture": [{"source": str(noise)}, {"source": str(corpus_file(folder))}]}


def recipe(folder: Path, over: str, stages: list[dict[str, Any]] | None = None, **model: Any) -> Path:
    """Two stages of five steps, each in two micro-batches, with dropout and a growth between them."""
    small = recipe_dict(folder, monitor=QUIET, trainer={"save_every": "1 steps", "keep_last": 99}, model=model)
    bandit = {"over": over, "learning_rate": 0.2}
    small["data"] = (sources(folder) if over == "sources" else small["data"]) | {"bandit": bandit}
    drawn = {"context": BUCKETS} if over == "lengths" else {}
    first = {"name": "first", "duration": "5 steps"} | SHAPE | drawn
    then = {"name": "then", "duration": "5 steps", "grow": {"attention_tokens": 12}} | SHAPE | drawn
    return write_recipe(folder, small | {"stages": stages or [first, then]})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """over → (recipe, run folder) of a run that was never stopped."""
    made = {}
    for over in ("sources", "lengths"):
        folder = tmp_path_factory.mktemp(over)
        path = recipe(folder, over)
        assert cli("train", path, "run.name=whole")[0] == 0
        made[over] = (path, folder / "runs" / "whole")
    return made


BOTH = pytest.mark.parametrize("over", ["sources", "lengths"])


def test_it_comes_to_prefer_what_can_be_learned(tmp_path: Path) -> None:
    stage = {"name": "a", "duration": "100 steps", "context_length": 32, "global_batch_tokens": 256}
    path = recipe(tmp_path, "sources", [stage])
    code, _, err = cli("train", path, "trainer.save_every=100 steps", "data.bandit.learning_rate=0.05")
    assert code == 0, err
    steps = records(tmp_path / "runs" / "run", "step")
    text = steps[0]["arm_probabilities"].keys() - {str(tmp_path / "noise.bin")}
    chosen = [record["arm"] in text for record in steps]
    assert 10 < sum(chosen[:30]) < 25, "as likely at first"
    assert sum(chosen[50:]) > 32
    likely = [record["arm_probabilities"] for record in steps]
    assert all(sum(each.values()) == pytest.approx(1) for each in likely)
    assert set(likely[0].values()) == {0.5}
    assert np.mean([each[next(iter(text))] for each in likely[50:]]) > 0.6


@BOTH
def test_killed_after_every_step(over: str, whole: dict[str, tuple[Path, Path]]) -> None:
    """So nothing is ever fetched before what came before it was learned, and yet every choice is the same."""
    path, reference = whole[over]
    run = reference.parent / "killed"
    command: tuple[object, ...] = ("train", path, "run.name=killed")
    for _ in range(9):
        assert in_child(*command, env={"GROWKIT_FAULT": "after_rename:1"}) == -signal.SIGKILL
        command = ("resume", run)
    assert in_child(*command) == 0
    assert_same_run(run, reference)
    assert len({record["arm"] for record in records(run, "step")}) > 1, "there was nothing to choose"
    bandit = RunFolder.open(run).load().manifest.progress.data["bandit"]
    assert [entry[0] for entry in bandit["pending"]] == [8, 9]
    assert bandit["rewards"] == (8 if over == "sources" else 3), "lengths begin anew with each stage"


def batch_of(path: Path, run: Path, step: int) -> tuple[list[Batch], Choices, dict[str, torch.Tensor]]:
    """The micro-batches of the step after ``step``, made from its checkpoint alone; what chose them; the weights."""
    made, schedule = read(str(path), [])
    checkpoint = RunFolder.open(run).load(step)
    at = checkpoint.manifest.progress
    stage = schedule.stage(at.stage)
    choices = Choices(made, stage, at)
    source = prepare_data(made, schedule).source(made, schedule)
    batches = iter(Batches(source, at.data, choices.shape, at.stage_step, stage.accumulate))
    return [next(batches) for _ in range(stage.accumulate)], choices, dict(checkpoint.state.params)


@BOTH
def test_a_gain_is_what_the_loss_fell_by_on_its_own_tokens(over: str, tmp_path: Path) -> None:
    """Recomputed from the checkpoints before and after a step, by a model of its own."""
    path, run = recipe(tmp_path, over, dropout=0.0), tmp_path / "runs" / "run"
    assert cli("train", path)[0] == 0
    steps = records(run, "step")
    for step in (1, 3, 6, 8):
        (first, _), choices, before = batch_of(path, run, step)
        after = dict(RunFolder.open(run).load(step + 1).state.params)
        losses = []
        for params in (before, after):
            model = build(choices.stage.model, params)
            with torch.no_grad():
                losses.append(float(model(first.tokens, first.targets).cross_entropy))
        assert steps[step]["prediction_gain"] == pytest.approx(losses[0] - losses[1], abs=ROUNDING)
        assert steps[step]["arm"] == choices.record(first, 0.0)["arm"]


@BOTH
def test_where_nothing_is_learned_nothing_is_gained(over: str, tmp_path: Path) -> None:
    """But for rounding: dropout, which is on, draws in the second pass what it drew in the first."""
    path, run = recipe(tmp_path, over), tmp_path / "runs" / "run"
    still = ("stages.0.lr=1e-30", "stages.0.warmup=0 steps", "optim.weight_decay=0")
    assert cli("train", path, *still)[0] == 0
    assert max(abs(record["prediction_gain"]) for record in records(run, "step")) <= ROUNDING


def test_measuring_draws_nothing_from_what_training_draws() -> None:
    def loss(batch: Batch) -> TokenLoss:
        value = torch.nn.functional.dropout(batch.tokens.float(), 0.5).mean()
        return TokenLoss(value, value)

    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(train_step_context=nullcontext), world_size=1)
    batch = Batch(torch.arange(64).view(2, 32), torch.zeros(2, 32), None, None, False, 1.0, {"cursor": 0})
    measured = PredictionGain(loss, 1, compiled=False)
    torch.manual_seed(0)
    for _ in range(2):
        measured.before(batch)
    before = torch.get_rng_state()
    assert measured.after(trainer, torch.nn.Module()) == 0.0
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_flops_and_tokens_are_those_of_what_was_chosen(over: str, whole: dict[str, tuple[Path, Path]]) -> None:
    """Three forward passes' worth for every token, and one more for those of the first of two micro-batches."""
    path, run = whole[over]
    _, schedule = read(str(path), [])
    steps = iter(records(run, "step"))
    flops = tokens = 0.0
    for stage in schedule.stages:
        for _ in range(stage.steps):
            record = next(steps)
            length = int(record["arm"]) if over == "lengths" else 16
            flops += stage.model.forward_flops_per_token(length) * (3 * 64 + 32)
            tokens += 64
            assert record["flops"] == pytest.approx(flops, rel=1e-12) and record["tokens"] == tokens
            assert record.get("context_length", 16) == length
    assert schedule.tokens == tokens
    if over == "sources":
        assert schedule.flops == pytest.approx(flops, rel=1e-12)
    else:
        deck = [
            stage.model.forward_flops_per_token(length) * (3 * 64 + 32)
            for stage in schedule.stages
            for length, count in stage.lengths.counts(5)
            for _ in range(count)
        ]
        assert schedule.flops == pytest.approx(sum(deck), rel=1e-12)
        assert all(sorted(count for _, count in stage.lengths.counts(6)) == [2, 2, 2] for stage in schedule.stages)


def test_only_the_chosen_source_is_read(whole: dict[str, tuple[Path, Path]]) -> None:
    _, run = whole["sources"]
    steps = records(run, "step")
    names = list(steps[0]["arm_probabilities"])
    chosen = [sum(record["arm"] == name for record in steps) for name in names]
    data = RunFolder.open(run).load().manifest.progress.data
    assert [own["cursor"] for own in data["sources"]] == [64 * count for count in chosen]
    assert data["cursor"] == 640 and data["rows"] == [0, 0]


@given(
    st.lists(st.tuples(st.sampled_from([None, 0, 1]), st.integers(1, 5), st.sampled_from([4, 8])), max_size=12),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_every_source_gives_its_tokens_once_and_in_order(
    steps: list[tuple[int | None, int, int]], accumulate: int, world: int
) -> None:
    """Chosen or dealt by weight, whatever the steps' shapes and however many processes share them."""
    parts = [np.arange(200, dtype=np.int32), np.arange(1000, 1300, dtype=np.int32)]
    mixture = Mixture([TokenStream(part, block_tokens=7, seed=3, shuffle=False) for part in parts], [1, 2])
    parallel = accumulate * world
    shapes = [StepShape(rows * parallel, length, source=source) for source, rows, length in steps]
    shapes.append(StepShape(parallel, 4))
    ranks = [
        iter(Batches(mixture, mixture.begin(), shapes.__getitem__, 0, accumulate, rank, world)) for rank in range(world)
    ]
    found: list[list[int]] = [[], []]
    for shape in shapes:
        batches = [[next(rank) for rank in ranks] for _ in range(accumulate)]
        tokens = torch.cat([batch.tokens for row in batches for batch in row])
        assert tokens.shape == (shape.rows, shape.context_length)
        assert {batch.source for row in batches for batch in row} == {shape.source}
        for row in tokens.tolist():
            found[row[0] >= 1000].extend(row)
        if shape.source is not None:
            assert {bool(row[0] >= 1000) for row in tokens.tolist()} == {bool(shape.source)}
    for part, read_tokens in zip(parts, found, strict=True):
        expected = np.resize(part[:-1], len(read_tokens))
        assert read_tokens == expected.tolist()


@pytest.mark.parametrize("ahead", [0, 1])
def test_choices_are_the_same_however_far_ahead_they_are_made(ahead: int, tmp_path: Path) -> None:
    """As far as a trainer fetches; gains are made up."""
    made, schedule = read(
        str(recipe(tmp_path, "sources")), ["stages.0.duration=60 steps", "data.bandit.learning_rate=2"]
    )
    stage = schedule.stages[0]

    def chosen(ahead: int) -> list[int | None]:
        choices, asked = Choices(made, stage, Progress()), list[int | None]()
        for step in range(60):
            while len(asked) <= step + ahead:
                asked.append(choices.shape(len(asked)).source)
            batch: Any = SimpleNamespace(source=asked[step])
            choices.learned(step, batch, float(step % 7 - 2 * (asked[step] or 0)), 1e9)
        return asked[:60]

    assert chosen(ahead) == chosen(0)
    if ahead:
        assert chosen(2) != chosen(0), "further than the choices are made for"


def test_short_memory_changes_neither_choices_nor_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trial._try

    def short(*arguments: Any) -> None:
        if arguments[-1] > 1:
            raise RuntimeError("not enough memory")
        real(*arguments)

    path = recipe(tmp_path, "lengths", dropout=0.0)
    assert cli("train", path, "run.name=planned")[0] == 0
    monkeypatch.setattr(trial, "_try", short)
    assert cli("train", path, "run.name=short")[0] == 0
    planned, small = (records(tmp_path / "runs" / name, "step") for name in ("planned", "short"))
    for key in ("arm", "flops", "tokens"):
        assert [r[key] for r in planned] == [r[key] for r in small]
    gains = [[r["prediction_gain"] for r in run] for run in (planned, small)]
    assert gains[0] == pytest.approx(gains[1], abs=1e-4), "steps drift apart by roundings"


def test_each_length_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking again is done by the graph that trained."""
    compiled: list[tuple[int, ...]] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(next(tuple(one.shape) for one in inputs if one.dtype == torch.int64))
        return graph.forward

    def compile(self: DecoderLM, *, dynamic: bool) -> None:
        torch.nn.Module.compile(self, backend=count, dynamic=dynamic)

    monkeypatch.setattr(DecoderLM, "compile", compile)
    model = "model={preset: transformer, embed_dim: 16, num_layers: 1, num_heads: 2, mlp_dim: 16}"
    path = recipe(tmp_path, "lengths", [{"name": "a", "duration": "12 steps"} | SHAPE | {"context": BUCKETS}])
    code, _, err = cli("train", path, model, "trainer.compile=true")
    assert code == 0, err
    chosen = {int(record["arm"]) for record in records(tmp_path / "runs" / "run", "step")}
    assert len(chosen) > 1 and sorted(compiled) == sorted((32 // length, length) for length in chosen)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_choose_what_one_chooses(strategy: str, tmp_path: Path) -> None:
    """The first micro-batches of both are the first of the one, so the gains are the same but for their rounding."""
    path, runs = recipe(tmp_path, "sources", dropout=0.0), tmp_path / "runs"
    two = (f"trainer.strategy={strategy}", "trainer.devices=2", "run.name=two")
    half = [f"stages.{number}.micro_batch_size=1" for number in (0, 1)]
    assert two_processes("train", path, *two, *half, run=runs / "two") == [0, 0]
    assert in_child("train", path, "run.name=one") == 0
    for alone, shared in zip(records(runs / "one", "step"), records(runs / "two", "step"), strict=True):
        assert (alone["arm"], alone["flops"]) == (shared["arm"], shared["flops"])
        for key in ("loss", "prediction_gain"):
            assert abs(alone[key] - shared[key]) <= LOSS_TOLERANCE, key


def test_an_extension_goes_on_choosing(whole: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Over sources with what was learned; without a bandit by weight, from where each source stands."""
    _, run = whole["sources"]
    more = tmp_path / "more.yaml"
    more.write_text("stages: [{name: more, duration: 4 steps}]")
    place = f"run.folder={tmp_path}"
    assert in_child("extend", run, more, place, "run.name=on") == 0
    assert in_child("extend", run, more, place, "run.name=off", "data.bandit=null") == 0
    before, on, off = (
        RunFolder.open(path).load().manifest.progress.data for path in (run, tmp_path / "on", tmp_path / "off")
    )
    assert on["bandit"]["rewards"] == before["bandit"]["rewards"] + 4
    assert "bandit" not in off and off["rows"] == [8, 8]
    assert [b["cursor"] - a["cursor"] for a, b in zip(before["sources"], off["sources"])] == [128, 128]


def test_loggers_show_the_arms(whole: dict[str, tuple[Path, Path]]) -> None:
    _, run = whole["lengths"]
    rows = list(Rows().gather(records(run)))
    (first,) = (row.values for row in rows if row.step == 1)
    assert [first[f"curriculum/probability/{length}"] for length in (4, 8, 16)] == pytest.approx([1 / 3] * 3)
    assert 4 * 2 ** first["curriculum/arm"] == first["growth/context_length"]
    assert first["curriculum/prediction_gain"] == records(run, "step")[0]["prediction_gain"]


@BOTH
def test_the_plan_names_arms_and_what_they_cost(over: str, whole: dict[str, tuple[Path, Path]]) -> None:
    path, _ = whole[over]
    code, out, err = cli("plan", path)
    assert code == 0, err
    flat = " ".join(out.split())
    assert f"chooses the {over[:-1]} of each step among" in flat
    assert "are 14.3% of the FLOPs of first, then" in flat  # 32 forward passes beside 3 · 64
    assert ("as if each were chosen as often" in flat) == (over == "lengths")


def test_a_measured_step_has_the_second_look_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every pass and the update at a second each: two micro-batches, the look at one of them, the update."""
    monkeypatch.setattr(measure, "_median_seconds", lambda work, _: (work(), 1.0)[1])
    made, schedule = read(str(recipe(tmp_path, "lengths")), [])
    seconds = measure.step_seconds(made, schedule.stages[0], "cpu", torch.float32)
    assert seconds == pytest.approx(2 + 1 + 1)


def test_a_task_has_lengths_to_choose_from(tmp_path: Path) -> None:
    task = ["data={source: synthetic/induction, bandit: {over: lengths}}", "model.vocab_size=64", "model.dropout=0"]
    path = recipe(tmp_path, "lengths", [{"name": "a", "duration": "6 steps"} | SHAPE | {"context": LONGER}])
    code, _, err = cli("train", path, *task, "stages.0.context_length=64", "stages.0.global_batch_tokens=256")
    assert code == 0, err
    progress = RunFolder.open(tmp_path / "runs" / "run").load().manifest.progress
    assert progress.cursor == progress.tokens == 6 * 256 and progress.data["bandit"]["rewards"] == 4
