"""The module of one stage: what it measures of a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from growkit.cli import recipes
from growkit.models.spec import param_specs
from growkit.train.module import StageModule
from tests.support import probe, trained_like, write_recipe


def test_gradient_norms_are_taken_before_clipping_by_component(tmp_path: Path) -> None:
    """Beside PyTorch's own clipping of the same gradients: the norms before it, gradients bitwise the same after."""
    recipe, schedule = recipes.read(str(write_recipe(tmp_path, optim={"clip_norm": 0.1})), [])
    stage = schedule.stages[1]
    state = trained_like(stage.model, dtype=torch.float32)
    state = dataclasses.replace(state, born={name: 1 for name in state.params if ".1" in name})
    module = StageModule(state, stage, recipe, 0)
    module.configure_model()
    assert module.model is not None
    optimizer = module.configure_optimizers()
    tokens = probe(stage.model)
    module.model(tokens[:, :-1], tokens[:, 1:]).total.backward()
    before = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}
    specs = param_specs(stage.model)
    module.configure_gradient_clipping(optimizer)
    norms, share = module.gradient_norms()
    for part in {spec.component for spec in specs.values()}:
        mine = torch.cat([before[name].flatten() for name, spec in specs.items() if spec.component == part])
        assert norms[part] == pytest.approx(float(mine.norm()), rel=1e-5)
    new = torch.cat([before[name].flatten() for name in state.born])
    every = torch.cat([gradient.flatten() for gradient in before.values()])
    assert share == pytest.approx(float(new.norm() / every.norm()) ** 2, rel=1e-5)
    reference = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in before.values()]
    for parameter, gradient in zip(reference, before.values(), strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(reference, 0.1)
    for (name, parameter), clipped in zip(module.model.named_parameters(), reference, strict=True):
        assert parameter.grad is not None and clipped.grad is not None
        assert torch.equal(parameter.grad, clipped.grad), name
