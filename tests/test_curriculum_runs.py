"""Runs with curricula: stopped within one and resumed, they are bitwise the runs that never stopped; every length is
compiled once; memory that is short changes no row."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.recipes import read
from growkit.models.decoder import DecoderLM
from growkit.train import trial
from tests.support import cli, in_child, recipe_dict, records, write_recipe
from tests.test_resume import assert_same_run

SHAPE = {"context_length": 32, "global_batch_tokens": 128, "micro_batch_size": 2}
STAGES: list[dict[str, Any]] = [
    {"name": "root", "duration": "7 steps", "context": {"schedule": "root", "start": 8, "over": "6 steps"}} | SHAPE,
    {
        "name": "buckets",
        "duration": "6 steps",
        "grow": {"attention_tokens": 12},
        "context": {"schedule": "buckets", "start": 8, "odds": [2, 2, 1]},
    },
    {"name": "window", "duration": "6 steps", "window": {"schedule": "exponential", "start": 8}},
    {
        "name": "truncate",
        "duration": "6 steps",
        "grow": {"rope_factor": 2, "rope_context": 32},
        "methods": {"rope": "yarn"},
        "context_length": 64,
        "context": {"schedule": "linear", "start": 16, "how": "truncate", "constant": "rows"},
    },
    {"name": "reshape", "duration": "6 steps", "context": {"schedule": "linear", "start": 24, "how": "reshape"}},
]


def recipe(folder: Path, stages: list[dict[str, Any]] = STAGES, **trainer: Any) -> Path:
    small = recipe_dict(folder, optim={"lr_by": "tokens"}, monitor={"ngram_order": 0, "sample_tokens": 0})
    small["trainer"] |= {"save_every": "3 steps"} | trainer
    return write_recipe(folder, small | {"stages": stages})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("curricula")
    path = recipe(folder)
    assert in_child("train", path, "run.name=whole") == 0
    return path, folder / "runs" / "whole"


def test_the_log_has_what_the_plan_says(whole: tuple[Path, Path]) -> None:
    """Shape, rate, tokens and FLOPs of every step; what is cut off is told and not counted; the cursor has it."""
    _, schedule = read(str(whole[0]), [])
    steps = iter(records(whole[1], "step"))
    tokens, flops, cursor = 0, 0.0, 0
    for stage in schedule.stages:
        for number in range(stage.steps):
            record, shape = next(steps), stage.shape(number)
            tokens, flops, cursor = tokens + shape.tokens, flops + stage.flops(number), cursor + shape.drawn_tokens
            assert (record["tokens"], record["flops"]) == (tokens, pytest.approx(flops))
            assert record["lr"] == stage.rate(number)
            assert record.get("context_length", 32) == (shape.context_length if stage.name != "window" else 32)
            assert record.get("window") == shape.window
            assert record.get("cut_tokens", 0) == stage.cut_after(number + 1)
    assert next(steps, None) is None
    progress = RunFolder.open(whole[1]).load().manifest.progress
    assert (progress.tokens, progress.cursor) == (schedule.tokens, cursor) and cursor > tokens
    (first, second) = records(whole[1], "growth")
    assert first["certificate"]["exact"] and not second["certificate"]["exact"]
    assert [link["operator"] for link in second["links"]] == ["rope"]


def test_stopped_within_every_curriculum(whole: tuple[Path, Path]) -> None:
    """One run, killed in each stage at a save that is neither its start nor its end, and resumed every time."""
    path, reference = whole
    _, schedule = read(str(path), [])
    run = reference.parent / "stopped"
    command: tuple[object, ...] = ("train", path, "run.name=stopped")
    for nth, stage in zip((1, 3, 3, 3, 3), schedule.stages, strict=True):  # saves: every 3 steps, and ends of stages
        assert in_child(*command, env={"GROWKIT_FAULT": f"after_rename:{nth}"}) == -signal.SIGKILL
        saved = RunFolder.open(run).load().manifest.progress
        assert saved.stage == stage.index and 0 < saved.stage_step < stage.steps
        command = ("resume", run)
    assert in_child(*command) == 0
    assert_same_run(run, reference)


def test_each_length_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With validations between, and a window that changes at every step; a later stage starts afresh. The backend here
    only counts: scripts/check_compilations.py has the real one."""
    compiled: list[tuple[int, ...]] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(next(tuple(one.shape) for one in inputs if one.dtype == torch.int64))
        return graph.forward

    def compile(self: DecoderLM, *, dynamic: bool) -> None:
        assert dynamic is False
        torch.nn.Module.compile(self, backend=count, dynamic=False)

    monkeypatch.setattr(DecoderLM, "compile", compile)
    first = {"name": "a", "duration": "8 steps", "validate_every": "2 steps", "context_length": 64}
    first |= {"global_batch_tokens": 256, "micro_batch_size": 2}
    first |= {"context": {"schedule": "linear", "start": 8, "most_lengths": 3}}
    window = {"name": "b", "duration": "4 steps", "window": {"schedule": "linear", "start": 8}}
    path = recipe(tmp_path, [first, window], compile=True)
    model = ["model={preset: transformer, embed_dim: 16, num_layers: 1, num_heads: 2, mlp_dim: 16}"]
    code, _, err = cli("train", path, *model)
    assert code == 0, err
    _, schedule = read(str(path), model)
    growing = schedule.stages[0]
    shapes = dict.fromkeys(growing.shape(number) for number in range(growing.steps))
    assert len(shapes) == 3
    assert compiled[:3] == [(shape.rows // growing.accumulate, shape.context_length) for shape in shapes]
    assert compiled[3:] == [(4, 64)] * 2  # with a mask and without


def test_the_trial_takes_the_largest_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage whose full micro-batch does not fit goes on with smaller ones, and trains on the same tokens."""
    real, refused = trial._try, []

    def short(state: Any, stage: Any, *rest: Any) -> None:
        most = max(stage.shape(n).tokens // stage.accumulate for n in range(stage.steps))
        assert stage.context_length * stage.micro_batch_size >= most
        if rest[-1] > 1:
            refused.append(rest[-1])
            raise RuntimeError("not enough memory")
        real(state, stage, *rest)

    path = recipe(tmp_path, [STAGES[0], STAGES[2] | {"micro_batch_size": 2}])
    assert cli("train", path, "run.name=planned", "model.dropout=0")[0] == 0
    monkeypatch.setattr(trial, "_try", short)
    assert cli("train", path, "run.name=short", "model.dropout=0")[0] == 0
    assert refused == [2, 2]
    planned, small = (records(tmp_path / "runs" / name, "step") for name in ("planned", "short"))
    assert [r["tokens"] for r in planned] == [r["tokens"] for r in small]
    assert [r["grad_norm"] for r in planned] == pytest.approx([r["grad_norm"] for r in small], rel=1e-3)
