"""RMSNorm and rotary embedding with backward passes of their own.

In eager mode on a CPU, autograd's composites of these cost several times the arithmetic: a dozen passes over memory
each, and at small widths they rival the matrix products. Here each is a few passes. Under torch.compile the plain
formulas are left for Inductor to fuse; they are also what the tests hold these to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) ⊙ gain over the last axis (arXiv 1910.07467, eq. 4), in x's dtype; sums in float32 at
    least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gain = gain.to(wide.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.rms_norm(wide, (x.shape[-1],), gain, eps).to(x.dtype)
    return _RMSNorm.apply(wide, gain, eps).to(x.dtype)  # type: ignore[no-untyped-call]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pair (i, i + r/2) of the last axis of x (…, d) by the angle whose cosine and sine (…, r/2), broadcast
    against x, are given; dimensions from r on pass (RoFormer, arXiv 2104.09864, in GPT-NeoX's half-split order)."""
    if torch.compiler.is_compiling():
        half = cos.shape[-1]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """With n = x·r, r = (mean(x²) + eps)^−½: dx = r (g − n · mean(g ⊙ n)), g = dout ⊙ gain; dgain = Σ dout ⊙ n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * r
        ctx.save_for_backward(normed, r, gain)
        return normed * gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, r, gain = ctx.saved_tensors
        turned = (grad * normed).flatten(0, -2)
        along = torch.mv(turned, gain).view(r.shape) / normed.shape[-1]
        return (grad * gain).addcmul_(normed, along, value=-1).mul_(r), turned.sum(0), None


class _Rotate(torch.autograd.Function):
    """The derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., half : 2 * half]).addcmul_(a, sin, value=sign)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
