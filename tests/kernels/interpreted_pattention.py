"""Pattention's Triton kernels against the reference, in the interpreter: output and every gradient, at odd sizes, over
several chunks of rows, with both ways to the norm; what is not written would be NaN."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from growkit.errors import ConfigError
from growkit.ops import tiling
from growkit.ops.pattention import PATHS, Tokens, compiled, triton
from tests.kernels.learning import assert_learns_as_the_reference, rest
from tests.support import model_config
from tests.test_pattention import OUT, SCOPES, WIDTH, inputs, output_and_gradients, relative, single, taus

# Norm-wise relative error ‖a − b‖/‖b‖, the reference being float32 from the same inputs.
TOLERANCE = {
    torch.float32: 2e-6,  # unit roundoff 6e-8 and Φ to 7e-8; some ten roundings, and sums of a thousand terms
    # Unit roundoff 2e-3 and 2.4e-4, after each of five steps, as the compiled path has them; the interpreter cuts off
    # where a GPU rounds, which doubles that.
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}
AUTOCAST = 3e-2  # bfloat16's, doubled: float32 inputs, which the reference keeps, are rounded before every product too
BOUND = 2**-16  # of ‖·‖² by the Gram matrix, times Σ|x_i M_ij x_j| / ‖A‖²: what two bfloat16 leave of a number, 2^-17,
# and as much again for sums in float32
SAME_LOSS = 1e-5  # relative, after two steps: each gradient is off by some 1e-6, and AdamW divides by its size
THETAS = ("l2_norm_gelu", "gelu_l2_norm")
CASES = list(itertools.product(THETAS, SCOPES))
OURS, REFERENCE = single(triton.pattention), single(PATHS["reference"])


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """63 tokens go in chunks of 32."""
    monkeypatch.setattr(tiling, "CHUNK_MULTIPLE", 32)
    monkeypatch.setattr(tiling, "WORK_ELEMENTS", 0)


def check(given: Any, dtype: torch.dtype, tolerance: float | None = None) -> None:
    ours, theirs = output_and_gradients(OURS, *given), output_and_gradients(REFERENCE, *given)
    assert len(ours) == 2 + 2 * len(given[1])
    for name, tensor in ours.items():
        assert tensor.dtype == dtype and tensor.shape == theirs[name].shape, name
        assert float(theirs[name].double().norm()) > 0, f"{name}: nothing to compare"
        assert relative(tensor, theirs[name]) <= (tolerance or TOLERANCE[dtype]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, rest(torch.float16)], ids=str)
@pytest.mark.parametrize("banks", [(200, 13, 3), rest((1000,))], ids=str)
@pytest.mark.parametrize(("theta", "scope"), CASES)
def test_kernels_are_the_reference(theta: str, scope: str, banks: tuple[int, ...], dtype: torch.dtype) -> None:
    check((*inputs(banks, dtype), taus(banks, scope), theta, scope), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("width", [130, rest(3), rest(64)])
def test_widths_and_whole_blocks(theta: str, width: int, dtype: torch.dtype) -> None:
    """Widths that blocks divide and that they do not, and norms that begin and end at multiples of 16."""
    generator = torch.Generator().manual_seed(width)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    keys, values = [leaf(n, width) for n in (128, 144)], [leaf(n, 257 - width) for n in (128, 144)]
    check((leaf(70, width), keys, values, [11.0, 12.0], theta, "bank"), dtype)


@pytest.mark.parametrize("theta", THETAS)
def test_projections_of_one_x_go_together(theta: str) -> None:
    """Outputs of several widths, several banks, both scopes, a τ that moves, frozen banks, and softmax and the other
    Θ beside them."""
    x, keys, values = inputs((12, 5, 12, 7, 6, 9), torch.float32)
    narrow = values[3][:, :8].detach().requires_grad_()
    keys[1].requires_grad_(False)
    values[2].requires_grad_(False)
    moving = torch.tensor(1.5, dtype=torch.float64)
    other = THETAS[1 - THETAS.index(theta)]
    projections = [
        Tokens(keys[:2], values[:2], [2.5, moving], theta, "bank"),
        Tokens(keys[4:5], values[4:5], [2.0], "softmax", "bank"),
        Tokens(keys[2:3], values[2:3], [3.5], theta, "shared"),
        Tokens(keys[5:], values[5:], [1.5], other, "bank"),
        Tokens(keys[3:4], [narrow], [2.0], theta, "bank"),
    ]
    leaves = [t for t in (x, *keys, *values[:3], *values[4:], narrow) if t.requires_grad]
    assert len(leaves) == 11
    found = []
    for path in (triton.pattention, PATHS["reference"]):
        outputs = path(x, projections)
        assert [out.shape[-1] for out in outputs] == [OUT, OUT, OUT, OUT, 8]
        loss = sum((out.sin().sum() * (i + 1) for i, out in enumerate(outputs)), start=torch.zeros(()))
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("frozen", ["x", "keys", "values", "keys and values", "x and keys"])
@pytest.mark.parametrize("theta", THETAS)
def test_what_is_frozen_has_no_gradient(theta: str, frozen: str) -> None:
    x, keys, values = inputs((12, 5, 40), torch.float32)
    x = x.detach().requires_grad_("x" not in frozen)
    for name, tensors in (("keys", keys), ("values", values)):
        for tensor in tensors[::2]:
            tensor.requires_grad_(name not in frozen)
    leaves = [t for t in (x, *keys, *values) if t.requires_grad]
    found = []
    for path in (OURS, REFERENCE):
        out = path(x, keys, values, [2.5, 3.0, 3.5], theta, "bank")
        found.append(torch.autograd.grad(out.sin().sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) <= TOLERANCE[torch.float32]


def gram_inputs(dtype: torch.dtype = torch.bfloat16, common: float = 0.0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """70 tokens of width 16, banks of 130 and 64; ``common``: how far all keys go in one direction that x has not."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    direction = draw(16)
    direction /= direction.norm()
    x = draw(70, 16)
    x = x - (x @ direction)[:, None] * direction
    keys = [(draw(n, 16) / 4 + common * direction).to(dtype).requires_grad_() for n in (130, 64)]
    return x.to(dtype).requires_grad_(), keys, [draw(n, OUT).to(dtype).requires_grad_() for n in (130, 64)]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which way each call has taken: whether norms came from the Gram matrix."""
    taken, found = [], triton._norms_ahead

    def recorded(*given: Any) -> bool:
        taken.append(found(*given))
        return taken[-1]

    monkeypatch.setattr(triton, "_norms_ahead", recorded)
    return taken


@pytest.mark.parametrize("ratio", [1, 10**6])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, rest(torch.float16)], ids=str)
def test_both_ways_to_the_norm(
    dtype: torch.dtype, scope: str, ratio: int, ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "GRAM_RATIO", ratio)
    check((*gram_inputs(dtype), taus((130, 64), scope), "l2_norm_gelu", scope), dtype)
    assert ways == [ratio == 1]


def test_which_way_is_taken(ways: list[bool]) -> None:
    """The Gram matrix where there are four times as many tokens and parameter tokens as dimensions, in sixteen bits,
    where the norm is of the scores."""
    x, keys, values = gram_inputs()
    assert tiling.GRAM_RATIO == 4
    for rows, n, taken in ((64, 64, True), (63, 64, False), (64, 63, False)):
        OURS(x[:rows], [keys[0][:n]], [values[0][:n]], [2.0], "l2_norm_gelu", "bank")
        assert ways.pop() == taken
    OURS(*gram_inputs(torch.float32), [2.0, 2.0], "l2_norm_gelu", "bank")
    assert ways == [False]
    OURS(*gram_inputs(), [2.0, 2.0], "gelu_l2_norm", "bank")
    assert ways == [False], "not asked"


@pytest.mark.parametrize("common", [0.0, 3.0, 30.0])
def test_error_of_the_gram_matrix_is_bounded(common: float) -> None:
    """Against float64 from the same bfloat16 inputs; at 30 the sum cancels to a thousandth of its terms."""
    x, (keys, _), _ = gram_inputs(common=common)
    found = torch.empty(len(x), 1)
    triton._gram_squares(x.detach(), keys.detach(), [len(keys)], [1], found)
    wide, gram = x.detach().double(), keys.detach().double().T @ keys.detach().double()
    wanted = (wide @ keys.detach().double().T).square().sum(1)
    condition = ((wide.abs() @ gram.abs()) * wide.abs()).sum(1) / wanted
    assert common < 30 or float(condition.median()) > 500
    error = (found[:, 0].double() - wanted).abs() / wanted
    assert bool((error <= BOUND * condition).all()), float((error / condition).max())


@pytest.mark.parametrize("ratio", [1, 10**6])
@pytest.mark.parametrize("theta", THETAS)
def test_a_nan_stays_in_its_row_and_passes_through(theta: str, ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "GRAM_RATIO", ratio)
    x, keys, values = gram_inputs()
    with torch.no_grad():
        x[5, 3] = torch.nan
    found = output_and_gradients(OURS, x, keys, values, [2.0, 3.0], theta, "bank")
    for name in ("output", "x"):
        rows = found[name].isnan()
        assert rows[5].all() and not rows[:5].any() and not rows[6:].any(), name
    for name in ("keys.0", "keys.1", "values.0", "values.1"):
        assert found[name].isnan().all(), name
    with torch.no_grad():
        x[5, 3] = 0
        keys[1][7, 2] = torch.nan
    assert OURS(x, keys, values, [2.0, 3.0], theta, "bank").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theta", THETAS)
def test_rows_at_the_floor_of_the_norm(theta: str, dtype: torch.dtype) -> None:
    """There the scale is a constant, and the gradient that of a constant; scores that are all zero give zero."""
    x, keys, values = inputs((12,), dtype)
    with torch.no_grad():
        x[::2] *= 1e-8
        x[3, 4] = 0
    check((x, keys, values, [3.22], theta, "bank"), dtype)
    assert not OURS(x, keys, values, [3.22], theta, "bank")[3, 4].any()


def test_twice_is_bitwise_the_same() -> None:
    given = (*inputs((200, 13), torch.bfloat16), [2.0, 3.0], "l2_norm_gelu", "bank")
    first, second = (output_and_gradients(OURS, *given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("theta", THETAS)
def test_under_autocast(theta: str) -> None:
    given = (*inputs((40, 13), torch.float32), [2.0, 3.0], theta, "bank")
    wanted, narrow = output_and_gradients(REFERENCE, *given), output_and_gradients(OURS, *given, autocast=True)
    assert narrow["output"].dtype == torch.bfloat16
    for name, tensor in wanted.items():
        assert relative(narrow[name], tensor) <= AUTOCAST, name
        assert name == "output" or narrow[name].dtype == torch.float32


def raw(x: Tensor, keys: Tensor, values: Tensor) -> tuple[Any, ...]:
    """Arguments of the op itself: one bank of one projection."""
    return x, keys, [values], None, [2.0], [len(keys)], [1], "l2_norm_gelu", [0, len(keys)], [0, len(keys)]


def test_the_op_is_what_torch_expects() -> None:
    """Its schema, its fake kernels (of backward too), its autograd; under autocast it reconciles dtypes itself."""
    x, (keys,), (values,) = inputs((12,), torch.float32, (5,))
    torch.library.opcheck(torch.ops.growkit.pattention, raw(x, keys, values))
    with torch.autocast("cpu", torch.bfloat16):
        (out,), squares = torch.ops.growkit.pattention(*raw(x.bfloat16(), keys, values))
    assert out.dtype == torch.bfloat16 and squares.dtype == torch.float32


@pytest.mark.parametrize(("theta", "scope"), CASES)
def test_traced_whole(theta: str, scope: str) -> None:
    """``fullgraph`` raises at the first graph break; forward and backward are traced with fake tensors."""
    torch.compiler.reset()
    banks = (12, 5)
    given = (*inputs(banks, torch.float32), taus(banks, scope), theta, scope)
    traced = torch.compile(OURS, fullgraph=True, backend="aot_eager")
    plain, other = output_and_gradients(OURS, *given), output_and_gradients(traced, *given)
    for name, tensor in plain.items():
        assert relative(other[name], tensor) <= TOLERANCE[torch.float32], name


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_counted_as_the_reference_has_them(frozen: bool) -> None:
    """What is made again in backward is not counted, and what is not asked for is not made."""
    x, keys, values = inputs((12, 5), torch.float32)
    for tensor in (keys[0], values[0]):
        tensor.requires_grad_(not frozen)
    found = []
    for path in (OURS, REFERENCE):
        with FlopCounterMode(display=False) as counter:
            out = path(x, keys, values, [2.0, 3.0], "l2_norm_gelu", "bank")
            forward = counter.get_total_flops()
            out.sum().backward()
        found.append((forward, counter.get_total_flops()))
    assert found[0] == found[1] and found[0][0] == 2 * 63 * 17 * (WIDTH + OUT)


@pytest.mark.parametrize("theta", THETAS)
def test_what_is_kept_does_not_grow_with_n(theta: str) -> None:
    """x, keys, values, and one number a token."""
    sizes = []
    x, keys, values = inputs((400,), torch.bfloat16)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        OURS(x, keys, values, [2.0], theta, "bank")
    assert sum(sizes) == x.nbytes + keys[0].nbytes + values[0].nbytes + 4 * 63


def test_chunks_bound_the_work_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for width in (1, 768, 4096, 16384, 65536):
        rows = tiling.chunk_rows(width)
        assert rows % 128 == 0 and rows * width <= tiling.WORK_ELEMENTS, width
    assert tiling.chunk_rows(2**30) == 128


def test_memory_in_any_order_and_no_tokens_at_all() -> None:
    """Transposed, strided and broadcast tensors; none."""
    x, keys, values = inputs((12,), torch.float32)
    given = (keys[0].detach().T.contiguous().T, values[0].detach().repeat(1, 2)[:, ::2])
    tensors = [tensor.requires_grad_() for tensor in given]
    wide = torch.randn(5, 3, WIDTH + 3)[..., :WIDTH].requires_grad_()
    found = []
    for path in (OURS, REFERENCE):
        out = path(wide, [tensors[0]], [tensors[1]], [2.0], "l2_norm_gelu", "bank")
        found.append([out, *torch.autograd.grad(out.sum(), [wide, *tensors])])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) <= TOLERANCE[torch.float32]
    out = OURS(x[:0], keys, values, [2.0], "l2_norm_gelu", "bank")
    assert out.shape == (0, 9, OUT)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), [x, *keys, *values]))


def test_float64_takes_the_formula() -> None:
    """Growth is certified in it, whatever the backend."""
    given = (*inputs((12,)), [2.0], "l2_norm_gelu", "bank")
    assert torch.equal(OURS(*given), single(compiled.pattention)(*given))


def test_what_does_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, keys, values = inputs((12,), torch.float32)
    rest = ([2.0], "l2_norm_gelu", "bank")
    with pytest.raises(ConfigError, match=r"trainer\.backend.*float32.*bfloat16.*autocast"):
        OURS(x, [keys[0].bfloat16()], values, *rest)
    with pytest.raises(ConfigError, match=r"trainer\.backend.*x is on cpu.*tokens on meta.*one device"):
        OURS(x, keys, [values[0].to("meta")], *rest)
    with pytest.raises(ConfigError, match=r"int32.*one of float32, bfloat16 and float16"):
        OURS(x.int(), [keys[0].int()], [values[0].int()], *rest)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"trainer\.backend.*tensors on cpu.*GPU.*auto, compiled or reference"):
        OURS(x, keys, values, *rest)


@pytest.mark.kernels  # one that grows does in the sample of interpreted_recipes.py
def test_a_tiny_tokenformer_learns_as_with_the_reference() -> None:
    assert_learns_as_the_reference(model_config("tokenformer"), SAME_LOSS)
