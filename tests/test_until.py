"""Stages that a trigger ends: at the same step in a run that was stopped and in one that was not, with every later
record and tensor bitwise the same; what was decided is written down, and can be reckoned again from the log."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.recipes import read
from growkit.config.load import load_recipe
from growkit.models.presets import PRESETS
from growkit.schedule.decisions import Decision
from growkit.schedule.plan import growth_schedule
from growkit.schedule.stage import GrowthSchedule
from growkit.schedule.triggers import Crossing, Measured, Plateau
from tests.support import cli, in_child, recipe_dict, records, write_recipe
from tests.test_resume import assert_same_run, reproducible

EVERY = 2  # steps between losses; saves, every 5, and stops log others that must not count
PLATEAU = {"kind": "plateau", "window": "4 steps", "least": 0.3, "patience": 2}
CROSSING = {"kind": "crossing", "horizon": 10.0, "size_scale": 30.0, "data_power": 0.3}


def recipe(folder: Path, **trainer: Any) -> Path:
    """Two stages that their triggers end well before their durations do, and a last one."""
    small = recipe_dict(folder, monitor={"log_every": EVERY, "sample_tokens": 2}, optim={"lr": 0.03})
    small["trainer"] |= {"save_every": "5 steps"} | trainer
    first, tokens, _ = small["stages"]
    first |= {"duration": "40 steps", "until": PLATEAU, "decay": "70%", "min_lr_ratio": 0.1}
    tokens |= {"duration": "60 steps", "until": CROSSING, "warmup": "3 steps", "new_warmup": "2 steps"}
    return write_recipe(folder, small)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("until")
    path = recipe(folder)
    assert in_child("train", path, "run.name=whole") == 0
    return path, folder / "runs" / "whole"


def schedules(path: Path, run: Path) -> tuple[GrowthSchedule, GrowthSchedule, tuple[Decision, ...]]:
    """(As planned, as decided, the decisions)."""
    made = RunFolder.open(run).load().manifest.progress.decisions
    planned = load_recipe(path, [], PRESETS)
    return growth_schedule(planned), growth_schedule(planned, made), made


def measured(run: Path, stage: int, begun: int) -> list[Measured]:
    steps = [r for r in records(run, "step") if r["stage"] == stage and r["step"] % EVERY == 0]
    return [Measured(r["step"] - begun, r["tokens"], r["flops"], r["loss"]) for r in steps]


def test_the_reference_run_is_worth_comparing(whole: tuple[Path, Path]) -> None:
    """Both triggers fire, between a first look and the end of the stage, and not at a save."""
    planned, _, (plateau, crossing) = schedules(*whole)
    assert (plateau.by, plateau.stage, crossing.by, crossing.stage) == ("plateau", 0, "crossing", 1)
    for made, stage in zip((plateau, crossing), planned.stages):
        assert 8 < made.stage_step < stage.steps and made.step % EVERY == 0 and made.step % 5
    ends = [r["step"] for r in records(whole[1], "validation") if r["end_of_stage"]]
    assert ends == [plateau.step, crossing.step, crossing.step + 6], "validated at each end, once"
    assert len(records(whole[1], "sample")) == 3
    assert set(ends) <= set(RunFolder.open(whole[1]).steps()), "ends of stages are kept"


def test_the_evidence_is_reckoned_again_from_the_log(whole: tuple[Path, Path]) -> None:
    planned, _, made = schedules(*whole)
    begun = 0
    for decision, stage in zip(made, planned.stages):
        seen = measured(whole[1], decision.stage, begun)
        assert isinstance(stage.until, Plateau | Crossing)
        verdicts = [stage.until.decide(seen[:n]) for n in range(1, len(seen) + 1)]
        assert [verdict.fire for verdict in verdicts] == [False] * (len(seen) - 1) + [True]
        assert verdicts[-1].evidence == {"kind": decision.by} | dict(decision.evidence)
        assert (seen[-1].stage_step, seen[-1].tokens, seen[-1].flops) == (
            decision.stage_step,
            decision.tokens,
            decision.flops,
        )
        begun = decision.step


def test_everything_else_follows_from_the_step_it_ended_at(whole: tuple[Path, Path]) -> None:
    """The stage keeps its rates; the next one warms up from the last of them; tokens and FLOPs are those of the steps
    that were done."""
    planned, real, made = schedules(*whole)
    rates = {(r["stage"], r["step"]): r["lr"] for r in records(whole[1], "step")}
    for index, decision in enumerate(made):
        first, last = real.stages[index + 1], decision.stage_step - 1
        assert real.stages[index].steps == decision.stage_step and real.stages[index].until is None
        assert first.lr.start == planned.stages[index].rate(last) == rates[index, decision.step]
    assert made[0].step > 12, "the first one was decaying"
    assert real.stages[1].lr.start < planned.stages[0].lr.peak
    progress = RunFolder.open(whole[1]).load().manifest.progress
    assert (progress.step, progress.tokens) == (sum(stage.steps for stage in real.stages), real.tokens)
    assert progress.flops == pytest.approx(real.flops)
    assert real.flops < planned.flops


KILLS = [
    ("after_rename", 1),  # before the first decision
    ("mid_validation", 1),
    ("before_rename", 4),
    ("after_rename", 5),
    ("mid_growth", 1),
    ("first_step_after_growth", 1),
    ("mid_growth", 2),
    ("first_step_after_growth", 2),
]


@pytest.mark.parametrize(("point", "nth"), KILLS)
def test_killed_before_at_and_after_a_decision(point: str, nth: int, whole: tuple[Path, Path]) -> None:
    path, reference = whole
    run = reference.parent / f"{point}-{nth}"
    assert in_child("train", path, f"run.name={run.name}", env={"GROWKIT_FAULT": f"{point}:{nth}"}) == -signal.SIGKILL
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)


def test_killed_between_a_decision_and_its_save(whole: tuple[Path, Path]) -> None:
    """It is in the log and in no checkpoint; the log is cut back, and it is made again."""
    path, reference = whole
    _, _, (plateau, _) = schedules(*whole)
    before = [r for r in records(reference, "validation") if r["step"] < plateau.step]
    run = reference.parent / "unsaved"
    env = {"GROWKIT_FAULT": f"mid_validation:{len(before) + 1}"}
    assert in_child("train", path, "run.name=unsaved", env=env) == -signal.SIGKILL
    assert len(records(run, "decision")) == 1
    assert RunFolder.open(run).load().manifest.progress.decisions == ()
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)


def test_what_a_stop_logs_does_not_count(whole: tuple[Path, Path]) -> None:
    """Stopped at step 1, which no other run logs, and again at steps 2 and 3."""
    path, reference = whole
    run = reference.parent / "stopped"
    assert in_child("train", path, "run.name=stopped", "trainer.max_minutes=1e-9") == 3
    for _ in range(2):
        assert in_child("resume", run) == 3
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("max_minutes: 1.0e-09", "max_minutes: null"))
    assert in_child("resume", run) == 0
    ours, theirs = reproducible(run), reproducible(reference)
    assert len(ours) > len(theirs) and [record for record in ours if record in theirs] == theirs
    assert schedules(path, run)[2] == schedules(*whole)[2]


def test_a_branch_and_an_extension_go_on_from_what_was_decided(whole: tuple[Path, Path], tmp_path: Path) -> None:
    _, reference = whole
    _, real, (plateau, _) = schedules(*whole)
    assert in_child("resume", reference, "--from", plateau.step, "--as", "branch") == 0
    assert_same_run(reference.parent / "branch", reference)
    more = write_recipe(tmp_path, {"stages": [{"name": "more", "duration": "6 steps", "warmup": "4 steps"}]})
    code, _, err = cli("extend", reference, more, "--from", plateau.step, "run.name=more")
    assert code == 0, err
    extended = RunFolder.open(reference.parent / "more").load().manifest
    assert extended.progress.decisions == () and [e["kind"] for e in extended.lineage].count("decision") == 1
    lr = records(reference.parent / "more", "step")
    rate = real.stages[0].rate(plateau.stage_step - 1)
    assert next(r["lr"] for r in lr if r["stage"] == 1) == pytest.approx(rate + (real.stages[0].lr.peak - rate) / 2)


def test_a_log_that_lost_what_was_measured_is_said(whole: tuple[Path, Path]) -> None:
    path, reference = whole
    run = reference.parent / "lost"
    assert in_child("train", path, "run.name=lost", env={"GROWKIT_FAULT": "after_rename:3"}) == -signal.SIGKILL
    log = run / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"step": 4,' not in line))
    code, _, err = cli("resume", run)
    assert code == 2 and "lost-measurements" in err and "step 4" in err and "restore the log" in err


def test_what_is_shown(whole: tuple[Path, Path]) -> None:
    path, run = whole
    _, _, (plateau, _) = schedules(*whole)
    said = f"first ended after {plateau.stage_step} steps by plateau: the loss fell by"
    for command in (("lineage", run), ("inspect", run), ("lineage", run / "checkpoints" / f"step-{plateau.step:08}")):
        assert said in " ".join(cli(*command)[1].split()), command
    assert cli("report", run)[0] == 0
    stages = json.loads(cli("lineage", run, "--json")[1])
    assert said in json.dumps(stages)
    code, out, _ = cli("plan", path)
    assert code == 0 and "≤40" in out and "≤60" in out and "first, tokens before its duration" in " ".join(out.split())
    assert [s["at_most"] for s in json.loads(cli("plan", path, "--json")[1])["stages"]] == [True, True, False]
    assert "≤40" in cli("validate", path)[1]


def test_the_rates_by_tokens_are_those_that_were_planned(tmp_path: Path) -> None:
    """A decay by tokens goes by the tokens of the whole stage, also where a trigger ended it."""
    path = recipe(tmp_path)
    grows = ["optim.lr_by=tokens", "stages.0.context={schedule: linear, start: 8}"]
    planned = load_recipe(path, grows, PRESETS)
    whole = growth_schedule(planned).stages[0]
    ended = growth_schedule(planned, [Decision("plateau", 0, "first", 30, 30, 0, 0.0)]).stages[0]
    assert (ended.steps, whole.steps) == (30, 40)
    assert [ended.rate(step) for step in range(30)] == [whole.rate(step) for step in range(30)]
    assert ended.tokens == whole.tokens_after(30)


def test_a_stage_is_not_ended_under_a_mask(tmp_path: Path) -> None:
    """What grew under a mask has to be whole before the next stage: the trigger waits for it."""
    small = recipe_dict(tmp_path, monitor={"log_every": 1, "sample_tokens": 0})
    small["model"] = {"preset": "transformer", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
    masked = {"name": "masked", "duration": "20 steps", "grow": {"mlp_dim": 24}, "methods": {"mlp": "masked"}}
    masked |= {"grow_time": "9 steps", "until": {"kind": "plateau", "window": "2 steps", "least": 100.0}}
    small["stages"] = [small["stages"][0], masked, {"name": "last", "duration": "2 steps", "grow": {"num_layers": 2}}]
    path = write_recipe(tmp_path, small)
    assert cli("train", path)[0] == 0
    (decision,) = records(tmp_path / "runs" / "run", "decision")
    assert decision["stage_step"] == 9


def test_a_plan_of_the_recipe_reads_it_back(tmp_path: Path) -> None:
    """What a run saves as its recipe, with every default written out, means the same."""
    settled, schedule = read(str(recipe(tmp_path)), [])
    assert growth_schedule(settled).stages[0].until == schedule.stages[0].until == Plateau(4, 0.3, 2)
    crossing = schedule.stages[1].until
    assert isinstance(crossing, Crossing) and crossing.horizon == 10.0
    assert crossing.parameters == tuple(stage.model.num_params() for stage in schedule.stages[1:])


def test_a_checkpoint_of_format_3_is_read(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """It was written before a run decided anything."""
    folder = tmp_path / "step"
    shutil.copytree(RunFolder.open(whole[1]).load().folder, folder)
    body = json.loads((folder / manifests.NAME).read_bytes())["body"]
    assert body["format"] == manifests.FORMAT == 4 and len(body["progress"].pop("decisions")) == 2
    (folder / manifests.NAME).write_bytes(manifests._seal(body | {"format": 3}))
    progress = manifests.read(folder).progress
    assert progress.decisions == () and progress.step == body["progress"]["step"]
