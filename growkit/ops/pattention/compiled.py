"""Pattention as a few torch calls: fast in eager mode, and transparent to Inductor (nothing here breaks a graph).

Banks run one after the other: their products are large, their number small, and each has a norm of its own.
Norms are taken in float32 under bf16 autocast, as the reference does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.ops.pattention.reference import NORM_FLOOR


def pattention(
    x_TD: Tensor, keys: list[Tensor], values: list[Tensor], taus: list[float], theta: str, scope: str
) -> Tensor:
    """Same signature and meaning as ``reference.pattention``."""
    if scope == "shared" and len(keys) > 1:
        keys, values = [torch.cat(keys)], [torch.cat(values)]
    out: Tensor | None = None
    for k, v, tau in zip(keys, values, taus, strict=True):
        part = F.linear(_activation(F.linear(x_TD, k), theta, tau), v.T)
        out = part if out is None else out + part
    assert out is not None
    return out


def _activation(a: Tensor, theta: str, tau: float) -> Tensor:
    if theta == "l2_norm_gelu":
        return F.gelu(a * _scale(a, tau))
    if theta == "gelu_l2_norm":
        g = F.gelu(a)
        return g * _scale(g, tau)
    return torch.softmax(a, -1) * tau


def _scale(a: Tensor, tau: float) -> Tensor:
    """τ / ‖a‖₂ per row, accumulated in float32 at least, given back in a's dtype so that the product stays narrow."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=dtype).clamp_min(NORM_FLOOR)
    return (tau / norm).to(a.dtype)
