"""The selective scan of Mamba (arXiv 2312.00752, eq. 2 and Algorithm 2), with everything elementwise around it.

    Δ   = softplus(dt + dt_bias)                         the identity above 20
    h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t x_t B_t
    y_t = Σ_n C_t h_t + D ⊙ x_t, times silu(z_t) where z is given

Legend: B sequences, L tokens, D channels, N states of each channel. Every size is 1 or more; L = 1 with ``h0`` is a
step of decoding.

| tensor | shape | dtype | |
|---|---|---|---|
| x, dt, z | (B, L, D) | that of x: bfloat16, float16, float32 or float64 | z: optional |
| B, C | (B, L, N) | that of x | |
| A | (D, N) | wide: float32, or float64 where x is | below zero in a model, though nothing here needs it |
| D, dt_bias | (D) | wide | dt_bias: optional |
| h0 | (B, D, N) | wide | the state before the first token; without it zero |
| segments | (B, L) | integers | the document of each token; optional |
| → y | (B, L, D) | that of x | |
| → h_T | (B, D, N) | wide | the state after the last token |

Where a token's segment is not that of the token before it, the state begins at zero; ``h0`` belongs to the document of
the first token. Gradients flow from y and h_T to every tensor but ``segments``.

``reference`` is the definition. ``compiled`` runs everywhere: on a CPU with a C++ compiler as a kernel, elsewhere as a
loop of torch calls. Neither keeps the states of all tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from growkit.errors import ConfigError
from growkit.ops.dispatch import choose
from growkit.ops.selective_scan import compiled, reference

__all__ = ["PATHS", "SelectiveScan", "selective_scan"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class SelectiveScan(Protocol):
    def __call__(
        self,
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
    ) -> tuple[Tensor, Tensor]: ...


PATHS: dict[str, SelectiveScan] = {"reference": reference.selective_scan, "compiled": compiled.selective_scan}


def selective_scan(backend: str = "auto") -> SelectiveScan:
    """The path of the scan that ``backend`` means. Raises ConfigError, and so does the path where tensors do not fit.

    The path is chosen once, when a module is built: a look-up or a log line inside ``forward`` would break a compiled
    graph.
    """
    path = choose("selective_scan", backend, PATHS, _triton)

    def scan(
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
        _check(x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D_D, dt_bias_D, z_BLD, h0_BDN, segments_BL)
        return path(
            x_BLD,
            dt_BLD,
            A_DN,
            B_BLN,
            C_BLN,
            D_D,
            dt_bias_D=dt_bias_D,
            z_BLD=z_BLD,
            h0_BDN=h0_BDN,
            segments_BL=segments_BL,
        )

    return scan


def _triton() -> SelectiveScan:
    """Loaded when it is chosen: triton need not be there otherwise."""
    from growkit.ops.selective_scan import triton

    return triton.selective_scan


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    z: Tensor | None,
    h0: Tensor | None,
    segments: Tensor | None,
) -> None:
    """Raises ConfigError for the first tensor that does not fit x and A."""
    if x.dim() != 3 or 0 in x.shape:
        raise _misfit("x", tuple(x.shape), "is not (sequences, tokens, channels), each 1 or more", "give it that shape")
    if A.dim() != 2 or A.shape[0] != x.shape[2] or A.shape[1] < 1:
        problem = f"is not (channels, states) for the {x.shape[2]} channels of x"
        raise _misfit("A", tuple(A.shape), problem, "give it one row for each channel")
    if x.dtype not in DTYPES:
        raise _misfit("x", x.dtype, "is not a dtype of the scan", f"cast to one of {', '.join(map(str, DTYPES))}")
    (batch, length, channels), states = x.shape, A.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, state = (batch, length, channels), (batch, channels, states)
    for name, tensor, shape, dtype in (
        ("dt", dt, tokens, x.dtype),
        ("z", z, tokens, x.dtype),
        ("B", B, (batch, length, states), x.dtype),
        ("C", C, (batch, length, states), x.dtype),
        ("A", A, (channels, states), wide),
        ("D", D, (channels,), wide),
        ("dt_bias", dt_bias, (channels,), wide),
        ("h0", h0, state, wide),
        ("segments", segments, (batch, length), None),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            given = f"x {tuple(x.shape)} and A {tuple(A.shape)}"
            raise _misfit(name, tuple(tensor.shape), f"is not the shape that goes with {given}", f"give it {shape}")
        if tensor.device != x.device:
            raise _misfit(name, str(tensor.device), f"is not the device of x, {x.device}", "move one of them")
        if dtype is not None and tensor.dtype != dtype:
            raise _misfit(name, tensor.dtype, f"is not the dtype that goes with x in {x.dtype}", f"cast it to {dtype}")
        if dtype is None and (tensor.is_floating_point() or tensor.is_complex()):
            raise _misfit(name, tensor.dtype, "is not a dtype of whole numbers", "give the number of each document")


def _misfit(name: str, value: object, problem: str, mend: str) -> ConfigError:
    return ConfigError("scan-misfit", problem, key=f"selective_scan.{name}", value=value, mend=mend)
