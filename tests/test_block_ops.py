"""The hand-differentiated ops on an AltUp stream against autograd of the plain formulas.

Legend: K blocks, B batch, T tokens, D embed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from growkit.ops.blocks import add_to_block, pick_block, read_blocks, write_blocks

K, B, T, D = 3, 2, 5, 7
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (a, N, b, R) → R′
ROUNDING = 1e-12  # float64: sums of a few dozen terms


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(z: Tensor) -> Tensor:
    """Something that a layer may make of it; it holds z."""
    return z + torch.tanh(2 * z)


def mixed(N: Tensor, R: Tensor) -> Tensor:
    return torch.einsum("ij,jbtd->ibtd" if N.ndim == 2 else "btij,jbtd->ibtd", N, R)


def outer(b: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("i,btd->ibtd" if b.ndim == 1 else "bti,btd->ibtd", b, y)


def read(a: Tensor, R: Tensor) -> Tensor:
    return torch.einsum("j,jbtd->btd" if a.ndim == 1 else "btj,jbtd->btd", a, R)


def gemma(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    z, R = read_blocks(a, R)
    return write_blocks(N, b, R, layer(z))


def plain_gemma(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    return mixed(N, R) + outer(b, layer(read(a, R)))


def paper(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    z, R = pick_block(1, R)
    return write_blocks(N, b, R, layer(z))


def plain_paper(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    return mixed(N, R) + outer(b, layer(R[1]))


def round_robin(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    z, R = read_blocks(a, R)
    return add_to_block(1, R, layer(z) - z)


def plain_round_robin(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    z = read(a, R)
    return R.select_scatter(R[1] + layer(z) - z, 0, 1)


def routed(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    """As Gemma 3n: what is routed depends on a block, and on what the layer made."""
    active, R = pick_block(1, R)
    z, R = read_blocks(a + active[..., :1].mean(dim=(0, 1)[: 3 - a.ndim]), R)
    y = layer(z)
    return write_blocks(N, b * y.mean(), R, y)


def plain_routed(a: Tensor, N: Tensor, b: Tensor, R: Tensor) -> Tensor:
    y = layer(read(a + R[1][..., :1].mean(dim=(0, 1)[: 3 - a.ndim]), R))
    return mixed(N, R) + outer(b * y.mean(), y)


STEPS = [(gemma, plain_gemma), (paper, plain_paper), (round_robin, plain_round_robin), (routed, plain_routed)]


def coefficients(of_each: bool) -> list[Tensor]:
    shape = (B, T) if of_each else ()
    return [draw(*shape, K, seed=1), draw(*shape, K, K, seed=2), draw(*shape, K, seed=3)]


@pytest.mark.parametrize("of_each", [False, True], ids=["static", "routed"])
@pytest.mark.parametrize("steps", STEPS, ids=lambda pair: pair[0].__name__)
def test_values_and_gradients(steps: tuple[Step, Step], of_each: bool) -> None:
    """Over two layers, whose gradients go into one another; what is given stays as it was, the gradient included."""
    given, grad = [*coefficients(of_each), draw(K, B, T, D)], draw(K, B, T, D, seed=4)
    results = []
    for step in steps:
        leaves, upper = [tensor.clone().requires_grad_() for tensor in given], grad.clone()
        a, N, b, R = leaves
        first = step(a, N, b, R)
        y = step(a, N, b, first)
        used = torch.autograd.grad(y, leaves, upper, allow_unused=True)
        results.append([y.detach(), *used])
        assert torch.equal(upper, grad) and all(map(torch.equal, leaves, given))
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("of_each", [False, True], ids=["static", "routed"])
@pytest.mark.parametrize("steps", STEPS, ids=lambda pair: pair[0].__name__)
def test_gradcheck(steps: tuple[Step, Step], of_each: bool) -> None:
    given = [tensor.requires_grad_() for tensor in (*coefficients(of_each), draw(K, B, T, D))]
    assert torch.autograd.gradcheck(steps[0], given)


@pytest.mark.parametrize("of_each", [False, True], ids=["static", "routed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_written_as_it_is(dtype: torch.dtype, of_each: bool) -> None:
    """Where b is 1 and the row of N is zero a block is what the layer made, to the bit; where a is a unit vector the
    layer reads a block, to the bit."""
    a, N, b = (tensor.to(dtype) for tensor in coefficients(of_each))
    a[...], N[..., 1, :], b[..., 1] = torch.tensor([0.0, 0.0, 1.0]), 0, 1
    R, y = draw(K, B, T, D, dtype=dtype), draw(B, T, D, seed=5, dtype=dtype)
    z, R_next = read_blocks(a, R)
    assert torch.equal(z, R[2]) and torch.equal(R_next, R)
    assert torch.equal(write_blocks(N, b, R, y)[1], y)


@pytest.mark.parametrize("of_each", [False, True], ids=["static", "routed"])
@pytest.mark.parametrize("step", [gemma, paper, round_robin])
def test_blocks_are_saved_once(step: Step, of_each: bool) -> None:
    """Of two layers: what goes into each of them, what the layer made, and what the layer keeps for itself."""
    a, N, b = (tensor.requires_grad_() for tensor in coefficients(of_each))
    R = draw(K, B, T, D).requires_grad_()
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage takes the place of another

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(a, N, b, step(a, N, b, R))
    one = R[0].nbytes
    blocks = sum(size == K * one for size in saved.values())
    assert blocks == 2
    # y where it is written with a coefficient, and tanh; a round robin only adds
    assert sum(size == one for size in saved.values()) == (2 if step is round_robin else 4)


@pytest.mark.parametrize("of_each", [False, True], ids=["static", "routed"])
def test_autocast_leaves_it_alone(of_each: bool) -> None:
    """In both passes, and with what the layer made in bfloat16: all sums are in float32."""
    given = [tensor.float() for tensor in (*coefficients(of_each), draw(K, B, T, D))]
    grad = draw(K, B, T, D, seed=4).float()
    results = []
    for on in (False, True):
        a, N, b, R = leaves = [tensor.clone().requires_grad_() for tensor in given]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            z, R_next = read_blocks(a, R)
            y = write_blocks(N, b, R_next, z.bfloat16())
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    assert all(tensor.dtype == torch.float32 for tensor in results[1])
    assert all(map(torch.equal, *results))


def test_compiled_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor is given is the same function."""
    for of_each in (False, True):
        given = [*coefficients(of_each), draw(K, B, T, D)]
        for step, plain in STEPS:
            leaves = [tensor.clone().requires_grad_() for tensor in given]
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                mine = step(*leaves)
            theirs = plain(*leaves)
            torch.testing.assert_close(mine, theirs, rtol=ROUNDING, atol=ROUNDING)
            grads = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (mine, theirs)]
            for one, other in zip(*grads, strict=True):
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING * 100)
