"""Pattention: token–parameter attention. ``reference`` is the definition, ``compiled`` the fast path."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from growkit.ops.dispatch import resolve_backend
from growkit.ops.pattention import compiled, reference

Pattention = Callable[[Tensor, list[Tensor], list[Tensor], list[float], str, str], Tensor]

PATHS: dict[str, Pattention] = {"reference": reference.pattention, "compiled": compiled.pattention}


def pattention(backend: str = "auto") -> Pattention:
    """The path of (x, keys, values, taus, theta, scope) → Σ_g Θ_g(X K_gᵀ) V_g (TokenFormer, eq. 5) that ``backend``
    means: x (…, D), keys[g] (n_g, D), values[g] (n_g, E) → (…, E). Raises ConfigError.

    Chosen once, when a module is built: a look-up or a log line inside ``forward`` would break a compiled graph.
    """
    return PATHS[resolve_backend("pattention", backend)]
