"""Recipes that train and grow with ``trainer.backend=triton``, against the same with the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import cli, recipe_dict, records, write_recipe

SAME = 1e-5  # relative, of losses in float32: sums in another order, over four steps
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokenformer": ({}, {"attention_tokens": 12}),
    "tokenformer, GELU before the norm": ({"theta": "gelu_l2_norm", "token_norm": "shared"}, {"mlp_tokens": 12}),
    "tokenformer, blocks": ({"altup_blocks": 2}, {"attention_tokens": 12, "mlp_tokens": 12}),
    "mamba": ({"preset": "mamba", "d_state": 3}, {"d_state": 5}),
    "mamba, parameter tokens": (
        {"preset": "mamba", "projection": "pattention", "mamba_tokens": 8, "d_state": 3},
        {"mamba_tokens": 12},
    ),
    "hybrid": ({"preset": "mamba", "pattern": "mamba+attention", "num_layers": 2, "d_state": 3}, {"expand": 3}),
    "transformer": ({"preset": "transformer"}, {"mlp_dim": 80}),
}
IN_THE_SAMPLE = ("tokenformer",)  # a step of Mamba takes seconds here
CASES = [
    pytest.param(*fields, id=name, marks=() if name in IN_THE_SAMPLE else pytest.mark.kernels)
    for name, fields in MODELS.items()
]


@pytest.mark.parametrize(("model", "grow"), CASES)
def test_a_recipe_learns_and_grows_as_with_the_reference(
    model: dict[str, Any], grow: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_dict(tmp_path)
    tokens = {} if model.get("preset") else {"preset": "tokenformer", "attention_tokens": 8, "mlp_tokens": 8}
    recipe["model"] = {"embed_dim": 16, "num_layers": 1, "num_heads": 2} | tokens | model
    if model.get("preset") == "mamba" and "pattern" not in model:
        del recipe["model"]["num_heads"]
    recipe["monitor"] |= {"validation_tokens": 32, "probe_tokens": 16, "ngram_order": 0, "sample_tokens": 0}
    short = {"duration": "2 steps", "context_length": 8, "global_batch_tokens": 32, "micro_batch_size": 4}
    recipe["stages"] = [{"name": "first", **short}, {"name": "grown", "grow": grow, **short}]
    path = write_recipe(tmp_path, recipe)
    losses = {}
    for backend in ("triton", "reference"):
        code, _, err = cli("train", path, f"trainer.backend={backend}", f"run.name={backend}")
        assert code == 0, err
        run = tmp_path / "runs" / backend
        kinds = ("step", "validation")
        losses[backend] = [record["loss"] for record in records(run) if record["kind"] in kinds]
    assert len(losses["triton"]) >= 4
    assert losses["triton"] == pytest.approx(losses["reference"], rel=SAME)
