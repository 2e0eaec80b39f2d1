"""Pattention as a few torch calls: fast in eager mode, and transparent to Inductor (nothing here breaks a graph).

Banks of one size run as one product; others one after the other, since each has a norm of its own.
Norms are taken in float32 under bf16 autocast, as the reference does. In eager mode at small widths the elementwise
passes cost as much as the products, so the default Θ brings a backward pass of its own with fewer of them; under
torch.compile the plain formula is left for Inductor to fuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from growkit.ops.pattention.reference import NORM_FLOOR


def pattention(
    x_TD: Tensor, keys: list[Tensor], values: list[Tensor], taus: list[float], theta: str, scope: str
) -> Tensor:
    """Same signature and meaning as ``reference.pattention``."""
    if scope == "shared" and len(keys) > 1:
        keys, values = [torch.cat(keys)], [torch.cat(values)]
    elif len(keys) > 1 and len({len(k) for k in keys}) == 1 and len(set(taus)) == 1 and theta != "softmax":
        # Banks of one size are one product with the norm taken per segment: at small widths calls cost more than sums.
        a = torch.unflatten(F.linear(x_TD, torch.cat(keys)), -1, (len(keys), -1))
        return F.linear(_activation(a, theta, taus[0]).flatten(-2), torch.cat(values).T)
    out: Tensor | None = None
    for k, v, tau in zip(keys, values, taus, strict=True):
        part = F.linear(_activation(F.linear(x_TD, k), theta, tau), v.T)
        out = part if out is None else out + part
    assert out is not None
    return out


def _activation(a: Tensor, theta: str, tau: float) -> Tensor:
    if theta == "l2_norm_gelu":
        if torch.compiler.is_compiling() or not a.requires_grad:
            return F.gelu(a * _scale(_norm(a), tau, a.dtype))
        return _NormGelu.apply(a, tau)  # type: ignore[no-untyped-call]
    if theta == "gelu_l2_norm":
        g = F.gelu(a)
        return g * _scale(_norm(g), tau, g.dtype)
    return torch.softmax(a, -1) * tau


def _norm(a: Tensor) -> Tensor:
    """‖a‖₂ per row, accumulated and kept in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=dtype)


def _scale(norm: Tensor, tau: float, dtype: torch.dtype) -> Tensor:
    """τ / norm, given back in the scores' dtype so that the product stays narrow."""
    return (tau / norm.clamp_min(NORM_FLOOR)).to(dtype)


class _NormGelu(torch.autograd.Function):
    """gelu(s), s = τ a / ‖a‖₂, differentiated by hand: da = τ/‖a‖ · (ds − s (s·ds)/τ²), ds = gelu′(s) ⊙ dout.

    Rows whose norm is at the floor are scaled by a constant, so their projection term is dropped.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, tau: float) -> Tensor:
        norm = _norm(a)
        scale = _scale(norm, tau, a.dtype)
        s = a * scale
        ctx.save_for_backward(s, scale, norm < NORM_FLOOR)
        ctx.tau = tau
        return F.gelu(s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        s, scale, at_floor = ctx.saved_tensors
        ds = torch.ops.aten.gelu_backward(grad, s)
        wide = torch.promote_types(s.dtype, torch.float32)
        along = torch.linalg.vecdot(s.to(wide), ds.to(wide)).unsqueeze(-1) / ctx.tau**2
        along = along.masked_fill(at_floor, 0).to(s.dtype)
        return ds.addcmul_(s, along, value=-1).mul_(scale), None
