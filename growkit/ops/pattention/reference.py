"""Pattention in the paper's symbols (TokenFormer, arXiv 2410.23168, eq. 4–6): a plain loop, no speed tricks.

Legend: T tokens, D input width, E output width, n parameter tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORM_FLOOR = 1e-6  # ‖A‖₂ is never taken below this: a token whose scores are all zero then gives 0, not NaN


class Tokens(NamedTuple):
    """The parameter tokens of one projection: ``keys[g]`` (n_g, D) and ``values[g]`` (n_g, E) of each bank g.

    ``scope='bank'``: a norm and a τ for each bank. ``scope='shared'``: one norm over the tokens of all, one τ. A τ that
    moves while the model trains is a tensor of no dimensions (float64, without gradient).
    """

    keys: list[Tensor]
    values: list[Tensor]
    taus: list[float | Tensor]
    theta: str
    scope: str

    def groups(self) -> list[tuple[list[Tensor], list[Tensor], float | Tensor]]:
        """(keys, values, τ) of each set of banks under one norm."""
        if self.scope == "shared":
            (tau,) = self.taus
            return [(self.keys, self.values, tau)]
        return [([k], [v], tau) for k, v, tau in zip(self.keys, self.values, self.taus, strict=True)]


def pattention(x_TD: Tensor, projections: Sequence[Tokens]) -> list[Tensor]:
    """Of each projection Σ_g Θ_g(X K_gᵀ) V_g, (T, E) in X's dtype.

    Computes in float32, or float64 for float64 input, autocast or not.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(dtype)
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for tokens in projections:
            out = x.new_zeros(*x.shape[:-1], tokens.values[0].shape[1])
            for keys, values, tau in tokens.groups():
                a = x @ torch.cat(keys).to(dtype).T
                out = out + activation(a, tokens.theta, tau) @ torch.cat(values).to(dtype)
            outputs.append(out.to(x_TD.dtype))
    return outputs


def activation(a: Tensor, theta: str, tau: float | Tensor) -> Tensor:
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
