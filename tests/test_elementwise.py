"""The hand-differentiated elementwise ops against autograd of the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.ops.elementwise import rms_norm, rotate


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


@pytest.mark.parametrize("width", [1, 17, 96])
def test_rms_norm(width: int) -> None:
    """Float64: rounding only, 1e-12."""
    x, gain, grad = draw(3, 5, width), 1 + draw(width, seed=1), draw(3, 5, width, seed=2)
    results = []
    for norm in (rms_norm, lambda x, gain, eps: F.rms_norm(x, (width,), gain, eps)):
        a, g = x.clone().requires_grad_(), gain.clone().requires_grad_()
        y = norm(a, g, 1e-5)
        results.append([y.detach(), *torch.autograd.grad(y, (a, g), grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, gain, 1e-5), results[0][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "half"), [(8, 4), (8, 1), (7, 2), (6, 0)])
def test_rotate(width: int, half: int) -> None:
    angles = draw(1, 5, 1, half, seed=1)
    x, grad = draw(2, 5, 3, width), draw(2, 5, 3, width, seed=2)
    results = []
    for turn in (rotate, plain_rotate):
        a = x.clone().requires_grad_()
        y = turn(a, angles.cos(), angles.sin())
        results.append([y.detach(), *torch.autograd.grad(y, (a,), grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
