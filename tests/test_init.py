"""``growkit init``: every answer gives a recipe that is sound, says what was asked, and trains."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from growkit.cli.init import SHARES, SIZES, recipe_text
from growkit.cli.recipes import read
from growkit.models.presets import PRESETS
from tests.support import cli, corpus_file

ROUNDING = 0.02  # relative: durations are written with three digits and rounded to whole steps


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("stages", list(SHARES))
def test_every_combination_grows_in_every_stage_and_spends_the_budget(preset: str, size: str, stages: int) -> None:
    text, schedule = recipe_text(data="stdlib", preset=preset, size=size, budget="1e16 flops", stages=stages)
    assert [bool(stage.links) for stage in schedule.stages] == [False] + [True] * (stages - 1)
    assert all(link.exactness.kind == "exact" for stage in schedule.stages for link in stage.links)
    assert schedule.flops == pytest.approx(1e16, rel=ROUNDING)
    sizes = {recipe_text(data="x", preset=preset, size=size, budget="9 steps", stages=n)[1].last.model for n in (1, 2)}
    assert len({model.num_params() for model in sizes}) == 1, "the end does not depend on the way"
    assert all(len(line) <= 110 for line in text.splitlines())


def test_budgets_in_every_unit() -> None:
    def flops(budget: str | None) -> float:
        return recipe_text(data="x", preset="transformer", size="small", budget=budget, stages=1)[1].flops

    _, one = recipe_text(data="x", preset="transformer", size="small", budget="1e16 flops", stages=1)
    per_token = one.last.flops_per_step / one.last.global_batch_tokens
    assert flops("20M tokens") == pytest.approx(20e6 * per_token, rel=ROUNDING)
    assert flops("500 steps") == pytest.approx(500 * one.last.flops_per_step, rel=ROUNDING)
    assert flops(None) == pytest.approx(20 * one.last.model.num_params() * per_token, rel=ROUNDING)


def test_it_asks_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("my text: 'a' # b\n\nsmall\n\n"))
    code, out, err = cli("init", tmp_path / "mine.yaml", "--ask", "--stages", "2")
    assert code == 0, err
    assert "note: my text: 'a' # b is not there yet" in out
    assert "Text to learn" in out + err and "Size at the end" in out + err and "Stages" not in out + err
    recipe, schedule = read(str(tmp_path / "mine.yaml"), [])
    assert (recipe.data.source, recipe.model.preset, len(schedule.stages)) == ("my text: 'a' # b", "tokenformer", 2)
    assert recipe.model.embed_dim == SIZES["small"].width


def test_without_a_terminal_it_asks_nothing_and_the_recipe_trains(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    code, out, err = cli("init", target, "--data", corpus_file(tmp_path), "--budget", "4e10 flops")
    assert code == 0 and f"growkit train {target}" in out.replace("\n", ""), err
    quiet = (
        "monitor.validation_tokens=256",
        "monitor.progress=off",
        "monitor.ngram_order=0",
        "monitor.sample_tokens=0",
        f"run.folder={tmp_path}",
    )
    assert cli("train", target, *quiet) == (0, "", "")
