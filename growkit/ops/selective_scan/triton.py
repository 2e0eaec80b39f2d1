"""The scan on a GPU: which of Triton's kernels run, over which parts of the work. ``triton_kernels`` has the kernels.

Legend: as the package says, and BN: N to the next power of two, BD: channels of a program, spans: parts of L that are
gone through at once. Sums over blocks of channels (dB, dC), sequences and spans (dA, dD) are written as parts and
added in one order: results do not change from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from growkit.errors import ConfigError
from growkit.ops import flops, tiling
from growkit.ops.dispatch import KEY, interpreted
from growkit.ops.selective_scan import compiled, triton_kernels
from growkit.ops.selective_scan.loop import Inputs
from growkit.ops.variants import Variant


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    *,
    dt_bias_D: Tensor | None = None,
    z_BLD: Tensor | None = None,
    h0_BDN: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same signature and meaning as ``reference.selective_scan``. Float64, in which growth is measured and which GPUs
    hardly compute, goes to ``compiled``. Raises ConfigError for more than 256 states, and for tensors on a CPU outside
    Triton's interpreter."""
    path = "compiled" if x_BLD.dtype == torch.float64 else "triton"
    if path == "triton":
        _check(x_BLD, A_DN)
    return compiled.run(
        x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D_D, dt_bias_D, z_BLD, h0_BDN, segments_BL=segments_BL, path=path
    )


def _check(x: Tensor, A: Tensor) -> None:
    if A.shape[1] > tiling.MOST_STATES:
        mend = f"take at most {tiling.MOST_STATES}, or {KEY}=compiled"
        problem = "is more states than Triton's kernels have registers for"
        raise ConfigError("scan-misfit", problem, key="selective_scan.A", value=A.shape[1], mend=mend)
    if x.device.type == "cpu" and not _INTERPRETED:
        mend = f"move the tensors to a GPU, or take {KEY}=auto, compiled or reference"
        raise ConfigError("scan-misfit", "has no kernels of Triton's", key="selective_scan.x", value="cpu", mend=mend)


# The counter loads triton, so it is told of the op here; the compiled path it does not see, whatever has been loaded.
@register_flop_formula(torch.ops.growkit.selective_scan)
def _flops(x_BLD: tuple[int, ...], dt: object, A_DN: tuple[int, ...], *rest: object, **more: object) -> int:
    """Of the recurrence, by our convention."""
    return flops.SCAN * math.prod(x_BLD) * A_DN[1] if "triton" in rest else 0


@register_flop_formula(torch.ops.growkit.selective_scan_backward)
def _backward_flops(*given: Any, **more: object) -> int:
    return flops.BACKWARD * _flops(*given)


_INTERPRETED = interpreted()  # like the kernels, which are loaded now


def forward(inputs: Inputs, keep: bool, spans: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h_T, the state before each 64 tokens (B, ⌈L/64⌉, N, D); none of them unless ``keep``). ``spans``: at most;
    by default what fills the GPU."""
    x, dt, A, B, C, D, bias, z, h0, starts = _dense(inputs)
    (batch, length, channels), states = x.shape, A.shape[0]
    span, spans = _spans(x, states, "forward", spans)
    first = None if h0 is None else h0.transpose(1, 2).contiguous()
    if spans > 1:
        ends = torch.empty(batch, spans, states, channels, dtype=A.dtype, device=x.device)
        sums = torch.empty(batch, spans, channels, dtype=A.dtype, device=x.device)
        tensors: tuple[Tensor | None, ...] = (x, dt, B, A, bias, starts, ends, sums)
        _launch("ends", x, states, batch * spans, *tensors, *_rows(x, dt), length, channels, span)
        first = _carried(x, A, sums, ends, first, _resets(starts, span, spans), back=False)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = torch.empty(batch, states, channels, dtype=A.dtype, device=x.device)
    shape = (batch, -(-length // tiling.KEPT), states, channels) if keep else (0,)
    kept = torch.empty(shape, dtype=A.dtype, device=x.device)
    tensors = (x, dt, z, B, C, A, D, bias, first, starts, y, last, kept if keep else None)
    _launch("forward", x, states, batch * spans, *tensors, *_rows(x, dt, z), length, channels, span)
    return y, last.transpose(1, 2).contiguous(), kept


def backward(
    inputs: Inputs, kept: Tensor, dy_BLD: Tensor, dh_BDN: Tensor, spans: int | None = None
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias, z and h0; an absent one's is empty."""
    x, dt, A, B, C, D, bias, z, h0, starts = _dense(inputs)
    dy = _rows_dense(dy_BLD)
    (batch, length, channels), states = x.shape, A.shape[0]
    span, spans = _spans(x, states, "backward", spans)
    blocks = tiling.scan_programs("backward", states, channels, 1)

    def wide(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=A.dtype, device=x.device)

    after = dh_BDN.transpose(1, 2).contiguous()
    if spans > 1:
        ends, sums = wide(batch, spans, states, channels), wide(batch, spans, channels)
        tensors: tuple[Tensor | None, ...] = (dt, z, C, A, bias, starts, dy, ends, sums)
        _launch("back_ends", x, states, batch * spans, *tensors, *_rows(dt, z, dy), length, channels, span)
        after = _carried(x, A, sums, ends, after, _resets(starts, span, spans), back=True)
    dx, d_dt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dz = None if z is None else torch.empty_like(dx)
    dB, dC = (wide(blocks, batch, length, states) for _ in range(2))
    dA, dD = wide(batch, spans, states, channels), wide(batch, spans, channels)
    d_bias = None if bias is None else torch.empty_like(dD)
    dh0 = None if h0 is None else wide(batch, states, channels)
    scratch = wide(blocks * batch * spans, *tiling.scan_scratch(states))
    tensors = (x, dt, z, B, C, A, D, bias, starts, kept, after, dy, scratch, dx, d_dt, dz, dB, dC, dA, dD, d_bias, dh0)
    _launch("backward", x, states, batch * spans, *tensors, *_rows(x, dt, z, dy), length, channels, span, batch)
    return (
        dx,
        d_dt,
        dA.sum((0, 1)).T.contiguous(),
        dB.sum(0).to(x.dtype),
        dC.sum(0).to(x.dtype),
        dD.sum((0, 1)),
        wide(0) if d_bias is None else d_bias.sum((0, 1)),
        x.new_empty(0) if dz is None else dz,
        wide(0) if dh0 is None else dh0.transpose(1, 2).contiguous(),
    )


def variant(name: str, states: int, dtype: torch.dtype, absent: frozenset[str] = frozenset()) -> Variant:
    """The way in which the kernel ``name`` runs for so many states. ``absent``: which optional tensors are."""
    kernel = _kernel(name)
    BD, U, warps = tiling.scan_tile(name, states)
    sizes = {"N": states, "BN": tiling.power(states), "BD": BD, "U": U, "K": tiling.KEPT, "BACK": name == "carry_back"}
    constants: dict[str, Any] = {size: value for size, value in sizes.items() if size in kernel.arg_names}
    constants |= dict.fromkeys(absent)
    types = {argument: _type(argument, dtype) for argument in kernel.arg_names if argument not in constants}
    pointers = (argument for argument, kind in types.items() if kind.startswith("*") and kind != "*u8")
    return Variant(name, kernel, types, constants, tuple(pointers), warps)


def variants() -> Iterator[Variant]:
    """All that may be launched: of states some of each number of warps, of optional tensors all or the least."""
    for states in (1, 3, 8, 16, 24, 32, 64, 128, 256):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for name in _OPTIONAL:
                yield variant(name, states, dtype)
                yield variant(name, states, dtype, frozenset(_OPTIONAL[name]))


def _kernel(name: str) -> Any:
    return getattr(triton_kernels, f"{name.removesuffix('_back')}_kernel")


_OPTIONAL: dict[str, set[str]] = {
    "forward": {"z", "bias", "first", "starts", "kept"},
    "ends": {"bias", "starts"},
    "carry": {"first", "resets"},
    "carry_back": {"resets"},
    "back_ends": {"z", "bias", "starts"},
    "backward": {"z", "bias", "starts", "dz", "d_bias", "dh0"},
}
_OF_X = ("x", "dt", "z", "y", "dy", "dx", "d_dt", "dz")


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument == "starts" or argument == "resets":
        return "*u8"
    if argument in ("L", "channels", "span", "spans", "sequences") or argument.endswith(("_b", "_t")):
        return "i32"
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return f"*{short}" if argument in _OF_X else "*fp32"


def _launch(name: str, x: Tensor, states: int, parts: int, *arguments: Any) -> None:
    """One program for each block of channels of each of ``parts``."""
    chosen = variant(name, states, x.dtype)
    grid = (-(-x.shape[2] // chosen.constants["BD"]) * parts,)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": chosen.fp_fusion}
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        chosen.kernel[grid](*arguments, **chosen.constants, **options)


def _carried(
    x: Tensor, A: Tensor, sums: Tensor, local: Tensor, first: Tensor | None, resets: Tensor | None, *, back: bool
) -> Tensor:
    """(B, spans, N, D): what goes into each span."""
    carried = torch.empty_like(local)
    batch, spans = sums.shape[:2]
    name = "carry_back" if back else "carry"
    _launch(name, x, A.shape[0], batch, A, sums, local, first, resets, carried, x.shape[2], spans)
    return carried


def _spans(x: Tensor, states: int, name: str, most: int | None) -> tuple[int, int]:
    """As ``tiling.scan_spans``."""
    batch, length, channels = x.shape
    if most is None:
        most = tiling.most_spans(name, states, channels, batch, _processors(x.device))
    return tiling.scan_spans(length, most)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _resets(starts: Tensor | None, span: int, spans: int) -> Tensor | None:
    """(B, spans): whether a document begins in it, after which nothing of what came before is left."""
    if starts is None:
        return None
    padded = torch.nn.functional.pad(starts, (0, span * spans - starts.shape[1]))
    return padded.view(starts.shape[0], spans, span).amax(2)


def _dense(inputs: Inputs) -> Inputs:
    """As kernels read them: rows whose numbers lie side by side, A as (N, D) so that its lie like states', starts as
    bytes. B and C are made wide here, once: every block of channels reads them, and to widen them costs as many
    instructions there as the recurrence itself."""
    x, dt, A, B, C, D, bias, z, h0, starts = inputs
    return Inputs(
        *(
            _rows_dense(x),
            _rows_dense(dt),
            A.T.contiguous(),
            B.to(A.dtype).contiguous(),
            C.to(A.dtype).contiguous(),
            D.contiguous(),
        ),
        dt_bias=None if bias is None else bias.contiguous(),
        z=None if z is None else _rows_dense(z),
        h0=h0,
        starts=None if starts is None else starts.contiguous().view(torch.uint8),
    )


def _rows_dense(tensor: Tensor) -> Tensor:
    """Its rows' numbers side by side, and tokens so near each other that 32 bits reach over a block of them."""
    near = tensor.stride(1) * tiling.KEPT + tensor.shape[2] <= 2**31
    return tensor if near and (tensor.stride(2) == 1 or tensor.shape[2] == 1) else tensor.contiguous()


def _rows(*tensors: Tensor | None) -> tuple[int, ...]:
    """Of each, numbers from one sequence, and from one token, to the next."""
    return tuple(0 if tensor is None else tensor.stride(axis) for tensor in tensors for axis in (0, 1))
