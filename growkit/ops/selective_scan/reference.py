"""The selective scan in the paper's symbols (Mamba, arXiv 2312.00752, eq. 2 and Algorithm 2): a plain loop, no speed
tricks.

Legend: B sequences, L tokens, D channels, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """(y, h_T), as the package says. Computes in float32, or float64 for float64 input, autocast or not."""
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    x, dt, B, C = (tensor.to(dtype) for tensor in (x_BLD, dt_BLD, B_BLN, C_BLN))
    h = x.new_zeros(x.shape[0], *A_DN.shape) if h0_BDN is None else h0_BDN
    starts = None if segments_BL is None else document_starts(segments_BL)
    y = []
    with torch.autocast(x.device.type, enabled=False):
        delta = F.softplus(dt if dt_bias_D is None else dt + dt_bias_D, threshold=20)
        for t in range(x.shape[1]):
            if starts is not None:
                h = torch.where(starts[:, t, None, None], 0, h)
            A_bar = torch.exp(delta[:, t, :, None] * A_DN)
            h = A_bar * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
            y.append((h * C[:, t, None, :]).sum(-1) + D_D * x[:, t])
        out = torch.stack(y, dim=1)
        if z_BLD is not None:
            out = out * F.silu(z_BLD.to(dtype))
    return out.to(x_BLD.dtype), h


def document_starts(segments_BL: Tensor) -> Tensor:
    """(B, L), true at the tokens before which the state is forgotten; never at the first."""
    changed = segments_BL[:, 1:] != segments_BL[:, :-1]
    return torch.nn.functional.pad(changed, (1, 0))
