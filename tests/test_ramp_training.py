"""Ramps in a schedule and in a run: pure functions of progress, the same after a kill, gone in the next stage."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from growkit.checkpoint.hf.native import Native
from growkit.checkpoint.run_folder import RunFolder
from growkit.config.load import parse_recipe
from growkit.data.corpus import load_corpus
from growkit.errors import ConfigError
from growkit.eval.validate import mean_loss
from growkit.growth.operator import EXACT_FLOAT64, RESCALED_FLOAT32
from growkit.growth.path import grown_config
from growkit.models.config import is_masked, unmasked
from growkit.models.decoder import build
from growkit.models.presets import PRESETS
from growkit.schedule.plan import growth_schedule
from growkit.schedule.progress import Progress
from growkit.schedule.stage import GrowthSchedule
from tests.support import cli, in_child, model_config, recipe_dict, records, trained_like, write_recipe
from tests.test_resume import assert_same_run

SAME = 1e-6  # nats; one checkpoint scored by the run and alone, float32 sums of the same numbers

WIDER = {"num_layers": 2, "embed_dim": 24, "mlp_dim": 48, "num_heads": 4}
MASKED = {"depth": "masked", "width": "masked", "mlp": "masked", "heads": "masked"}
MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"model": {"preset": "transformer", "mlp_dim": 32}, "grow": WIDER, "methods": MASKED},
    "tokens": {
        "model": {"preset": "tokenformer", "attention_tokens": 8, "mlp_tokens": 8},
        "grow": {"attention_tokens": 12, "mlp_tokens": 16},
        "methods": {"param_tokens": "masked"},
    },
    "shared": {
        "model": {"preset": "tokenformer", "attention_tokens": 8, "mlp_tokens": 8, "token_norm": "shared"},
        "grow": {"attention_tokens": 12, "mlp_tokens": 16},
        "methods": {"param_tokens": "annealed"},
    },
}


def ramping_recipe(folder: Path, kind: str = "transformer", **second: Any) -> dict[str, Any]:
    """6 steps, 6 more with masked growth that takes 4 of them, 4 that grow nothing."""
    recipe = recipe_dict(folder)
    recipe["model"] = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1} | MODELS[kind]["model"]
    grow = {"duration": "6 steps", "grow": MODELS[kind]["grow"], "methods": MODELS[kind]["methods"]}
    recipe["stages"][1] = {"name": "ramped", "grow_time": "4 steps", "validate_every": "2 steps"} | grow | second
    recipe["stages"][2] = {"name": "on", "duration": "4 steps"}
    return recipe


def schedule_of(recipe: dict[str, Any], folder: Path) -> GrowthSchedule:
    return growth_schedule(parse_recipe(write_recipe(folder, recipe).read_text(), [], PRESETS, name="recipe"))


@pytest.mark.parametrize("kind", MODELS)
def test_the_ramp_of_every_step(kind: str, tmp_path: Path) -> None:
    first, ramped, on = schedule_of(ramping_recipe(tmp_path, kind), tmp_path).stages
    assert [ramped.ramp_at(step) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [stage.ramp_at(step) for stage in (first, on) for step in (0, 3)] == [1.0] * 4
    assert ramped.model.ramp == 0 and is_masked(ramped.model)
    assert on.model == unmasked(ramped.model_at(6)) and not on.links and not is_masked(on.model)


def test_a_schedule_knows_the_model_of_every_step(tmp_path: Path) -> None:
    schedule = schedule_of(ramping_recipe(tmp_path), tmp_path)
    stage = schedule.stages[1]
    at = Progress(stage=1)
    for step in range(1, 7):
        assert schedule.model_at(dataclasses.replace(at, stage_step=step)) == stage.model_at(step)
    ramps = [stage.model_at(step).ramp for step in range(7)]
    assert ramps == sorted(ramps) and ramps[0] == 0 and ramps[-1] == 1


@pytest.mark.parametrize(("text", "steps"), [("20%", 1), ("1%", 1), ("0 steps", 1), ("100%", 6), ("256 tokens", 2)])
def test_grow_time(text: str, steps: int, tmp_path: Path) -> None:
    assert schedule_of(ramping_recipe(tmp_path, grow_time=text), tmp_path).stages[1].ramp_steps == steps


def test_what_a_schedule_refuses(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"stages\.1\.grow_time: got '7 steps'; is 7 steps, longer .*\[ramp-too-long\]"
    ):
        schedule_of(ramping_recipe(tmp_path, grow_time="7 steps"), tmp_path)
    with pytest.raises(ConfigError, match=r"stages\.1\.grow_time.*\[bad-duration\]"):
        schedule_of(ramping_recipe(tmp_path, grow_time="soon"), tmp_path)
    plain = {"methods": {}, "grow_time": "7 steps"}  # nothing is masked, so nothing asks how long
    assert schedule_of(ramping_recipe(tmp_path, **plain), tmp_path).stages[1].ramp_steps == 0


@pytest.mark.parametrize(
    ("model", "grow", "methods", "words"),
    [
        ({"preset": "transformer", "norm": "layernorm"}, {"embed_dim": 32}, {"width": "masked"}, "needs RMSNorm"),
        ({"preset": "transformer", "num_experts": 4}, {"mlp_dim": 80}, {"mlp": "masked"}, "no masks for experts"),
        ({"preset": "transformer"}, {"mlp_dim": 80, "num_experts": 4}, {"mlp": "masked"}, "no masks for experts"),
        (
            {"preset": "tokenformer", "token_norm": "shared"},
            {"mlp_tokens": 20},
            {"param_tokens": "masked"},
            "held or published or annealed",
        ),
        ({"preset": "tokenformer"}, {"mlp_tokens": 20}, {"param_tokens": "annealed"}, "use bank or masked"),
    ],
)
def test_what_has_no_mask(model: dict[str, Any], grow: dict[str, Any], methods: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{words}.*\[method-does-not-fit\]"):
        grown_config(model_config(**model), grow, methods)


def test_a_model_on_its_ramp_neither_grows_nor_leaves() -> None:
    target = grown_config(model_config("transformer"), {"mlp_dim": 80}, {"mlp": "masked"})
    half = dataclasses.replace(target, ramp=0.5)
    with pytest.raises(ConfigError, match=r"ramp is at 0.5.*\[still-ramping\]"):
        grown_config(half, {"mlp_dim": 96}, {})
    with pytest.raises(ConfigError, match=r"ramp is at 0.5.*\[not-expressible\]"):
        Native().to_hf(half, {})
    whole = dataclasses.replace(target, ramp=1.0)
    fields, _ = Native().to_hf(whole, trained_like(whole).params)
    assert fields == Native().fields(grown_config(model_config("transformer"), {"mlp_dim": 80}, {}))


@pytest.mark.parametrize("kind", MODELS)
def test_killed_in_the_middle_of_a_ramp(kind: str, tmp_path: Path) -> None:
    """Every later record and the final tensors are those of a run that was never stopped. A checkpoint by itself scores
    what the run scored there, and the run goes on without masks in the stage after."""
    recipe = write_recipe(tmp_path, ramping_recipe(tmp_path, kind))
    assert in_child("train", recipe, "run.name=whole") == 0
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    assert in_child("train", recipe, "run.name=killed", env={"GROWKIT_FAULT": "after_rename:3"}) == -signal.SIGKILL
    half = RunFolder.open(run).load()
    assert half.manifest.progress.stage_step == 2 and half.manifest.model.ramp == 0.5
    assert in_child("resume", run) == 0
    assert_same_run(run, whole)
    ramps = [record.get("ramp") for record in records(whole, "step")]
    assert ramps == [None] * 6 + [0, 0.25, 0.5, 0.75, 1, 1] + [None] * 4
    (growth,) = records(whole, "growth")
    tolerance = RESCALED_FLOAT32 if "width" in MODELS[kind]["methods"] else EXACT_FLOAT64
    assert growth["certificate"]["delta_logits_float64"] <= tolerance
    assert growth["certificate"]["exact"] and not growth["certificate"]["dead"]
    scored = {r["step"]: r["loss"] for r in records(whole, "validation")}
    config = parse_recipe(recipe.read_text(), [], PRESETS, name="recipe")
    corpus = load_corpus(config.data)
    model = build(half.manifest.model, half.state.params)
    total, count = mean_loss(model, corpus.validation, 16, config.monitor.validation_tokens)
    assert abs(total / count - scored[8]) <= SAME
    model.set_ramp(1.0)
    total, count = mean_loss(model, corpus.validation, 16, config.monitor.validation_tokens)
    assert abs(total / count - scored[8]) > 10 * SAME
    ends = {step: RunFolder.open(whole).load(step).manifest.model for step in (12, 16)}
    assert is_masked(ends[12]) and ends[16] == unmasked(ends[12])


def test_commands_on_a_checkpoint_in_the_middle_of_a_ramp(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ramping_recipe(tmp_path))
    assert in_child("train", recipe, env={"GROWKIT_FAULT": "after_rename:3"}) == -signal.SIGKILL
    run, made = tmp_path / "runs" / "run", tmp_path / "made"
    refused = {
        "still-ramping": ("grow", run, "mlp_dim=96", "--output", made),
        "not-expressible": ("export", run, made),
    }
    for code, words in refused.items():
        status, _, err = cli(*words)
        assert status == 2 and f"[{code}]" in err and "0.5" in err and not made.exists(), err
    more = recipe_dict(tmp_path)["stages"][:1]
    status, _, err = cli("extend", run, write_recipe(tmp_path, {"stages": more}), "run.name=more")
    assert status == 2 and "[still-ramping]" in err and not (tmp_path / "runs" / "more").exists(), err
    status, _, err = cli("generate", run, "--tokens", "3")
    assert status == 0, err
    assert in_child("resume", run) == 0
    status, _, err = cli("grow", run, "mlp_dim=96", "methods.mlp=masked", "--output", made)
    assert status == 2 and "no stage here" in err and not made.exists(), err
    for words in (("grow", run, "mlp_dim=96", "--output", made), ("export", run, tmp_path / "exported")):
        status, _, err = cli(*words)
        assert status == 0, err
