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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_a_model_in_half_precision(dtype: torch.dtype) -> None:
    """Gain and input are narrow, the sums are not; the results are narrow again."""
    x, gain, grad = (draw(3, 5, 17, seed=seed).to(dtype) for seed in range(3))
    gain = gain[0, 0]
    a, g = x.clone().requires_grad_(), gain.clone().requires_grad_()
    y = rms_norm(a, g, 1e-5)
    mine = [y, *torch.autograd.grad(y, (a, g), grad)]
    wide_a, wide_g = x.double().requires_grad_(), gain.double().requires_grad_()
    wide = F.rms_norm(wide_a, (17,), wide_g, 1e-5)
    for one, other in zip(mine, [wide, *torch.autograd.grad(wide, (wide_a, wide_g), grad.double())], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype))
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, gain, 1e-5), mine[0])


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
