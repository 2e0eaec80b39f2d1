"""Two processes that decide: the same in both, replayed by two and by one, and made again where it was not saved or
both were killed while they tried."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from growkit.checkpoint.run_folder import RunFolder
from growkit.schedule.decisions import CANDIDATES, NONE, Decision
from growkit.train.candidates import _ProbeSteps
from growkit.train.run import Run
from tests import support
from tests.support import in_child, recipe_dict, records, write_recipe
from tests.test_candidates import WAYS
from tests.test_distributed import LIMIT, LOSS_TOLERANCE, finish, two_processes, two_ranks
from tests.test_resume import assert_same_run
from tests.test_until import PLATEAU

SAVED = 5  # a step in the first stage, before anything is decided


def recipe(folder: Path) -> Path:
    """A stage that its trigger ends, one that chooses, and one that grows in any case. No dropout: what is dropped
    depends on the process."""
    small = recipe_dict(folder, monitor={"log_every": 2, "sample_tokens": 0}, optim={"lr": 0.03})
    small["model"]["dropout"] = 0.0
    small["trainer"] |= {"save_every": f"{SAVED} steps", "keep_last": 20}
    first, _, last = small["stages"]
    first |= {"duration": "60 steps", "until": PLATEAU, "micro_batch_size": 2}
    choice = {"name": "choice", "duration": "12 steps", "candidates": WAYS, "probe": "6 steps", "new_warmup": "2 steps"}
    small["stages"] = [first, choice, last | {"duration": "3 steps", "grow": {"attention_tokens": 12}}]
    return write_recipe(folder, small)


def _noting(words: list[str], env: dict[str, str], notes: Path) -> None:
    """A process that also writes down what it decides: the log has the first process's decisions only."""
    real = Run.decide

    def decide(self: Run, decision: Decision) -> None:
        with open(notes / f"{self.rank}.jsonl", "a") as file:
            file.write(json.dumps(dataclasses.asdict(decision)) + "\n")
        real(self, decision)

    with patch.object(Run, "decide", decide):
        support._child(words, env)


def decided_by_two(*words: object, run: Path) -> list[dict[str, object]]:
    """What both processes of ``growkit words...`` decided, which is the same."""
    notes = run.parent / f"{run.name}-notes"
    notes.mkdir(parents=True)
    arguments = [str(word) for word in words]
    children = [support.context.Process(target=_noting, args=(arguments, env, notes)) for env in two_ranks(run)]
    for child in children:
        child.start()
    assert finish([*children]) == [0, 0]
    one, two = ((notes / f"{rank}.jsonl").read_text() for rank in range(2))
    assert one == two
    return [json.loads(line) for line in one.splitlines()]


def cut(whole: Path, name: str, step: int) -> Path:
    """A copy of the run, as it was when it had saved ``step``."""
    run = whole.parent / name
    shutil.copytree(whole, run)
    for later in (path for path in (run / "checkpoints").iterdir() if path.name > f"step-{step:08}"):
        shutil.rmtree(later)
    assert RunFolder.open(run).steps()[-1] == step
    return run


class Whole(NamedTuple):
    """A run of two processes that was never stopped, and what both decided."""

    strategy: str
    run: Path
    made: list[dict[str, object]]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def uncut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp(request.param)
    path, run = recipe(folder), folder / "runs" / "whole"
    two = (f"trainer.strategy={request.param}", "trainer.devices=2", "run.name=whole")
    return Whole(request.param, run, decided_by_two("train", path, *two, run=run))


def test_two_processes_decide_alike(uncut: Whole) -> None:
    strategy, whole, made = uncut
    assert [(d["by"], d["stage"]) for d in made] == [("plateau", 0), (CANDIDATES, 1)]
    end, choice = (Decision(**d) for d in made)  # type: ignore[arg-type]
    assert SAVED < 8 < end.stage_step < 60 and choice.chosen != NONE and choice.step == end.step
    manifest = RunFolder.open(whole).load().manifest
    assert [json.loads(json.dumps(dataclasses.asdict(d))) for d in manifest.progress.decisions] == made

    again = cut(whole, "again", SAVED)  # in the midst of what the trigger looks at
    assert decided_by_two("resume", again, run=again) == made
    assert_same_run(again, whole)

    alone = cut(whole, "alone", end.step + 12)  # both decisions are made
    text = (alone / "recipe.yaml").read_text()
    text = text.replace(f"strategy: {strategy}", "strategy: single").replace("devices: 2", "devices: 1")
    (alone / "recipe.yaml").write_text(text)
    assert in_child("resume", alone, env={"GROWKIT_FAULT": "mid_probe:1"}) == 0, "nothing was tried again"
    assert RunFolder.open(alone).load().manifest.progress.decisions == manifest.progress.decisions
    for one, other in zip(records(alone, "step"), records(whole, "step"), strict=True):
        assert abs(one["loss"] - other["loss"]) <= LOSS_TOLERANCE

    if strategy == "ddp":
        lost = cut(whole, "lost", SAVED)
        log = (lost / "metrics.jsonl").read_text().splitlines(True)
        (lost / "metrics.jsonl").write_text("".join(line for line in log if '"step": 4,' not in line))
        assert two_processes("resume", lost, run=lost) == [2, 2], "neither waits for the other"


def _standing_still(words: list[str], env: dict[str, str], marks: Path) -> None:
    """A process that says when it is in the third step of the second way, and goes no further."""
    real, tried = _ProbeSteps.on_train_batch_end, []

    def ended(self: _ProbeSteps, *arguments: Any) -> None:
        real(self, *arguments)
        if self not in tried:
            tried.append(self)
        if len(tried) == 2 and self.module.stage_step == 3:
            (marks / str(self.run.rank)).touch()
            time.sleep(LIMIT)

    with patch.object(_ProbeSteps, "on_train_batch_end", ended):
        support._child(words, env)


def kill_while_trying(run: Path) -> None:
    """Resumes the run in two processes and kills both in the midst of a probe."""
    marks = run.parent / f"{run.name}-marks"
    marks.mkdir()
    children: list[BaseProcess] = [
        support.context.Process(target=_standing_still, args=(["resume", str(run)], env, marks))
        for env in two_ranks(run)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + LIMIT
    while len(list(marks.iterdir())) < 2 and all(child.is_alive() for child in children):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    arrived = len(list(marks.iterdir()))
    for child in children:
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
    assert (finish(children), arrived) == ([-signal.SIGKILL] * 2, 2)


def test_both_killed_while_trying(uncut: Whole) -> None:
    """Twice. What was tried is tried again by both, and all later losses and the weights are those of the whole run."""
    end, choice = uncut.made
    run = cut(uncut.run, "killed", int(str(end["step"])))
    for _ in range(2):
        shutil.rmtree(run.parent / "killed-marks", ignore_errors=True)
        kill_while_trying(run)
        trials = records(run, "trial")
        assert [(trial["number"], "loss" in trial) for trial in trials] == [(1, False), (1, True), (2, False)]
        assert [d.by for d in RunFolder.open(run).load().manifest.progress.decisions] == [end["by"]]
    assert decided_by_two("resume", run, run=run) == [choice]
    assert_same_run(run, uncut.run)
    assert len(records(run, "trial")) == len(records(uncut.run, "trial")) == 6


def _sleeping() -> None:
    time.sleep(LIMIT)


def test_processes_that_wait_for_ever_fail() -> None:
    children: list[BaseProcess] = [support.context.Process(target=target) for target in (_sleeping, int)]
    for child in children:
        child.start()
    with pytest.raises(
        AssertionError, match=r"after 2 s the processes \[0\] have not ended \(exit codes: \[None, 0\]\)"
    ):
        finish(children, limit=2)
    assert not children[0].is_alive()
