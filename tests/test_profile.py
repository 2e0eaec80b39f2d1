"""``growkit profile``: the phases make up the step, the groups make up the time, the trace names both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growkit.cli import recipes
from growkit.train.data import prepare_data
from growkit.train.profile import GROUPS, OTHER, PHASES, profile_stage
from tests.support import cli, write_recipe

BETWEEN = 0.5  # share of a tiny step that may pass between its phases (hooks, the loop)


def test_phases_and_groups_account_for_the_step(tmp_path: Path) -> None:
    recipe, schedule = recipes.read(str(write_recipe(tmp_path)), [])
    stage, trace = schedule.stages[2], tmp_path / "trace.json"  # of several micro-batches a step
    assert stage.accumulate > 1
    result = profile_stage(recipe, schedule, prepare_data(recipe, schedule), stage, 5, trace)
    assert tuple(result.phases) == PHASES and all(seconds > 0 for seconds in result.phases.values())
    step = sum(result.steps) / len(result.steps)
    assert len(result.steps) == 5 and (1 - BETWEEN) * step < sum(result.phases.values()) < step
    assert set(result.groups) <= {*GROUPS, OTHER} and {"attention", "matrix products"} <= set(result.groups)
    assert sum(result.groups.values()) == pytest.approx(1)
    assert result.utilisation == pytest.approx(stage.flops_per_step / result.step_seconds / 1e9)
    events = json.loads(trace.read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("name") in PHASES]
    assert named.count("backward") == 3 * stage.accumulate, "three steps are traced"
    calls = {name: count for name, _, count in result.operations}
    assert calls["aten::_fused_adamw_"] == pytest.approx(round(calls["aten::_fused_adamw_"]))


def test_it_shows_and_writes_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code, out, err = cli("profile", write_recipe(tmp_path), "--stage", 1, "--steps", 2, "-o", trace)
    assert code == 0, err
    for part in (
        "ms a step",
        "tokens/s",
        "of what a matrix product reaches here",
        "forward",
        "matrix products",
        "aten::",
    ):
        assert part in out
    assert trace.stat().st_size > 10_000
    assert not (tmp_path / "runs").exists()
