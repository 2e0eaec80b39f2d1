"""The scan's Triton kernels against the reference, in the interpreter: output, last state and every gradient, at odd
sizes, with documents and states, over one span and several; what is not written would be NaN."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from growkit.errors import ConfigError
from growkit.ops import tiling
from growkit.ops.selective_scan import PATHS, compiled, native, selective_scan, triton
from tests.kernels.learning import assert_learns_as_the_reference, rest
from tests.support import model_config
from tests.test_selective_scan import OPTIONS, Tensors, assert_same, call, documents, inputs, relative, results

# Norm-wise, as of the other paths: float32 throughout, from the same inputs, with roundings in another order.
TOLERANCE = {
    # Unit roundoff 6e-8, some ten of them: the decay's exponent is rounded twice, A times log₂e being one.
    torch.float32: 4e-6,
    # The interpreter cuts a float32 to bfloat16 where a GPU rounds it, so any result may be one unit, 2^-7, off.
    torch.bfloat16: 8e-3,
    # A result near the middle of two numbers may go either way, by 2^-11, one in 2^12.
    torch.float16: 1e-4,
}
SAME_LOSS = 1e-5  # relative, after steps of AdamW, which divides by gradients and so enlarges their last roundings
KEPT = 8  # tokens between kept states here: with 64, what has several of them would take minutes


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "KEPT", KEPT)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets over how many spans a sequence goes."""
    taken = []

    def several(most: int) -> list[int]:
        found = triton._spans

        def recorded(x: Tensor, states: int, name: str, _: int | None) -> tuple[int, int]:
            span, count = found(x, states, name, most)
            taken.append(count)
            return span, count

        monkeypatch.setattr(triton, "_spans", recorded)
        return taken

    return several


def check(given: Tensors, segments: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
    assert_same(
        results(triton.selective_scan, given, segments), results(PATHS["reference"], given, segments), TOLERANCE[dtype]
    )


SOME = [c for n in (1, 2) for c in itertools.combinations(OPTIONS, n)]


@pytest.mark.parametrize("segmented", [rest(False), True])
@pytest.mark.parametrize("options", [(), OPTIONS, *map(rest, SOME)], ids=str)
def test_with_and_without_each_optional_tensor(options: Any, segmented: bool) -> None:
    check(inputs(2, 17, 5, 3, torch.float32, options), documents(2, 17, 6) if segmented else None)


SIZES = [(1, 1, 2, 1), (2, 17, 33, 3), (1, 21, 5, 16), (1, 9, 2, 40)]
MORE = [(1, 130, 5, 16), (1, 130, 33, 40), (3, 1, 33, 16), (2, 64, 1, 16), (1, 200, 70, 1), (1, 6, 3, 256)]


@pytest.mark.parametrize("size", [*SIZES, *map(rest, MORE)], ids=str)
def test_at_odd_sizes(size: tuple[int, int, int, int]) -> None:
    """Blocks of channels, blocks of kept states and chunks that are not full, and one of each."""
    check(inputs(*size, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, rest(torch.float16)], ids=str)
def test_narrow_inputs(dtype: torch.dtype) -> None:
    check(inputs(2, 18, 33, 5, dtype), documents(2, 18, 7), dtype)


@pytest.mark.parametrize("segmented", [rest(False), True])
@pytest.mark.parametrize("size", [(2, 18, 5, 3), rest((1, 130, 33, 16))], ids=str)
def test_over_spans(spans: Any, size: tuple[int, int, int, int], segmented: bool) -> None:
    """Three passes: each span from a state of zero, what is carried from span to span, each span again."""
    taken = spans(99)
    segments = documents(size[0], size[1], 12) if segmented else None  # a span with a start, others without one
    check(inputs(*size, torch.float32), segments)
    check(inputs(*size, torch.float32, ("z",)), segments)
    assert set(taken) == {math.ceil(size[1] / KEPT)}


def test_rows_may_lie_anywhere_and_gradients_too() -> None:
    """Parts of wider rows are read in place, transposed tensors and expanded gradients are as good."""
    given = inputs(2, 17, 5, 3, torch.float32)
    turned = {
        name: tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
        if tensor.dim() > 1
        else tensor
        for name, tensor in given.items()
    }
    assert_same(results(triton.selective_scan, turned), results(triton.selective_scan, given), 0.0)
    (y, _), (wanted, _) = call(triton.selective_scan, given), call(PATHS["reference"], given)
    ours = torch.autograd.grad(y.sum(), list(given.values()), allow_unused=True)
    theirs = torch.autograd.grad(wanted.sum(), list(given.values()))
    for name, a, b in zip(given, ours, theirs, strict=True):
        assert relative(a, b) <= TOLERANCE[torch.float32], name


def test_what_is_not_finite_goes_on_and_stays_in_its_document(spans: Any) -> None:
    for most in (1, 3):
        spans(most)
        given = inputs(1, 30, 6, 4, torch.float32)
        with torch.no_grad():
            given["x"][0, 5, 3] = math.nan
        segments = (torch.arange(30) >= 14).long()[None]
        found = results(triton.selective_scan, given, segments)
        broken = ~found["y"][0].isfinite()
        assert broken[5:14, 3].all() and broken.sum() == 9
        assert found["h_T"].isfinite().all()
        assert found["x"][0, 14:].isfinite().all(), "a later document's gradient"
        with torch.no_grad():
            given["dt"][0, 20, 0] = math.nan
        found = results(triton.selective_scan, given, segments)
        assert found["y"][0, 20:, 0].isnan().all() and found["h_T"][0, 0].isnan().all()
        assert found["x"][0, :14, 0].isfinite().all(), "an earlier document's gradient"


def test_with_as_many_kept_states_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert tiling.KEPT == 64
    check(inputs(1, 70, 3, 4, torch.float32))


def test_its_functions_are_exact_to_two_units() -> None:
    """softplus over all it can meet, in float32: with A = 0 and B = x = 1 the state after one token is Δ."""
    x = torch.linspace(-80, 30, 1024)
    ones, zeros = torch.ones(1, 1, 1), torch.zeros(1, 1, x.numel())
    y, last = triton.selective_scan(
        zeros + 1, x[None, None], torch.zeros(x.numel(), 1), ones, 0 * ones, zeros[0, 0] + 1, z_BLD=x[None, None]
    )
    wanted = torch.nn.functional.softplus(x.double(), threshold=20)
    unit = 2.0**-23
    # e^-|x| carries the rounding of its exponent, |x| times a unit.
    assert float(((last.flatten().double() - wanted) / wanted).abs().div(2 + x.abs()).max()) <= unit
    silu = torch.nn.functional.silu(x.double())
    error = ((y.flatten().double() - silu) / silu).nan_to_num(0).abs()
    assert float(error.div(4 + x.abs()).max()) <= unit


def test_it_is_an_op_as_torch_wants_them() -> None:
    """Schema, fake kernel, registration of the gradient, and tracing with sizes that change."""
    given = inputs(2, 5, 3, 2, torch.float32)
    tensors = (*(given[name] for name in ("x", "dt", "A", "B", "C", "D")), *(given.get(name) for name in OPTIONS))
    starts = documents(2, 5) % 3 == 0
    torch.library.opcheck(torch.ops.growkit.selective_scan.default, (*tensors, starts, True, "triton"))
    plain = tuple(tensor.detach() for tensor in tensors if tensor is not None)
    y, last, kept = torch.ops.growkit.selective_scan(*plain, starts, True, "triton")
    backward = (*plain, starts, kept, y.clone(), last.clone(), "triton")
    torch.library.opcheck(torch.ops.growkit.selective_scan_backward.default, backward)


def test_its_flops_are_counted() -> None:
    given = inputs(2, 5, 3, 2, torch.float32)
    with FlopCounterMode(display=False) as counter:
        y, _ = call(triton.selective_scan, given)
        assert counter.get_total_flops() == 7 * 2 * 5 * 3 * 2
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 7 * 2 * 5 * 3 * 2


def test_traced_whole_and_under_autocast() -> None:
    given = inputs(1, 9, 3, 2, torch.float32)
    scan = selective_scan("triton")
    torch._dynamo.reset()
    wanted = results(scan, given)
    assert_same(results(torch.compile(scan, fullgraph=True, backend="aot_eager"), given), wanted, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = call(scan, given)
    assert torch.equal(y, wanted["y"]) and torch.equal(last, wanted["h_T"])


def test_float64_takes_the_compiled_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "forward", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(native, "kernel", lambda: None)  # nothing needs to be built for this
    given = inputs(1, 9, 3, 2)
    assert_same(results(selective_scan("triton"), given), results(compiled.selective_scan, given), 0.0)


def test_too_many_states_are_named() -> None:
    given = inputs(1, 2, 1, 257, torch.float32)
    with pytest.raises(ConfigError, match=r"257.*at most 256, or trainer\.backend=compiled"):
        call(selective_scan("triton"), given)


def test_a_model_learns_as_with_the_reference() -> None:
    assert_learns_as_the_reference(model_config("mamba", num_layers=1, d_state=5), SAME_LOSS)
