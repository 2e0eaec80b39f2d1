"""Two processes on this machine, gloo: DDP and FSDP2 train, save, grow, resume, and agree with one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from growkit.checkpoint import store
from growkit.checkpoint.run_folder import RunFolder
from growkit.growth.engine import added_entries
from tests.support import in_child, recipe_dict, records, start_child, write_recipe
from tests.test_freeze import BOTH, FIRST, TRANSFORMER, UNSCALED, assert_held, freezing_recipe, stage_of, state
from tests.test_loggers import rows_of
from tests.test_ramp_training import ramping_recipe

# Sums over two processes are taken in another order than in one: float32 roundings of 6e-8, through 12 steps.
LOSS_TOLERANCE = 1e-5
LIMIT = 300  # seconds for one command of two processes, many times what it takes: then one waits for the other
FSDP = ("trainer.strategy=fsdp", "trainer.devices=2")


def start_two(*words: object, run: Path, env: dict[str, str] | None = None) -> list[BaseProcess]:
    """Starts ``growkit words...`` as processes 0 and 1 of one job."""
    return [start_child(*words, env=rank | (env or {})) for rank in two_ranks(run)]


def two_ranks(run: Path) -> list[dict[str, str]]:
    """The environments of processes 0 and 1 of one job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [job | {"LOCAL_RANK": str(rank), "GROWKIT_RUN_FOLDER": str(run)} for rank in range(2)]


def finish(children: list[BaseProcess], limit: float = LIMIT) -> list[int]:
    """Their exit codes. Fails, and kills them, if they have not ended within ``limit`` seconds."""
    deadline = time.monotonic() + limit
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, child in enumerate(children) if child.exitcode is None]
    codes = [child.exitcode for child in children]
    for rank in late:
        children[rank].kill()
        children[rank].join()
    assert not late, f"after {limit} s the processes {late} have not ended (exit codes: {codes}): they wait for ever"
    return [child.exitcode for child in children if child.exitcode is not None]


def two_processes(*words: object, run: Path) -> list[int]:
    return finish(start_two(*words, run=run))


def distributed_recipe(folder: Path) -> Path:
    recipe = recipe_dict(folder)
    recipe["model"]["dropout"] = 0.0  # what is dropped depends on the process
    recipe["trainer"]["save_every"] = "3 steps"
    for stage in recipe["stages"]:
        stage |= {"micro_batch_size": 2, "duration": "4 steps"}
    return write_recipe(folder, recipe)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run folder) of a sharded run that was never stopped."""
    folder = tmp_path_factory.mktemp("sharded")
    recipe, run = distributed_recipe(folder), folder / "runs" / "fsdp"
    assert two_processes("train", recipe, *FSDP, "run.name=fsdp", run=run) == [0, 0]
    return recipe, run


@pytest.fixture(scope="module")
def alone(sharded: tuple[Path, Path]) -> Path:
    """The same run in one process."""
    recipe, run = sharded
    assert in_child("train", recipe, "run.name=alone") == 0
    return run.parent / "alone"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_agree_with_one(strategy: str, sharded: tuple[Path, Path], alone: Path) -> None:
    recipe, fsdp = sharded
    run = fsdp.parent / strategy
    if strategy == "ddp":
        options = ("trainer.strategy=ddp", "trainer.devices=2", "run.name=ddp")
        assert two_processes("train", recipe, *options, run=run) == [0, 0]
    for kind in ("step", "validation"):
        one, two = records(alone, kind), records(run, kind)
        assert [r["step"] for r in one] == [r["step"] for r in two]
        for a, b in zip(one, two, strict=True):
            assert abs(a["loss"] - b["loss"]) <= LOSS_TOLERANCE, (a["step"], a["loss"], b["loss"])
    growths = records(run, "growth")
    assert len(growths) == 2 and all(g["certificate"]["delta_logits_float64"] <= 1e-10 for g in growths)
    checkpoint = RunFolder.open(run).load()
    assert checkpoint.manifest.layout == ("sharded" if strategy == "fsdp" else "whole")
    reference = RunFolder.open(alone).load().state
    for name in reference.params:
        assert torch.allclose(checkpoint.state.params[name], reference.params[name], atol=1e-4), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_ramp_is_where_it_is_in_every_process(strategy: str, tmp_path: Path) -> None:
    """Losses of a stage with masks on all there is agree with one process's, and the stage after goes on alike."""
    recipe = ramping_recipe(tmp_path)
    recipe["model"]["dropout"] = 0.0
    recipe["stages"][0]["micro_batch_size"] = 2
    path, runs = write_recipe(tmp_path, recipe), tmp_path / "runs"
    options = (f"trainer.strategy={strategy}", "trainer.devices=2", "run.name=two")
    assert two_processes("train", path, *options, run=runs / "two") == [0, 0]
    assert in_child("train", path, "run.name=one") == 0
    for kind in ("step", "validation"):
        one, two = records(runs / "one", kind), records(runs / "two", kind)
        assert [r["step"] for r in one] == [r["step"] for r in two]
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) <= LOSS_TOLERANCE
    assert RunFolder.open(runs / "two").load(12).manifest.model.ramp == 1


# mid_shard is reached by both processes; the renames by the first alone, and the second must not wait for it for ever.
@pytest.mark.parametrize(("point", "nth"), [("mid_shard", 2), ("before_rename", 2), ("after_rename", 1)])
def test_a_sharded_run_killed_in_a_save_resumes(point: str, nth: int, sharded: tuple[Path, Path]) -> None:
    recipe, whole = sharded
    run = whole.parent / point
    children = start_two("train", recipe, *FSDP, f"run.name={point}", run=run, env={"GROWKIT_FAULT": f"{point}:{nth}"})
    codes = finish(children)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0, codes
    assert two_processes("resume", run, run=run) == [0, 0]
    assert [r["loss"] for r in records(run, "step")] == [r["loss"] for r in records(whole, "step")]
    assert not list((run / "checkpoints").glob(f"{store.WRITING}*")), "left-overs of the killed save"


def test_a_sharded_run_resumes(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = sharded
    cut = whole.parent / "cut"
    limited = (*FSDP, "run.name=cut", "trainer.max_minutes=1e-9")
    assert two_processes("train", recipe, *limited, run=cut) == [3, 3]
    text = (cut / "recipe.yaml").read_text()
    (cut / "recipe.yaml").write_text(text.replace("max_minutes: 1.0e-09", "max_minutes: null"))
    assert two_processes("resume", cut, run=cut) == [0, 0]
    assert [r["loss"] for r in records(cut, "step")] == [r["loss"] for r in records(whole, "step")]
    # A sharded checkpoint is grown and read by one process like any other.
    assert in_child("grow", cut, "num_layers=3", "-o", tmp_path / "grown") == 0
    assert in_child("generate", tmp_path / "grown", "--tokens", "5") == 0


def test_one_process_and_then_two_are_one_run_of_wandb(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, fsdp = sharded
    run, offline = fsdp.parent / "logged", {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    words = ("run.name=logged", "logger.kind=wandb", "trainer.max_minutes=1e-9")
    assert in_child("train", recipe, *words, env=offline) == 3
    text = (run / "recipe.yaml").read_text().replace("max_minutes: 1.0e-09", "max_minutes: null")
    (run / "recipe.yaml").write_text(
        text.replace("strategy: single", "strategy: ddp").replace("devices: 1", "devices: 2")
    )
    assert finish(start_two("resume", run, run=run, env=offline)) == [0, 0]
    fragments = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((run / "wandb.json").read_text())["id"]
    assert len(fragments) == 2 and all(file.stem.endswith(identity) for file in fragments)
    assert [row["_step"] for row in rows_of(fragments)] == list(range(13)), "of each process, or of one alone"


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "two"
    options = ("trainer.strategy=ddp", "trainer.devices=2", "run.name=two", "stages.0.duration=2000 steps")
    children = start_two("train", distributed_recipe(tmp_path), *options, run=run)
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and records(run, "step")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children[1].pid is not None
    os.kill(children[1].pid, signal.SIGTERM)
    assert finish(children) == [3, 3]
    assert RunFolder.open(run).steps()[-1] == max(record["step"] for record in records(run)) < 2000


def test_two_processes_hold_the_same_entries(tmp_path: Path) -> None:
    recipe = freezing_recipe(tmp_path, TRANSFORMER, UNSCALED, freeze=["old_entries"], micro_batch_size=2)
    assert in_child("train", recipe, "run.name=one") == 0
    run = tmp_path / "runs" / "two"
    ddp = ("trainer.strategy=ddp", "trainer.devices=2", "run.name=two")
    assert two_processes("train", recipe, *ddp, run=run) == [0, 0]
    stage = stage_of(recipe)
    assert_held(state(run, FIRST), state(run, BOTH), {n: ~added_entries(stage.links)[n] for n in stage.held})
    for one, two in zip(records(tmp_path / "runs" / "one", "step"), records(run, "step"), strict=True):
        assert abs(one["loss"] - two["loss"]) <= LOSS_TOLERANCE
