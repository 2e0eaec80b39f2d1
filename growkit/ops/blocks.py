"""Reading and writing the K blocks of an AltUp stream: every block in one product, never a loop over them.

Legend: K blocks, B batch, T tokens, D embed. Blocks lie outermost, (K, B, T, D), so that with coefficients that all
tokens share a layer's mixing is one (K, K) × (K, B·T·D) product. Coefficients are taken in the stream's own dtype;
autocast is off, as it is for the residual stream that they carry.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read_blocks(a: Tensor, R_KBTD: Tensor) -> Tensor:
    """z = aᵀR, (B, T, D); ``a`` (K,), or (B, T, K) where each token has its own."""
    a = a.to(R_KBTD.dtype)
    with torch.autocast(R_KBTD.device.type, enabled=False):
        if a.ndim == 1:
            return torch.mm(a[None], R_KBTD.flatten(1)).view(R_KBTD.shape[1:])
        return torch.bmm(a.flatten(0, -2)[:, None], _by_token(R_KBTD)).view(R_KBTD.shape[1:])


def write_blocks(N: Tensor, b: Tensor, R_KBTD: Tensor, y_BTD: Tensor) -> Tensor:
    """R′ = N R + b yᵀ, (K, B, T, D); ``N`` (K, K) and ``b`` (K,), or (B, T, K, K) and (B, T, K)."""
    N, b, y_BTD = (t.to(R_KBTD.dtype) for t in (N, b, y_BTD))
    with torch.autocast(R_KBTD.device.type, enabled=False):
        if N.ndim == 2:
            written = torch.mm(b[:, None], y_BTD.reshape(1, -1))
            return torch.addmm(written, N, R_KBTD.flatten(1)).view_as(R_KBTD)
        written = b.flatten(0, -2)[:, :, None] * y_BTD.flatten(0, -2)[:, None]
        mixed = torch.baddbmm(written, N.flatten(0, -3), _by_token(R_KBTD))
        return mixed.transpose(0, 1).reshape(R_KBTD.shape)


def _by_token(R_KBTD: Tensor) -> Tensor:
    """(B·T, K, D), a view."""
    return R_KBTD.flatten(1, 2).transpose(0, 1)
