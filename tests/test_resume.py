"""Resume is exact: kill a run anywhere, and every later record and the final tensors are bitwise those of the run that
was never stopped. Accumulation, shuffling and dropout are on; the run crosses two growth steps and a context change."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from growkit import faults
from growkit.checkpoint import manifest as manifests
from growkit.checkpoint import run_folder, store
from growkit.checkpoint.run_folder import RunFolder, step_name
from tests.support import cli, in_child, recipe_dict, records, start_child, write_recipe

SAVE_EVERY = 4
# What a record may differ in: time and memory are the machine's, not the run's.
TIMING = {"seconds", "tokens_per_second", "flops_per_second", "utilisation", "memory_bytes"}
# Every named point, early and late in the run (the n-th time it is reached).
KILLS = [
    ("mid_validation", 1),  # before the first save
    ("mid_validation", 3),
    ("mid_validation", 4),
    ("mid_shard", 1),
    ("mid_shard", 3),
    ("before_rename", 1),
    ("before_rename", 4),
    ("after_rename", 1),
    ("after_rename", 2),
    ("after_rename", 5),
    ("mid_growth", 1),
    ("mid_growth", 2),
    ("first_step_after_growth", 1),
    ("first_step_after_growth", 2),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run folder) of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder)
    assert in_child("train", recipe, "run.name=whole") == 0
    return recipe, folder / "runs" / "whole"


def reproducible(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records(run)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    state = RunFolder.open(run).load().state
    return {**dict(state.params), **dict(store.flat_moments(state.moments))}


def assert_same_run(run: Path, reference: Path) -> None:
    assert reproducible(run) == reproducible(reference)
    mine, theirs = tensors(run), tensors(reference)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    a, b = RunFolder.open(run).load().manifest, RunFolder.open(reference).load().manifest
    assert (a.progress, a.lineage, a.adam_steps, a.born, a.rng) == (b.progress, b.lineage, b.adam_steps, b.born, b.rng)


def test_the_reference_run_is_worth_comparing(whole: tuple[Path, Path]) -> None:
    """It learns, grows twice, accumulates, drops out; two runs of it are the same and another seed's is not."""
    recipe, run = whole
    steps = records(run, "step")
    assert [r["step"] for r in steps] == list(range(1, 19))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    growths = records(run, "growth")
    assert [[link["operator"] for link in g["links"]] for g in growths] == [["param_tokens"], ["depth"]]
    assert all(g["certificate"]["delta_logits_float64"] <= 1e-10 and not g["certificate"]["dead"] for g in growths)
    assert in_child("train", recipe, "run.name=again") == 0
    assert_same_run(run.parent / "again", run)
    assert in_child("train", recipe, "run.name=other", "run.seed=1") == 0
    assert records(run.parent / "other", "step")[0]["loss"] != steps[0]["loss"]


@pytest.mark.parametrize(("point", "nth"), KILLS)
def test_killed_at_a_fault_point(point: str, nth: int, whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, reference = whole
    hits = tmp_path / "hits"
    name = f"{point}-{nth}"
    run = reference.parent / name
    env = {"GROWKIT_FAULT": f"{point}:{nth}", "GROWKIT_FAULT_LOG": str(hits)}
    assert in_child("train", recipe, f"run.name={name}", env=env) == -signal.SIGKILL
    assert hits.read_text().split() == [point], "the point was not hit"
    reached = max((r["step"] for r in records(run)), default=0)
    saved = max(RunFolder.open(run).steps(), default=0)
    assert reached - saved <= SAVE_EVERY, "more than one save interval is lost"
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)
    assert not list((run / "checkpoints").glob(f"{store.WRITING}*")), "left-overs of the killed save"


def test_a_look_at_a_run_does_not_keep_it_from_being_resumed(
    whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report asks who writes the run by taking its lock for an instant: a resume in that instant waits for it."""
    with open(whole[1] / "run.lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(run_folder.time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        folder = RunFolder.open(whole[1])
        folder.lock()
        folder.unlock()


def test_every_fault_point_is_hit() -> None:
    elsewhere = {"mid_preparation", "mid_probe"}  # before there is a run: test_prepare.py; where it has a choice:
    # test_candidates.py
    assert {point for point, _ in KILLS} | elsewhere == set(faults.POINTS)


def test_killed_twice_and_resumed_inside_a_stage_and_across_a_boundary(whole: tuple[Path, Path]) -> None:
    recipe, reference = whole
    run = reference.parent / "twice"
    assert in_child("train", recipe, "run.name=twice", env={"GROWKIT_FAULT": "after_rename:1"}) == -signal.SIGKILL
    assert in_child("resume", run, env={"GROWKIT_FAULT": "first_step_after_growth:1"}) == -signal.SIGKILL
    assert in_child("resume", run, env={"GROWKIT_FAULT": "before_rename:2"}) == -signal.SIGKILL
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)


def test_a_manifest_that_lacks_a_newer_key_resumes(whole: tuple[Path, Path]) -> None:
    """As one written before the environment recorded it; what is unknown is warned of, not fatal."""
    recipe, reference = whole
    run = reference.parent / "older"
    assert in_child("train", recipe, "run.name=older", env={"GROWKIT_FAULT": "after_rename:1"}) == -signal.SIGKILL
    folder = RunFolder.open(run).load().folder
    manifest = manifests.read(folder)
    kept = {key: value for key, value in manifest.environment.items() if key != "flops_convention"}
    assert len(kept) == len(manifest.environment) - 1
    (folder / manifests.NAME).write_bytes(manifests.encode(dataclasses.replace(manifest, environment=kept)))
    assert in_child("resume", run) == 0
    assert reproducible(run) == reproducible(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_3(number: signal.Signals, whole: tuple[Path, Path]) -> None:
    recipe, reference = whole
    run = reference.parent / number.name
    child = start_child("train", recipe, f"run.name={number.name}")
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and records(run, "step")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == 3
    last = max(r["step"] for r in records(run))
    assert RunFolder.open(run).steps()[-1] == last, "the step it stopped at was not saved"
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)


def test_a_time_limit_stops_and_never_shapes(whole: tuple[Path, Path]) -> None:
    recipe, reference = whole
    run = reference.parent / "limited"
    assert in_child("train", recipe, "run.name=limited", "trainer.max_minutes=1e-9") == 3
    assert RunFolder.open(run).steps() == [1]
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("max_minutes: 1.0e-09", "max_minutes: null"))
    assert in_child("resume", run) == 0
    assert reproducible(run) == reproducible(reference)


def test_a_branch_leaves_its_run_untouched(whole: tuple[Path, Path]) -> None:
    _, reference = whole
    before = _hashes(reference)
    step = RunFolder.open(reference).steps()[0]
    assert in_child("resume", reference, "--from", step, "--as", "branch") == 0
    assert _hashes(reference) == before
    assert_same_run(reference.parent / "branch", reference)


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_freezing_survives_a_resume(tmp_path: Path) -> None:
    recipe = recipe_dict(tmp_path)
    recipe["stages"][1] |= {"freeze": ["old_banks", "embedding"], "lr_scale": {"new": 2.0}, "new_warmup": "3 steps"}
    path = write_recipe(tmp_path, recipe)
    assert in_child("train", path, "run.name=whole") == 0
    run = tmp_path / "runs" / "killed"
    assert in_child("train", path, "run.name=killed", env={"GROWKIT_FAULT": "after_rename:3"}) == -signal.SIGKILL
    assert 6 < RunFolder.open(run).steps()[-1] < 12, "the kill was to fall into the frozen stage"
    assert in_child("resume", run) == 0
    assert_same_run(run, tmp_path / "runs" / "whole")
    start, end = (RunFolder.open(run).load(step).state for step in (6, 12))
    moved = {name for name in start.params if not torch.equal(start.params[name], end.params[name])}
    still = {name for name in start.params if ".keys." in name or ".values." in name or name == "embedding.weight"}
    assert still and not moved & still
    assert moved == set(start.params) - still


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, optim={"lr": 1e30, "clip_norm": 0.0})
    code, _, err = cli("train", recipe)
    assert code == 3
    assert "not finite since step" in err and "last good checkpoint" in err and "optim.lr" in err
    for step in RunFolder.open(tmp_path / "runs" / "run").steps():
        state = store.read(tmp_path / "runs" / "run" / "checkpoints" / step_name(step)).state
        assert all(state.params[name].isfinite().all() for name in state.params), "a bad state was saved"
