"""GradMax: new hidden units read what makes the first gradient of their outgoing weights largest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from growkit.errors import ConfigError
from growkit.growth import engine
from growkit.growth.engine import grow
from growkit.growth.loop import grow as grow_model
from growkit.growth.observe import Seen, observe
from growkit.growth.operators.gradmax import gated_readers, readers
from growkit.growth.path import grown_config
from growkit.growth.state import TrainState
from growkit.models.config import ModelConfig
from growkit.models.decoder import build
from tests.support import cli, corpus_file, model_config, probe, recipe_dict, trained_like, write_recipe

SETTLED = 0.99  # of the largest singular value, that the power iteration reaches


def seen(inputs: int = 7, outputs: int = 5) -> Seen:
    generator = torch.Generator().manual_seed(0)
    return Seen(torch.randn(40, inputs, generator=generator), 1e-4 * torch.randn(40, outputs, generator=generator))


def rows(count: int, width: int = 7) -> Tensor:
    return 0.02 * torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def test_units_read_the_first_singular_vectors_and_their_negatives_then_mixtures() -> None:
    looked, drawn = seen(), rows(13)
    assert looked.gradients is not None
    matrix = looked.gradients.T @ looked.inputs
    chosen = readers(looked, drawn)
    strengths = (matrix @ (chosen / chosen.norm(dim=1, keepdim=True)).T).norm(dim=0)
    best = torch.linalg.svdvals(matrix)
    assert torch.allclose(strengths[:10], torch.cat((best, best)), rtol=1e-4)
    assert torch.allclose(chosen[:5], -chosen[5:10] * (drawn[:5].norm(dim=1) / drawn[5:10].norm(dim=1))[:, None])
    plain = (matrix @ (drawn / drawn.norm(dim=1, keepdim=True)).T).norm(dim=0)
    assert strengths[10:].mean() > plain[10:].mean()
    assert torch.allclose(chosen.norm(dim=1), drawn.norm(dim=1))
    assert torch.linalg.matrix_rank(chosen[10:] / chosen[10:].norm()) == 3, "mixtures of their own"


def test_a_gated_unit_reads_the_first_singular_vector_behind_its_gate() -> None:
    looked, gates, drawn = seen(), 30 * rows(6), rows(6)
    chosen = gated_readers(looked, gates, drawn)
    assert looked.gradients is not None
    for gate, row in zip(gates, chosen, strict=True):
        matrix = (looked.gradients * torch.nn.functional.silu(looked.inputs @ gate)[:, None]).T @ looked.inputs
        assert (matrix @ (row / row.norm())).norm() >= SETTLED * torch.linalg.svdvals(matrix)[0]
    assert torch.allclose(chosen.norm(dim=1), drawn.norm(dim=1))


def first_gradient(state: TrainState, target: ModelConfig, method: str) -> float:
    """Norm of the loss's gradient in the new outgoing weights, right after the step."""
    tokens = probe(state.config, rows=8)
    grown, _ = grow(state, target, {"mlp": method}, torch.Generator().manual_seed(3), tokens)
    model = build(target, grown.params)
    model(tokens[:, :-1], tokens[:, 1:]).total.backward()
    old = state.params["layers.0.mlp.down.weight"].shape[1]
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("mlp.down.weight")]
    return float(torch.cat([g[:, old:] for g in gradients if g is not None]).norm())


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_the_first_gradient_is_larger_than_of_random_units(mlp: str) -> None:
    config = model_config("transformer", mlp=mlp, mlp_dim=20)
    state = trained_like(config, dtype=torch.float32)
    target = grown_config(config, {"mlp_dim": 28}, {"mlp": "gradmax"})
    assert first_gradient(state, target, "gradmax") > 1.5 * first_gradient(state, target, "zero_down")


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_under_a_mask_at_0_the_draws_stay(mlp: str) -> None:
    """No gradient comes back to a layer that does not write yet."""
    config = model_config("transformer", mlp=mlp)
    methods = {"depth": "masked", "mlp": "gradmax"}
    target = grown_config(config, {"num_layers": 4, "mlp_dim": 192}, methods)
    grown, report = grow(trained_like(config), target, methods, torch.Generator().manual_seed(0), probe(config))
    assert report.certificate is not None and report.certificate.exact
    for name, tensor in grown.params.items():
        assert tensor.isfinite().all(), name


def test_it_wants_text_and_says_so(tmp_path: Path) -> None:
    config = model_config("transformer")
    model = build(config, trained_like(config, dtype=torch.float32).params)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"methods\.mlp.*needs-a-probe"):
        grow_model(model, optimizer, methods={"mlp": "gradmax"}, mlp_dim=96)
    grow_model(model, optimizer, methods={"mlp": "gradmax"}, mlp_dim=96, probe=probe(config))

    small = {"preset": "transformer", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
    recipe = recipe_dict(tmp_path) | {"model": small}
    recipe["stages"] = recipe["stages"][:1]
    assert cli("train", write_recipe(tmp_path, recipe))[0] == 0
    words = "grow", tmp_path / "runs/run", "mlp_dim=32", "methods.mlp=gradmax", "-o", tmp_path / "grown"
    code, _, err = cli(*words)
    assert code == 2 and "needs-a-probe" in err and "--data" in err and not (tmp_path / "grown").exists()
    code, out, err = cli(*words, "--data", corpus_file(tmp_path))
    assert code == 0 and "gradmax" in out, err


def test_a_run_chooses_by_its_own_text(tmp_path: Path) -> None:
    small = {"preset": "transformer", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
    recipe = recipe_dict(tmp_path) | {"model": small}
    recipe["stages"] = [recipe["stages"][0], {"name": "wider", "duration": "2 steps", "grow": {"mlp_dim": 32}}]
    recipe["stages"][1]["methods"] = {"mlp": "gradmax"}
    code, out, err = cli("train", write_recipe(tmp_path, recipe))
    assert code == 0, out + err


def test_a_mixture_is_looked_at_as_other_parts_are() -> None:
    """What flows into it and back from it, though it gives a balance loss beside; checked on a dense block's copies."""
    dense = model_config("transformer")
    upcycled = grown_config(dense, {"num_experts": 4}, {})
    state = trained_like(dense)
    copied, _ = grow(state, upcycled, {}, torch.Generator())
    before, after = observe(state, probe(dense)), observe(copied, probe(dense))
    assert before.keys() == after.keys()
    for prefix, looked in after.items():
        torch.testing.assert_close(looked.inputs, before[prefix].inputs)
        torch.testing.assert_close(looked.gradients, before[prefix].gradients)


def test_a_growth_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the probe for all tensors, their moments, and what is new."""
    looks = []
    monkeypatch.setattr(engine, "observe", lambda *given: looks.append(1) or observe(*given))
    config = model_config("transformer")
    target = grown_config(config, {"mlp_dim": 96}, {"mlp": "gradmax"})
    grow(trained_like(config), target, {"mlp": "gradmax"}, torch.Generator(), probe(config))
    assert len(looks) == 1
