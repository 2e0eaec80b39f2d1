"""The fast paths of the selective scan: a registered op of torch, opaque to Inductor, with a backward pass of its own.

``compiled``, on a CPU, runs as the kernel of ``native``, elsewhere, and without a compiler, as ``loop``; ``triton``
runs as its kernels. All keep the state before every chunk of tokens and make the others again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growkit.ops import tiling
from growkit.ops.chunks import CHUNK
from growkit.ops.selective_scan import loop, native
from growkit.ops.selective_scan.loop import Inputs
from growkit.ops.selective_scan.reference import document_starts


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
    """Same signature and meaning as ``reference.selective_scan``."""
    return run(
        x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D_D, dt_bias_D, z_BLD, h0_BDN, segments_BL=segments_BL, path="compiled"
    )


def run(*tensors: Tensor | None, segments_BL: Tensor | None, path: str) -> tuple[Tensor, Tensor]:
    """The op on x, dt, A, B, C, D, dt_bias, z and h0; ``path``: compiled or triton."""
    starts = None if segments_BL is None else document_starts(segments_BL)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    y, last, _ = _forward(*tensors, starts, keep, path)
    return y, last


@torch.library.custom_op("growkit::selective_scan", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    z: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    keep: bool,
    path: str = "compiled",
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(x, dt, A, B, C, D, dt_bias, z, h0, starts)
    with torch.autocast(x.device.type, enabled=False):
        return _path(path, x).forward(inputs, keep)


@_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), states = x.shape, A.shape[1]
    keep, *path = rest[7:]  # none where it is the default
    chunk = tiling.KEPT if path == ["triton"] else CHUNK
    kept = (batch, (length + chunk - 1) // chunk, states, channels) if keep else (0,)
    return x.new_empty(x.shape), A.new_empty(batch, channels, states), A.new_empty(kept)


@torch.library.custom_op("growkit::selective_scan_backward", mutates_args=())
def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    z: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    d_last: Tensor,
    path: str = "compiled",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(x, dt, A, B, C, D, dt_bias, z, h0, starts)
    with torch.autocast(x.device.type, enabled=False):
        dx, d_dt, dA, dB, dC, dD, d_bias, dz, dh0 = _path(path, x).backward(inputs, kept, dy, d_last)
    return dx, d_dt, dA, dB, dC, dD, d_bias, dz, dh0


@_backward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors = (x, dt, A, *rest[:6])  # to which gradients flow
    return tuple(A.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, keep, ctx.path = inputs
    assert keep, "a gradient was asked for after the states were thrown away"
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, dy: Tensor, d_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    gradients = _backward(*tensors, kept, dy, d_last, ctx.path)
    wanted = ctx.needs_input_grad
    return (*(gradient if want else None for gradient, want in zip(gradients, wanted)), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _path(path: str, x: Tensor) -> Any:
    """What runs for x: ``native.Kernel``, ``loop`` and ``triton`` have the same two functions."""
    if path == "triton":
        from growkit.ops.selective_scan import triton

        return triton
    built = x.device.type == "cpu" and x.dtype != torch.float16  # for which processors have no arithmetic to speak of
    return (native.kernel() if built else None) or loop
