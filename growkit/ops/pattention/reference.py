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

    Computes in float32, or float64 for float64 input. ``scope='shared'``: one norm over the tokens of all banks.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(dtype)
    groups = list(zip(keys, values, strict=True))
    if scope == "shared":
        groups = [(torch.cat(keys), torch.cat(values))]
    out = x.new_zeros(*x.shape[:-1], values[0].shape[1])
    for (k, v), tau in zip(groups, taus, strict=True):
        a = x @ k.to(dtype).T
        out = out + activation(a, theta, tau) @ v.to(dtype)
    return out.to(x_TD.dtype)


def activation(a: Tensor, theta: str, tau: float) -> Tensor:
    """Θ over the last axis of the scores A = X Kᵀ."""
    if theta == "l2_norm_gelu":
        norm = a.square().sum(-1, keepdim=True).sqrt().clamp_min(NORM_FLOOR)
        return torch.nn.functional.gelu(tau * a / norm)
    if theta == "gelu_l2_norm":
        g = torch.nn.functional.gelu(a)
        return tau * g / g.square().sum(-1, keepdim=True).sqrt().clamp_min(NORM_FLOOR)
    assert theta == "softmax", theta
    return tau * torch.softmax(a, -1)
