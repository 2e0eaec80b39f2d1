"""Pattention: the compiled path against the reference, output and every input's gradient; the reference against the
paper's formula in plain Python; what banks mean; and that nothing in it breaks a traced graph."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from growkit.errors import ConfigError
from growkit.models.config import THETAS
from growkit.ops.dispatch import resolve_backend
from growkit.ops.native import _flags, _openmp, _version, find_compiler
from growkit.ops.pattention import PATHS, Tokens, compiled, native, pattention, reference
from growkit.ops.pattention.rows import Layout, TorchRows

# 7 × 9 = 63 tokens, input width 17, output width 31: nothing divides a tile.
LEADING, WIDTH, OUT = (7, 9), 17, 31
BANKS = [(1000,), (1000, 13, 3), (40, 40)]
SCOPES = ("bank", "shared")
# Norm-wise relative error ‖a − b‖/‖b‖ of the two paths.
TOLERANCE = {
    torch.float64: 5e-15,  # unit roundoff 1.1e-16; the order of ten operations differs, and a BLAS may sum in any order
    torch.float32: 2e-6,  # the same with 6e-8
    # Unit roundoff 2e-3. The reference keeps float32 between its steps; the compiled path rounds after each of five
    # (scores, scale, product, activation, output), and as often again on the way back: 2e-3 · √10 at the least.
    torch.bfloat16: 1.5e-2,
}
AUTOCAST = 3e-2  # bfloat16's, doubled: float32 inputs, which the reference keeps, are rounded before every product too
FORMULA = 1e-14  # relative; float64 against Python's own floats: some ten roundings
CASES = list(itertools.product(THETAS, SCOPES))


def single(path: Any) -> Any:
    """(x, keys, values, taus, theta, scope) → the one projection's output."""
    return lambda x, *tokens: path(x, [Tokens(*tokens)])[0]


OPS = {name: single(path) for name, path in PATHS.items()}


def inputs(
    banks: tuple[int, ...], dtype: torch.dtype = torch.float64, leading: tuple[int, ...] = LEADING
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x (not contiguous), keys and values as leaves; scores of standard deviation 1, as training has them."""
    generator = torch.Generator().manual_seed(len(banks))

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    x = leaf(WIDTH, *leading).movedim(0, -1).requires_grad_()
    keys = [leaf(n, WIDTH, scale=WIDTH**-0.5).requires_grad_() for n in banks]
    return x, keys, [leaf(n, OUT).requires_grad_() for n in banks]


def taus(banks: tuple[int, ...], scope: str) -> list[float]:
    """All different, none 1."""
    return [3.5] if scope == "shared" else [2.5 + i for i in range(len(banks))]


def output_and_gradients(path: Any, *given: Any, autocast: bool = False) -> dict[str, Tensor]:
    """``given``: x, keys, values and the rest of the op's arguments."""
    x, keys, values = given[:3]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = path(*given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    names = ["x", *(f"keys.{i}" for i in range(len(keys))), *(f"values.{i}" for i in range(len(values)))]
    gradients = torch.autograd.grad(out, [x, *keys, *values], upstream)
    return {"output": out.detach(), **dict(zip(names, gradients, strict=True))}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@pytest.fixture(params=["kernel", "torch calls"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the compiled path goes through rows of scores in float32 and bfloat16."""
    assert native.kernel() is not None, "these tests need a C++ compiler"
    if request.param != "kernel":
        monkeypatch.setattr(native, "kernel", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("banks", BANKS, ids=str)
@pytest.mark.parametrize(("theta", "scope"), CASES)
def test_compiled_path_is_the_reference(
    theta: str, scope: str, banks: tuple[int, ...], dtype: torch.dtype, way: str
) -> None:
    given = (*inputs(banks, dtype), taus(banks, scope), theta, scope)
    ours, theirs = (output_and_gradients(OPS[name], *given) for name in ("compiled", "reference"))
    assert len(ours) == 2 + 2 * len(banks)
    for name, tensor in ours.items():
        assert tensor.dtype == dtype and tensor.shape == theirs[name].shape, name
        assert float(theirs[name].double().norm()) > 0, f"{name}: nothing to compare"
        assert relative(tensor, theirs[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize(("theta", "scope"), CASES)
def test_under_autocast_the_reference_stays_float32(theta: str, scope: str) -> None:
    banks = BANKS[1]
    given = (*inputs(banks, torch.float32), taus(banks, scope), theta, scope)
    wanted = output_and_gradients(OPS["reference"], *given)
    same = output_and_gradients(OPS["reference"], *given, autocast=True)
    narrow = output_and_gradients(OPS["compiled"], *given, autocast=True)
    assert narrow["output"].dtype == torch.bfloat16
    for name, tensor in wanted.items():
        assert torch.equal(same[name], tensor), name
        assert relative(narrow[name], tensor) <= AUTOCAST, name


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("path", PATHS)
def test_one_bank_is_the_published_formula(path: str, theta: str) -> None:
    x, (k,), (v,) = inputs((11,), leading=(5,))
    out = OPS[path](x, [k], [v], [2.5], theta, "bank")
    wanted = torch.tensor(published(x.tolist(), k.tolist(), v.tolist(), 2.5, theta), dtype=torch.float64)
    assert relative(out, wanted) <= FORMULA
    shared = OPS[path](x, [k], [v], [2.5], theta, "shared")
    assert torch.equal(out, shared), "with one bank the scopes are one"


def published(
    x: list[list[float]], keys: list[list[float]], values: list[list[float]], tau: float, theta: str
) -> list[list[float]]:
    """TokenFormer, equations 4 to 6, number by number."""
    result = []
    for row in x:
        scores = [sum(a * b for a, b in zip(row, key)) for key in keys]
        if theta == "l2_norm_gelu":
            root = math.sqrt(sum(s * s for s in scores))
            weights = [gelu(s * tau / root) for s in scores]
        elif theta == "gelu_l2_norm":
            raised = [gelu(s) for s in scores]
            root = math.sqrt(sum(g * g for g in raised))
            weights = [g * tau / root for g in raised]
        else:
            powers = [math.exp(s) for s in scores]
            weights = [tau * p / sum(powers) for p in powers]
        result.append([sum(w * value[j] for w, value in zip(weights, values)) for j in range(len(values[0]))])
    return result


def gelu(x: float) -> float:
    return x / 2 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("theta", "scope"), CASES)
def test_a_row_of_zeros_is_finite(path: str, theta: str, scope: str) -> None:
    """Scores that are all zero have no direction: the output is finite, and so is every gradient."""
    banks = (12, 5)
    x, keys, values = inputs(banks, torch.float32)
    with torch.no_grad():
        x[3, 4] = 0
    found = output_and_gradients(OPS[path], x, keys, values, taus(banks, scope), theta, scope)
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
    assert theta == "softmax" or not found["output"][3, 4].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("theta", THETAS)
def test_projections_of_one_x_go_together(path: str, theta: str) -> None:
    """As if each had been called alone: outputs of several widths, several banks, both scopes, and frozen banks."""
    x, keys, values = inputs((12, 5, 12, 7))
    narrow = values[3][:, :8].detach().requires_grad_()
    keys[1].requires_grad_(False)
    values[2].requires_grad_(False)
    projections = [
        Tokens(keys[:2], values[:2], [2.5, 1.5], theta, "bank"),
        Tokens(keys[2:3], values[2:3], [3.5], theta, "shared"),
        Tokens(keys[3:], [narrow], [2.0], theta, "bank"),
    ]
    leaves = [t for t in (x, *keys, *values[:3], narrow) if t.requires_grad]
    assert len(leaves) == 7
    found = []
    for outputs in (PATHS[path](x, projections), [PATHS["reference"](x, [tokens])[0] for tokens in projections]):
        assert [out.shape for out in outputs] == [(*LEADING, OUT), (*LEADING, OUT), (*LEADING, 8)]
        loss = sum((out.sin().sum() * (i + 1) for i, out in enumerate(outputs)), start=torch.zeros(()))
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("banks", [(4, 4), (5, 3)], ids=str)
def test_gradcheck(banks: tuple[int, int]) -> None:
    """Finite differences of the backward pass written by hand: norms of one size, and of several."""
    x, keys, values = inputs(banks, leading=(3,))

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        tokens = Tokens(list(tensors[:2]), list(tensors[2:]), [2.5, 2.5], "l2_norm_gelu", "bank")
        return torch.cat(compiled.pattention(x, [tokens, tokens]))

    assert torch.autograd.gradcheck(run, (x, *keys, *values))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("theta", THETAS)
def test_rows_below_the_floor_of_the_norm(theta: str, dtype: torch.dtype, way: str) -> None:
    """There the scale is a constant, and the gradient that of a constant, for any τ."""
    x, keys, values = inputs((12,), dtype)
    with torch.no_grad():
        x[::2] *= 1e-8
    for tau in (1.0, 1.37, 3.22, 8.03, 11.0):
        given = (x, keys, values, [tau], theta, "bank")
        ours, theirs = (output_and_gradients(OPS[name], *given) for name in ("compiled", "reference"))
        for name, tensor in ours.items():
            assert relative(tensor, theirs[name]) <= TOLERANCE[dtype], (name, tau)


@pytest.mark.parametrize("theta", THETAS)
def test_no_tokens_at_all(theta: str, way: str) -> None:
    x, keys, values = inputs((12, 12), torch.float32, leading=(2, 0))
    found = output_and_gradients(OPS["compiled"], x, keys, values, [2.0, 2.0], theta, "bank")
    assert found["output"].shape == (2, 0, OUT) and found["x"].shape == x.shape
    assert all(not found[f"{name}.{at}"].any() for name in ("keys", "values") for at in range(2))


# Of the kernel alone, beside float64: its polynomials and a handful of roundings in float32, then one of bfloat16's.
KERNEL = {torch.float32: 5e-7, torch.bfloat16: 2**-8 + 3e-4}


def kernel() -> native.Kernel:
    found = native.kernel()
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", KERNEL, ids=str)
def test_the_kernel_knows_gelu_and_its_slope_far_into_the_tails(dtype: torch.dtype) -> None:
    """Relative to each single value of gelu, not only to the largest."""
    s = torch.linspace(-9, 9, 20001).to(dtype)[None]
    g, slope = torch.empty_like(s), torch.empty_like(s)
    kernel().weights(layout(s.shape[1]), s, g, slope)
    wide = s.double()
    below = torch.special.erfc(-wide / math.sqrt(2)) / 2  # ndtr has no tail
    off = (g - wide * below).abs() / (wide * below).abs().clamp_min(1e-30)
    assert (off <= KERNEL[dtype] * (1 + wide.square() / 4)).all()  # the exponent, s²/2, is rounded too
    bell = torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    assert float((slope - (below + wide * bell)).abs().max()) <= KERNEL[dtype]


def test_what_the_kernel_is_not_for_takes_torch_calls() -> None:
    assert isinstance(compiled._rows_of(torch.ones(2, 2)), native.Kernel)
    for other in (torch.ones(2, 2).double(), torch.ones(2, 2, device="meta")):
        assert isinstance(compiled._rows_of(other), TorchRows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernel_runs_on_the_threads_of_torch() -> None:
    """A second OpenMP would have threads of its own, which wait for torch's: those spin between calls."""
    kernel()
    mapped = {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp.so" in line}
    compiler = find_compiler()
    assert compiler is not None
    version = _version(compiler)
    if "Free Software Foundation" not in version:
        pytest.skip("not GCC")
    assert mapped == {str(path) for path in _openmp(version)} and "-fopenmp" in _flags(version)


def layout(*widths: int) -> Layout:
    found, start = Layout(), 0
    for at, width in enumerate(widths):
        found.norms.append((slice(start, start + width), 2.5 + at))
        start += width
    return found


@pytest.mark.parametrize("dtype", KERNEL, ids=str)
@pytest.mark.parametrize("widths", [(2,), (5, 3), (16,), (33, 1, 200), (64, 64, 64)], ids=str)
def test_the_kernel_goes_through_rows_of_any_width(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """NaN stays in its norm, what lies beyond the rows is left alone, and threads change no bit."""
    rows, width = 301, sum(widths)
    generator = torch.Generator().manual_seed(width)
    scores, upstream = (3 * torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    scores[4], scores[5, 0] = 0, math.nan
    found: dict[int, tuple[Tensor, ...]] = {}
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            room = torch.full((4, rows, width + 7), 7.0, dtype=dtype)
            s, g, slope, d = (each[:, :width] for each in room)
            s.copy_(scores)
            d.copy_(upstream)
            scales = kernel().scales(s, len(widths))
            kernel().forward(layout(*widths), s, scales, g)
            first = g.clone()
            kernel().weights(layout(*widths), s, g, slope)
            assert torch.equal(g.nan_to_num(9), first.nan_to_num(9))
            kernel().backward(layout(*widths), s, scales, slope, d)
            assert (room[..., width:] == 7).all()
            found[count] = tuple(each.clone() for each in (s, g, d))
    finally:
        torch.set_num_threads(threads)
    wide, d = scores.double(), upstream.double()
    g, scales = torch.empty_like(wide), wide.new_empty(rows, len(widths))
    TorchRows().forward(layout(*widths), wide, scales, g)
    TorchRows().backward(layout(*widths), wide, scales, None, d)
    for one, three, right in zip(found[1], found[3], (wide, g, d), strict=True):
        assert torch.equal(one.nan_to_num(9), three.nan_to_num(9))
        assert torch.equal(one.isnan(), right.isnan())
        regular = [row for row in range(rows) if row not in (4, 5)]  # at the floor a gradient is 1e6 times as large
        assert relative(one[regular], right[regular]) <= 2 * KERNEL[dtype]
        assert relative(one[4], right[4]) <= 2 * KERNEL[dtype] or not right[4].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("theta", "scope"), CASES)
def test_banks_are_sets_that_add_up(path: str, theta: str, scope: str) -> None:
    """Permuting tokens inside a bank changes nothing. Per bank: the sum over single banks. Shared: the one bank that
    holds all tokens. A new bank with zero values changes nothing per bank, whatever its keys, and does when shared."""
    op, banks = OPS[path], (12, 5, 1)
    x, keys, values = inputs(banks)
    scales = taus(banks, scope)
    out = op(x, keys, values, scales, theta, scope)
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in banks]
    permuted = op(x, [k[o] for k, o in zip(keys, orders)], [v[o] for v, o in zip(values, orders)], scales, theta, scope)
    assert relative(permuted, out) <= TOLERANCE[torch.float64]
    if scope == "bank":
        parts = [op(x, [k], [v], [tau], theta, scope) for k, v, tau in zip(keys, values, scales)]
        whole = torch.stack(parts).sum(0)
    else:
        whole = op(x, [torch.cat(keys)], [torch.cat(values)], scales, theta, "bank")
    assert relative(whole, out) <= TOLERANCE[torch.float64]
    new_key, new_value = torch.full((4, WIDTH), 0.3, dtype=torch.float64), torch.zeros(4, OUT, dtype=torch.float64)
    new_scales = scales if scope == "shared" else [*scales, 9.0]
    grown = op(x, [*keys, new_key], [*values, new_value], new_scales, theta, scope)
    unchanged = relative(grown, out) <= TOLERANCE[torch.float64]  # one longer product sums in another order
    assert unchanged == (scope == "bank")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_tau_too_few_is_refused(path: str, scope: str) -> None:
    x, keys, values = inputs((4, 3))
    wrong = [1.0] if scope == "bank" else [1.0, 2.0]
    with pytest.raises(ValueError, match=r"zip|unpack"):
        OPS[path](x, keys, values, wrong, "softmax", scope)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("theta", "scope"), CASES)
def test_traced_whole(path: str, theta: str, scope: str) -> None:
    """``fullgraph`` raises at the first graph break; what was traced computes the same."""
    torch.compiler.reset()
    banks = (12, 5)
    given = (*inputs(banks), taus(banks, scope), theta, scope)
    traced = torch.compile(OPS[path], fullgraph=True, backend="eager")
    plain, compiled_ = output_and_gradients(OPS[path], *given), output_and_gradients(traced, *given)
    for name, tensor in plain.items():  # the eager path may have a backward pass of its own
        assert relative(compiled_[name], tensor) <= TOLERANCE[torch.float64], name


def test_backends_are_names() -> None:
    assert pattention("auto") is pattention("compiled") is compiled.pattention
    assert pattention("reference") is reference.pattention
    assert {resolve_backend("pattention", name) for name in ("auto", "compiled", "reference")} == set(PATHS)
    with pytest.raises(ConfigError, match=r"trainer\.backend.*triton_v2.*allowed: auto, triton, compiled, reference"):
        pattention("triton_v2")
