"""Pattention in the paper's symbols (TokenFormer, arXiv 2410.23168, eq. 4–6): a plain loop, no speed tricks.

Legend: T tokens, D input width, E output width, n parameter tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_FLOOR = 1e-6  # ‖A‖₂ is never taken below this: a token whose scores are all zero then gives 0, not NaN


def pattention(
    x_TD: Tensor, keys: list[Tensor], values: list[Tensor], taus: list[float], theta: str, scope: str
) -> Tensor:
    """Σ_g Θ_g(X K_gᵀ) V_g. ``keys[g]``: (n_g, D), ``values[g]``: (n_g, E); returns (T, E) in X's dtype.

    Computes in float32, or float64 for float64 input, autocast or not. ``scope='shared'``: one norm over the tokens of
    all banks.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(dtype)
    groups = list(zip(keys, values, strict=True))
    if scope == "shared":
        groups = [(torch.cat(keys), torch.cat(values))]
    out = x.new_zeros(*x.shape[:-1], values[0].shape[1])
    with torch.autocast(x.device.type, enabled=False):
        for (k, v), tau in zip(groups, taus, strict=True):
            a = x @ k.to(dtype).T
            out = out + activation(a, theta, tau) @ v.to(dtype)
    return out.to(x_TD.dtype)


def activation(a: Tensor, theta: str, tau: float) -> Tensor:
    """Θ over the last axis of the scores A = X Kᵀ."""
    if theta == "l2_norm_gelu":
        return torch.nn.functional.gelu(tau * a / _norm(a))
    if theta == "gelu_l2_norm":
        g = torch.nn.functional.gelu(a)
        return tau * g / _norm(g)
    assert theta == "softmax", theta
    return tau * torch.softmax(a, -1)


def _norm(a: Tensor) -> Tensor:
    """max(‖a‖₂, floor) per row; the floor is under the root, whose slope at 0 is infinite."""
    return a.square().sum(-1, keepdim=True).clamp_min(NORM_FLOOR**2).sqrt()
