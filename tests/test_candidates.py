"""Stages that choose their growth: every way is trained for the same FLOPs from the same state, held-out data choose,
and what was tried leaves no trace but its cost and the decision; stopped anywhere, the run is bitwise the same."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.recipes import read
from growkit.config.load import load_recipe, parse_recipe, read_mapping, to_yaml
from growkit.errors import ConfigError
from growkit.models.presets import PRESETS
from growkit.schedule.decisions import CANDIDATES, NONE, Decision
from growkit.schedule.plan import growth_schedule
from growkit.schedule.stage import GrowthSchedule, Stage
from growkit.train.display import Display
from growkit.train.loggers.rows import Rows
from growkit.train.run import Run
from scripts import decisions
from tests.support import cli, in_child, recipe_dict, records, write_recipe
from tests.test_resume import TIMING, assert_same_run

WAYS = [{"name": "deeper", "grow": {"num_layers": 2}}, {"name": "wider", "grow": {"mlp_tokens": 32}}]
PROBE = 5  # steps of the dearest candidate


def recipe(folder: Path, *, least: float = 0.0, **choice: Any) -> Path:
    """A stage, one that chooses, and one that grows in any case. Dropout is on."""
    small = recipe_dict(folder, optim={"lr": 0.02}, monitor={"log_every": 2, "sample_tokens": 0})
    first, _, last = small["stages"]
    first["duration"] = "14 steps"
    choose = {"name": "choice", "duration": "12 steps", "new_warmup": "2 steps"}
    choose |= choice or {"candidates": WAYS, "probe": f"{PROBE} steps", "probe_least": least}
    small["stages"] = [first, choose, last | {"grow": {"attention_tokens": 12}}]
    return write_recipe(folder, small)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("candidates")
    path = recipe(folder)
    assert in_child("train", path, "run.name=whole") == 0
    return path, folder / "runs" / "whole"


def planned(path: Path, *made: Decision) -> GrowthSchedule:
    return growth_schedule(load_recipe(path, [], PRESETS), made)


def chosen(name: str, stage: int = 1, title: str = "choice") -> Decision:
    return Decision(CANDIDATES, stage, title, 0, 14, 0, 0.0, chosen=name)


def choice_of(run: Path) -> Decision:
    (decision,) = RunFolder.open(run).load().manifest.progress.decisions
    return decision


def test_every_way_gets_the_same_flops(tmp_path: Path) -> None:
    """To the nearest step of each: the dearest gets the probe as it is written, the others more steps."""
    stage = planned(recipe(tmp_path)).stages[1]
    none, deeper, wider = stage.trials
    assert (none.name, deeper.name, wider.name) == (NONE, "deeper", "wider")
    assert deeper.steps == PROBE < wider.steps < none.steps
    for trial in stage.trials:
        assert abs(trial.flops - deeper.flops) <= trial.stage.flops_per_step / 2
        assert trial.flops == trial.steps * trial.stage.flops_per_step
    assert stage.model == deeper.stage.model, "the largest one is planned with"
    assert stage.probe_flops == sum(trial.flops for trial in stage.trials)
    schedule = planned(tmp_path / "recipe.yaml")
    assert schedule.flops == sum(one.total_flops for one in schedule.stages) + stage.probe_flops


@pytest.fixture(scope="module")
def plain(whole: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs without a choice, each grown in one of the ways, and validated where its probe ended."""
    runs = {}
    for trial in planned(whole[0]).stages[1].trials:
        folder = tmp_path_factory.mktemp(trial.name)
        grow = {way["name"]: way["grow"] for way in WAYS}.get(trial.name, {})
        path = recipe(folder, grow=grow, validate_every=f"{trial.steps} steps")
        assert in_child("train", path, f"run.name={trial.name}") == 0
        runs[trial.name] = folder / "runs" / trial.name
    return runs


def test_a_probe_is_the_beginning_of_the_stage_that_would_follow(
    whole: tuple[Path, Path], plain: dict[str, Path]
) -> None:
    """Its held-out loss is, bit for bit, that of a run that grew so without being asked; the lowest one is chosen."""
    decision = choice_of(whole[1])
    tried = decision.evidence["candidates"]
    for trial in planned(whole[0]).stages[1].trials:
        scored = records(plain[trial.name], "validation")
        (loss,) = (r["loss"] for r in scored if r["step"] == 14 + trial.steps)
        assert tried[trial.name] == {"loss": loss, "steps": trial.steps, "tokens": trial.tokens, "flops": trial.flops}
    assert len({way["loss"] for way in tried.values()}) == 3
    assert decision.chosen == min(tried, key=lambda name: tried[name]["loss"]) != NONE


def test_what_was_tried_leaves_its_cost_alone(whole: tuple[Path, Path], plain: dict[str, Path]) -> None:
    """The run goes on as one that grew so without being asked: same data, same dropout, same certificate."""
    decision = choice_of(whole[1])
    mine, theirs = records(whole[1]), records(plain[str(decision.chosen)])
    (made,) = (r for r in mine if r["kind"] == "decision")
    mine.remove(made)
    trials = [r for r in mine if r["kind"] == "trial"]
    assert [(r["candidate"], r.get("loss")) for r in trials] == [
        (trial.name, loss)
        for trial in planned(whole[0]).stages[1].trials
        for loss in (None, decision.evidence["candidates"][trial.name]["loss"])
    ]
    mine = [r for r in mine if r["kind"] != "trial"]
    assert made["flops"] == decision.flops == mine[mine.index(records(whole[1], "stage")[1])]["flops"]
    mine, theirs = ([r for r in log if r["kind"] != "validation" or r["end_of_stage"]] for log in (mine, theirs))
    assert len(mine) == len(theirs)
    for ours, other in zip(mine, theirs, strict=True):
        spent = decision.probe_flops if ours["stage"] > 0 else 0.0
        assert ours["flops"] == pytest.approx(other["flops"] + spent)
        ours, other = ({k: v for k, v in r.items() if k not in TIMING | {"flops"}} for r in (ours, other))
        assert ours == other
    a, b = (RunFolder.open(run).load().manifest.progress for run in (whole[1], plain[str(decision.chosen)]))
    assert (a.data, a.tokens, a.step) == (b.data, b.tokens, b.step)
    assert a.flops == pytest.approx(planned(whole[0], decision).flops)


@pytest.mark.parametrize(
    ("point", "nth"),
    [("mid_probe", 1), ("mid_probe", 3), ("mid_growth", 1), ("mid_growth", 3), ("first_step_after_growth", 1)],
)
def test_killed_while_trying_and_after(point: str, nth: int, whole: tuple[Path, Path]) -> None:
    """The first two growths are those of the candidates; the third one is of the stage."""
    path, reference = whole
    run = reference.parent / f"{point}-{nth}"
    assert in_child("train", path, f"run.name={run.name}", env={"GROWKIT_FAULT": f"{point}:{nth}"}) == -signal.SIGKILL
    assert RunFolder.open(run).load().manifest.progress.decisions == ()
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)


def test_killed_after_the_choice_is_saved(whole: tuple[Path, Path]) -> None:
    """It is replayed, not made again."""
    path, reference = whole
    run = reference.parent / "later"
    env = {"GROWKIT_FAULT": "after_rename:5"}
    assert in_child("train", path, "run.name=later", env=env) == -signal.SIGKILL
    progress = RunFolder.open(run).load().manifest.progress
    assert progress.stage == 1 and len(progress.decisions) == 1
    assert in_child("resume", run, env={"GROWKIT_FAULT": "mid_probe:1"}) == 0, "nothing was tried again"
    assert_same_run(run, reference)


def test_a_stop_while_trying_writes_nothing(whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, reference = whole
    real, calls = Run.asked_to_stop, []

    def asked(self: Run) -> bool:
        calls.append(self.progress.step)
        return len(calls) == 14 + 9 or real(self)  # in the second way's probe

    with monkeypatch.context() as patch:
        patch.setattr(Run, "asked_to_stop", asked)
        patch.setattr(Run, "stop_cause", "a test")
        assert cli("train", path, "run.name=asked")[0] == 3
    run = reference.parent / "asked"
    assert len(calls) == 14 + 9 and not records(run, "decision")
    assert RunFolder.open(run).steps()[-1] == 14
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)


def test_not_growing_is_chosen_where_nothing_helps_enough(tmp_path: Path) -> None:
    """Then growth by choice has stopped: a later stage does not try. What grows in any case does."""
    text = recipe(tmp_path, least=5.0).read_text()
    more = {"name": "again", "duration": "2 steps", "candidates": [{"name": "most", "grow": {"num_layers": 3}}]}
    small = read_mapping(text, "")
    small["stages"].insert(2, more | {"probe": "1 step"})
    path = write_recipe(tmp_path, small)
    assert cli("train", path)[0] == 0
    run = tmp_path / "runs" / "run"
    decision = choice_of(run)
    assert decision.chosen == NONE and decision.evidence["least"] == 5.0
    sizes = [r["parameters"] for r in records(run, "stage")]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]
    assert len(records(run, "growth")) == 1
    after = planned(path, decision)
    assert not any(stage.trials or stage.links for stage in after.stages[1:3])
    assert after.stages[2].probe_flops == 0 and planned(path).stages[2].probe_flops > 0
    assert RunFolder.open(run).load().manifest.progress.flops == pytest.approx(after.flops)


def test_a_crossing_waits_for_no_growth_that_was_given_up(tmp_path: Path) -> None:
    small = read_mapping(recipe(tmp_path).read_text(), "")
    until = {"name": "between", "duration": "90 steps", "until": {"kind": "crossing"}}
    again = {"name": "again", "duration": "9 steps", "probe": "1 step"}
    again |= {"candidates": [{"name": "most", "grow": {"num_layers": 3}}]}
    small["stages"][2:2] = [until, again]
    path = write_recipe(tmp_path, small)
    assert planned(path).stages[2].until is not None
    assert planned(path, chosen("wider")).stages[2].until is not None
    assert planned(path, chosen(NONE)).stages[2].until is None


def test_every_outcome_is_planned_before_the_run(tmp_path: Path) -> None:
    """A later stage may be possible after one choice only; that is said at once, with the choice."""
    small = read_mapping(recipe(tmp_path).read_text(), "")
    small["stages"][2]["grow"] = {"mlp_tokens": 32}
    path = write_recipe(tmp_path, small)
    with pytest.raises(ConfigError, match=r"stages.2.grow: .*if the choice in 'choice' is 'wider'.*nothing-grows"):
        planned(path)
    small["stages"][2]["grow"] = {"mlp_tokens": 40}
    assert [planned(write_recipe(tmp_path, small), chosen(name)).last.model.num_params() for name in ("none", "wider")]


def test_a_stage_that_chooses_may_be_ended_by_a_trigger(tmp_path: Path) -> None:
    """Both decisions are of one stage, and each is replayed as what it is."""
    until = {"kind": "plateau", "window": "2 steps", "least": 100.0}
    path = recipe(tmp_path, candidates=WAYS, probe="2 steps", until=until)
    assert in_child("train", path) == 0
    run = tmp_path / "runs" / "run"
    choice, end = RunFolder.open(run).load().manifest.progress.decisions
    assert (choice.by, end.by, end.stage_step) == (CANDIDATES, "plateau", 4)
    assert planned(path, choice, end).stages[1].steps == 4
    assert in_child("train", path, "run.name=killed", env={"GROWKIT_FAULT": "mid_growth:4"}) == -signal.SIGKILL
    assert in_child("resume", run.parent / "killed") == 0
    assert_same_run(run.parent / "killed", run)


def test_the_saved_recipe_means_the_same_whatever_is_chosen(tmp_path: Path) -> None:
    """Durations in FLOPs: how many steps a share of the stage is depends on the model."""
    choice = {"candidates": WAYS, "probe": "10%", "duration": "3e8 flops", "warmup": "10%", "decay": "30%"}
    path = recipe(tmp_path, **choice)
    settled, _ = read(str(path), [])
    again = parse_recipe(to_yaml(settled), [], PRESETS, name="saved")
    for name in (NONE, "deeper", "wider"):
        (mine, other) = (growth_schedule(one, [chosen(name)]) for one in (again, load_recipe(path, [], PRESETS)))
        assert [spans(stage) for stage in mine.stages] == [spans(stage) for stage in other.stages]
    steps = [growth_schedule(again, [chosen(name)]).stages[1].steps for name in (NONE, "wider", "deeper")]
    assert steps[0] > steps[1] > steps[2]


def spans(stage: Stage) -> tuple[int, int, int]:
    return stage.steps, stage.lr.warmup_steps, stage.lr.decay_steps


def test_what_is_shown(whole: tuple[Path, Path]) -> None:
    path, run = whole
    decision = choice_of(run)
    said = f"choice chose {decision.chosen}: held-out nats after the probe: {decision.chosen} "
    for command in (("lineage", run), ("inspect", run), ("lineage", RunFolder.open(run).checkpoint(32))):
        assert said in " ".join(cli(*command)[1].replace("│", " ").split()), command
    code, out, _ = cli("plan", path)
    assert code == 0 and "deeper?" in out and "wider?" in out and "planned with its largest candidate" in out
    stage = json.loads(cli("plan", path, "--json")[1])["stages"][1]
    assert [way["name"] for way in stage["candidates"]] == [NONE, "deeper", "wider"]
    assert stage["flops"] == pytest.approx(planned(path).stages[1].total_flops + stage["probe_flops"])
    assert "wider?" in cli("validate", path)[1]
    screen = io.StringIO()
    display = Display(lambda: planned(path, decision), "plain", Console(file=screen, width=200))
    for record in records(run, "trial")[:2]:
        display(record)
    begun, ended = screen.getvalue().splitlines()
    assert begun.startswith("trial 1/3 of choice, none: ") and "held-out loss" in ended
    last = {"kind": "ngram", "step": 99, "tokens": 0, "flops": 0.0, "bits_per_byte": 1.0}
    rows = list(Rows().gather([*records(run), last]))
    assert rows == list(Rows().gather([r for r in [*records(run), last] if r["kind"] != "trial"])), (
        "no rows of their own"
    )
    (row,) = (row for row in rows if "growth/decision" in row.values)
    assert row.step == decision.step + 1 and row.values["growth/mark"] == 1.0
    assert row.values["growth/candidate/none"] == decision.evidence["candidates"][NONE]["loss"]


def test_the_page_tells_what_was_measured() -> None:
    """The table is that of the script's results, and these are of the recipes as they are now."""
    rows = json.loads(decisions.RESULTS.read_text())["rows"]
    assert [row["recipe"] for row in rows] == list(decisions.RECIPES)
    assert decisions.table(rows) in (decisions.ROOT / "docs" / "how-to" / "growth-that-decides.md").read_text()
    for row in rows:
        made = [Decision(**{k: v for k, v in one.items() if k != "kind"}) for one in row["decisions"]]
        schedule = growth_schedule(read(row["recipe"], [])[0], made)
        assert [(stage.steps, stage.model.num_params()) for stage in schedule.stages] == [
            (part["steps"], part["parameters"]) for part in row["stages"]
        ]
        assert schedule.flops == pytest.approx(row["flops_training"] + row["flops_probes"])
