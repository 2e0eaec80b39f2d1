"""Pattention: token–parameter attention. ``reference`` is the definition, ``compiled`` the fast path."""

from __future__ import annotations

from torch import Tensor

from growkit.ops.dispatch import resolve_backend
from growkit.ops.pattention import compiled, reference

PATHS = {"reference": reference.pattention, "compiled": compiled.pattention}


def pattention(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    taus: list[float],
    theta: str,
    scope: str,
    backend: str = "auto",
) -> Tensor:
    """Σ_g Θ_g(X K_gᵀ) V_g (TokenFormer, eq. 5): x (…, D), keys[g] (n_g, D), values[g] (n_g, E) → (…, E)."""
    return PATHS[resolve_backend("pattention", backend)](x, keys, values, taus, theta, scope)
