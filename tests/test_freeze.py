"""Freezing, policy by policy: what is frozen stands still to the bit, moments too, and what is not moves; and all of it
goes on through a kill and a resume."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from growkit.checkpoint.run_folder import RunFolder
from growkit.cli import recipes
from growkit.growth.engine import added_entries
from growkit.growth.state import TrainState
from growkit.models.spec import param_specs
from growkit.schedule.stage import Stage
from growkit.train.module import StageModule
from tests.support import in_child, probe, recipe_dict, records, trained_like, write_recipe
from tests.test_resume import assert_same_run

FIRST, BOTH = 3, 8  # the step that the first stage ends with, and the second
TRANSFORMER = {"preset": "transformer", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
TOKENFORMER = {"preset": "tokenformer", "embed_dim": 16, "num_layers": 1, "num_heads": 2} | {
    "attention_tokens": 8,
    "mlp_tokens": 8,
}
EVERYTHING = {"num_layers": 2, "mlp_dim": 40, "num_heads": 4, "vocab_size": 272}
UNSCALED = {"mlp_dim": 40, "num_heads": 4, "vocab_size": 272}  # old entries are copied as they are
# Policy: (model, what the second stage grows, which parameters that were there before move: of old_entries, those whose
# new entries do).
POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "old": (TRANSFORMER, {"num_layers": 2}, []),
    "old_layers": (TRANSFORMER, EVERYTHING, ["embedding.weight", "final_norm.gain"]),
    "old_banks": (
        TOKENFORMER,
        {"attention_tokens": 12},
        ["embedding.weight", "layers.0.attention_norm.gain", "layers.0.mlp_norm.gain", "final_norm.gain"],
    ),
    "attention.q": (
        TRANSFORMER,
        {"num_layers": 2},
        [
            *("embedding.weight", "layers.0.attention_norm.gain", "layers.0.attention.k.weight"),
            *("layers.0.attention.v.weight", "layers.0.attention.o.weight", "layers.0.mlp_norm.gain"),
            *("layers.0.mlp.gate_up.weight", "layers.0.mlp.down.weight", "final_norm.gain"),
        ],
    ),
    "old_entries": (
        TRANSFORMER,
        UNSCALED,
        [
            *("embedding.weight", *(f"layers.0.attention.{part}.weight" for part in "qkvo")),
            *("layers.0.mlp.gate_up.weight", "layers.0.mlp.down.weight"),
        ],
    ),
}


def freezing_recipe(folder: Path, model: dict[str, Any], grow: dict[str, Any], **stage: Any) -> Path:
    """Two stages; every step is saved and kept."""
    unwatched = {"ngram_order": 0, "sample_tokens": 0}
    recipe = recipe_dict(folder, trainer={"save_every": "1 steps", "keep_last": 20}, monitor=unwatched)
    recipe["model"] = model
    first, second = recipe["stages"][:2]
    second = second | {"duration": f"{BOTH - FIRST} steps", "grow": grow} | stage
    recipe["stages"] = [first | {"duration": f"{FIRST} steps"}, second]
    return write_recipe(folder, recipe)


def state(run: Path, step: int) -> TrainState:
    return RunFolder.open(run).load(step).state


def stage_of(recipe: Path) -> Stage:
    return recipes.read(str(recipe), [])[1].stages[1]


def assert_held(before: TrainState, after: TrainState, still: Mapping[str, torch.Tensor]) -> None:
    """The entries of ``after`` that ``still`` marks are those of ``before``, all of them, and their moments."""
    for name, at in still.items():
        assert torch.equal(after.params[name][at], before.params[name].flatten()), name
        for kind in ("exp_avg", "exp_avg_sq"):
            now, then = (getattr(one.moments[name], kind) for one in (after, before))
            assert torch.equal(now[at], then.flatten()), (name, kind)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_frozen_stands_still_and_the_rest_moves(policy: str, tmp_path: Path) -> None:
    model, grow, moving = POLICIES[policy]
    recipe = freezing_recipe(tmp_path, model, grow, freeze=[policy])
    assert in_child("train", recipe, "run.name=run") == 0
    stage, run = stage_of(recipe), tmp_path / "runs" / "run"
    before, begun, after = (state(run, step) for step in (FIRST, FIRST + 1, BOTH))
    assert stage.enlarged - stage.frozen == stage.held or policy != "old_entries"
    moved = {name for name in before.params if name not in stage.frozen}
    assert moved == set(moving)
    every = {name: torch.ones_like(begun.params[name], dtype=torch.bool) for name in stage.frozen}
    for name in stage.frozen:  # grown as it may have been
        assert torch.equal(begun.params[name], after.params[name]), name
        assert name not in before.params or begun.moments[name].step == after.moments[name].step == FIRST
    assert_held(before, after, {name: every[name] for name in stage.frozen & before.params.keys() - stage.enlarged})
    added = added_entries(stage.links)
    assert_held(before, after, {name: ~added[name] for name in stage.held})
    for name in after.params.keys() - stage.frozen:
        new = added[name] if name in stage.held else slice(None)
        assert (begun.params[name] != after.params[name])[new].any(), name
        assert after.moments[name].step > (FIRST if name in before.params else 0), name


def test_old_entries_of_a_wider_stream_stand_still(tmp_path: Path) -> None:
    """Whose gains and eps growth itself changed: from the first step on."""
    recipe = freezing_recipe(tmp_path, TRANSFORMER, {"embed_dim": 24, "num_layers": 2}, freeze=["old_entries"])
    assert in_child("train", recipe, "run.name=run") == 0
    stage, run = stage_of(recipe), tmp_path / "runs" / "run"
    begun, after = state(run, FIRST + 1), state(run, BOTH)
    added = added_entries(stage.links)
    assert stage.held == param_specs(stage.links[0].source).keys(), "all of them are wider"
    for name in stage.held:
        assert not added[name].all() and added[name].any()
        assert torch.equal(begun.params[name][~added[name]], after.params[name][~added[name]]), name
        assert (begun.params[name] != after.params[name])[added[name]].any(), name


@pytest.mark.parametrize(
    ("model", "grow", "methods"),
    [
        (TRANSFORMER, EVERYTHING | {"embed_dim": 32}, {"width": "clone_noise", "mlp": "gradmax"}),
        (TOKENFORMER, {"attention_tokens": 12, "embed_dim": 24, "vocab_size": 272}, {}),
    ],
    ids=["transformer", "tokenformer"],
)
def test_old_entries_stand_still_through_a_kill(
    model: dict[str, Any], grow: dict[str, Any], methods: dict[str, str], tmp_path: Path
) -> None:
    """Where they are is the schedule's to say, so the resumed run finds them without the growth before it."""
    recipe = freezing_recipe(tmp_path, model, grow, methods=methods, freeze=["old_entries"])
    assert in_child("train", recipe, "run.name=whole") == 0
    fault = {"GROWKIT_FAULT": f"after_rename:{FIRST + 2}"}
    assert in_child("train", recipe, "run.name=killed", env=fault) == -signal.SIGKILL
    run = tmp_path / "runs" / "killed"
    assert RunFolder.open(run).steps()[-1] == FIRST + 2, "the kill was to fall into the stage"
    assert in_child("resume", run) == 0
    assert_same_run(run, tmp_path / "runs" / "whole")


def test_new_ones_keep_their_factor_through_a_kill(tmp_path: Path) -> None:
    """And it is felt: without it the run goes elsewhere."""
    recipe = freezing_recipe(tmp_path, TRANSFORMER, {"num_layers": 2}, lr_scale={"new": 3.0, "attention.q": 0.5})
    assert in_child("train", recipe, "run.name=whole") == 0
    fault = {"GROWKIT_FAULT": f"after_rename:{FIRST + 2}"}
    assert in_child("train", recipe, "run.name=killed", env=fault) == -signal.SIGKILL
    run = tmp_path / "runs" / "killed"
    text = (run / "recipe.yaml").read_text()
    plain = tmp_path / "runs" / "plain"
    assert in_child("resume", run, "--from", FIRST + 2, "--as", "plain", env={"GROWKIT_FAULT": "mid_shard:1"}) != 0
    assert text.count("new: 3.0") == 1
    (plain / "recipe.yaml").write_text(text.replace("new: 3.0", "new: 1.0"))
    for name in (run, plain):
        assert in_child("resume", name) == 0
    assert_same_run(run, tmp_path / "runs" / "whole")
    assert records(plain, "step")[-1]["loss"] != records(run, "step")[-1]["loss"]


def test_norms_and_clipping_see_what_trains(tmp_path: Path) -> None:
    recipe = freezing_recipe(tmp_path, TRANSFORMER, UNSCALED, freeze=["old_entries"])
    settings, schedule = recipes.read(str(recipe), ["optim.clip_norm=0.1"])
    stage = schedule.stages[1]
    module = StageModule(trained_like(stage.model, dtype=torch.float32), stage, settings, 0)
    module.configure_model()
    assert module.model is not None
    optimizer, tokens = module.configure_optimizers(), probe(stage.model)
    module.model(tokens[:, :-1], tokens[:, 1:]).total.backward()
    added = added_entries(stage.links)
    parameters = {name: p for name, p in module.model.named_parameters() if p.grad is not None}
    assert parameters.keys() == stage.held, "what did not grow has no gradient"
    new = {name: p.grad[added[name]].clone() for name, p in parameters.items() if p.grad is not None}
    module.configure_gradient_clipping(optimizer)
    norms, _ = module.gradient_norms()
    total = torch.cat(list(new.values())).norm()
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(float(total), rel=1e-5)
    for name, p in parameters.items():
        assert p.grad is not None and not p.grad[~added[name]].any()
        torch.testing.assert_close(p.grad[added[name]], new[name] * 0.1 / total)
