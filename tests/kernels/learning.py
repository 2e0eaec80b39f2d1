"""What the checks in the interpreter share: which of them are no sample, and whether a tiny model learns with the
kernels as it does with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

from growkit.models.config import ModelConfig
from growkit.models.decoder import build
from tests.support import probe, trained_like


def rest(value: Any) -> ParameterSet:
    """A parameter that `make kernels` takes, and `make test` does not."""
    return pytest.param(value, marks=pytest.mark.kernels)


def assert_learns_as_the_reference(config: ModelConfig, tolerance: float) -> None:
    """Two steps from the same start: the losses are the same, up to ``tolerance`` (relative), and they move."""
    losses: dict[str, list[float]] = {}
    for backend in ("triton", "reference"):
        model = build(config, trained_like(config, dtype=torch.float32).params, backend=backend).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[backend] = []
        for step in range(2):
            tokens = probe(config, context=11, seed=step)
            loss = model(tokens[:, :-1], tokens[:, 1:]).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[backend].append(float(loss.detach()))
    assert losses["triton"] == pytest.approx(losses["reference"], rel=tolerance)
    assert losses["triton"][0] != losses["triton"][1]
