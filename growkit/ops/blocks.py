"""Reading and writing the K blocks of an AltUp stream: every block in one product, never a loop over them.

In eager mode autograd makes the gradient of a stream as often as a layer uses it, and adds them up: each time K blocks
of fresh memory. Here what reads a stream also hands it on, to the next op of this file and to nothing else; so its
gradient is made once, by the write, and the reads before it add their share in place. Under torch.compile the plain
formulas are left for Inductor; they are also what the tests hold these to.

Legend: K blocks, B batch, T tokens, D embed. Blocks lie outermost, (K, B, T, D), so that with coefficients that all
tokens share a layer's mixing is one (K, K) × (K, B·T·D) product; in memory those of a token that has its own lie
together. Coefficients are taken in the stream's own dtype; autocast is off, as it is for the residual stream that they
carry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def pick_block(block: int, R_KBTD: Tensor) -> tuple[Tensor, Tensor]:
    """(One block of R, (B, T, D); R for the next op)."""
    if torch.compiler.is_compiling():
        return R_KBTD[block], R_KBTD
    return _Pick.apply(R_KBTD, block)  # type: ignore[no-untyped-call]


def read_blocks(a: Tensor, R_KBTD: Tensor) -> tuple[Tensor, Tensor]:
    """(z = aᵀR, (B, T, D); R for the next op); ``a`` (K,), or (B, T, K) where each token has its own."""
    a = a.to(R_KBTD.dtype)
    with torch.autocast(R_KBTD.device.type, enabled=False):
        if torch.compiler.is_compiling():
            return _read(a, R_KBTD), R_KBTD
        return _Read.apply(a, R_KBTD)  # type: ignore[no-untyped-call]


def write_blocks(N: Tensor, b: Tensor, R_KBTD: Tensor, y_BTD: Tensor) -> Tensor:
    """R′ = N R + b yᵀ, (K, B, T, D); ``N`` (K, K) and ``b`` (K,), or (B, T, K, K) and (B, T, K)."""
    N, b, y_BTD = (t.to(R_KBTD.dtype) for t in (N, b, y_BTD))
    with torch.autocast(R_KBTD.device.type, enabled=False):
        if torch.compiler.is_compiling():
            spread = b.view(-1, 1, 1, 1) if b.ndim == 1 else b.movedim(-1, 0)[..., None]
            return _mix(N, R_KBTD) + spread * y_BTD
        return _Write.apply(N, b, R_KBTD, y_BTD)  # type: ignore[no-untyped-call]


def add_to_block(block: int, R_KBTD: Tensor, change_BTD: Tensor) -> Tensor:
    """R′: R, with ``change`` added to one block."""
    if torch.compiler.is_compiling():
        return R_KBTD.select_scatter(R_KBTD[block] + change_BTD, 0, block)
    return _Add.apply(R_KBTD, change_BTD, block)  # type: ignore[no-untyped-call]


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, R: Tensor, block: int) -> tuple[Tensor, Tensor]:
        ctx.block = block
        return R[block], R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, dR: Tensor) -> tuple[Tensor, None]:
        dR[ctx.block].add_(dz)
        return dR, None


class _Read(torch.autograd.Function):
    """da = R dz; dR has a dzᵀ added to it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, R)
        return _read(a, R), R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, dR: Tensor) -> tuple[Tensor, Tensor]:
        a, R = ctx.saved_tensors
        with torch.autocast(R.device.type, enabled=False):
            return _read_by(dz, R, a), _add_outer(dR, a, dz)


class _Write(torch.autograd.Function):
    """dN = dR′ Rᵀ, db = dR′ y, dR = Nᵀ dR′, dy = bᵀ dR′."""

    @staticmethod
    def forward(ctx: Any, N: Tensor, b: Tensor, R: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(N, b, R, y)
        return _add_outer(_mix(N, R), b, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        N, b, R, y = ctx.saved_tensors
        with torch.autocast(R.device.type, enabled=False):
            if N.ndim == 2:  # of each row alone, which runs on all cores, then of all
                dN = torch.bmm(G.flatten(2).transpose(0, 1), R.flatten(2).permute(1, 2, 0)).sum(0)
            else:
                dN = torch.bmm(_by_token(G), _by_token(R).transpose(1, 2)).view_as(N)
            return dN, _read_by(y, G, b), _mix(N.transpose(-2, -1), G), _read(b, G)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, R: Tensor, change: Tensor, block: int) -> Tensor:
        ctx.block = block
        out = R.clone()
        out[block].add_(change)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor, None]:
        # Copies: the reads before it add to the stream's in place, and a view would hold all blocks for one.
        return G.clone(), G[ctx.block].clone(), None


def _read(a: Tensor, R: Tensor) -> Tensor:
    """aᵀR, (B, T, D)."""
    if a.ndim == 1:
        return torch.mm(a[None], R.flatten(1)).view(R.shape[1:])
    return torch.bmm(a.flatten(0, -2)[:, None], _by_token(R)).view(R.shape[1:])


def _read_by(x: Tensor, R: Tensor, a: Tensor) -> Tensor:
    """R x, in the shape of ``a``: summed over all tokens, or of each."""
    if a.ndim == 1:
        return torch.mm(R.flatten(1), x.reshape(-1, 1)).view_as(a)
    return torch.bmm(x.flatten(0, -2)[:, None], _by_token(R).transpose(1, 2)).view_as(a)


def _mix(N: Tensor, R: Tensor) -> Tensor:
    """N R, in fresh memory."""
    if N.ndim == 2:
        return torch.mm(N, R.flatten(1)).view(R.shape)
    mixed = torch.bmm(N.flatten(0, -3), _by_token(R))
    return mixed.view(*R.shape[1:-1], *mixed.shape[1:]).movedim(-2, 0)


def _add_outer(R: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """R + b yᵀ, in place. PyTorch's counter of FLOPs knows ``out=``, and not addmm_."""
    if b.ndim == 1:
        into = R.view(len(b), -1)
        torch.addmm(into, b[:, None], y.reshape(1, -1), out=into)
    else:
        into = _by_token(R)
        torch.baddbmm(into, b.flatten(0, -2)[:, :, None], y.flatten(0, -2)[:, None], out=into)
    return R


def _by_token(R: Tensor) -> Tensor:
    """(B·T, K, D), a view."""
    return R.flatten(1, 2).transpose(0, 1)
