"""Pattention: token–parameter attention. ``reference`` is the definition, ``compiled`` the fast path, ``triton`` that
of GPUs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

from growkit.ops.dispatch import choose
from growkit.ops.pattention import compiled, reference
from growkit.ops.pattention.reference import Tokens

__all__ = ["PATHS", "Pattention", "Tokens", "pattention"]

Pattention = Callable[[Tensor, Sequence[Tokens]], list[Tensor]]

log = logging.getLogger(__name__)
PATHS: dict[str, Pattention] = {"reference": reference.pattention, "compiled": compiled.pattention}


def pattention(backend: str = "auto") -> Pattention:
    """The path of (x, projections) → Σ_g Θ_g(X K_gᵀ) V_g of each (TokenFormer, eq. 5) that ``backend`` means:
    x (…, D), a projection's keys[g] (n_g, D) and values[g] (n_g, E) → (…, E). Raises ConfigError.

    Several projections of one x (q, k and v) in one call share what they can. The path is chosen once, when a module
    is built: a look-up or a log line inside ``forward`` would break a compiled graph.
    """
    return choose("pattention", backend, PATHS, _triton)


@cache
def _triton() -> Pattention:
    """Loaded when it is chosen: triton need not be there otherwise."""
    from growkit.ops.pattention import triton

    log.info("op pattention has no kernels for softmax and float64: they take the compiled path's formula")
    return triton.pattention
