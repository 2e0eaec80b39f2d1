"""Normalisations over the last axis: RMSNorm (arXiv 1910.07467) and LayerNorm with or without a gain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.models.config import Norm
from growkit.ops.elementwise import rms_norm


class Normalize(nn.Module):
    """x (…, parts · dim) → the same shape and dtype, each part normalised on its own; statistics in float32 at
    least."""

    def __init__(self, norm: Norm, dim: int, parts: int = 1) -> None:
        super().__init__()
        self.kind, self.eps, self.dim, self.parts = norm.kind, norm.eps, dim, parts
        if norm.kind != "layernorm_gainless":
            self.gain = nn.Parameter(torch.ones(parts * dim))
        if norm.kind == "layernorm":
            self.bias = nn.Parameter(torch.zeros(parts * dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.parts > 1:
            return self._of_parts(x)
        if self.kind == "rmsnorm":
            return rms_norm(x, self.gain, self.eps)
        gain = self.gain if self.kind == "layernorm" else None
        bias = self.bias if self.kind == "layernorm" else None
        return F.layer_norm(x, (self.dim,), gain, bias, self.eps)

    def _of_parts(self, x: Tensor) -> Tensor:
        parts = x.view(*x.shape[:-1], self.parts, self.dim)
        if self.kind == "rmsnorm":
            normed = rms_norm(parts, torch.ones_like(self.gain[: self.dim]), self.eps)
        else:
            normed = F.layer_norm(parts, (self.dim,), eps=self.eps)
        normed = normed.flatten(-2)
        if self.kind != "layernorm_gainless":
            normed = normed * self.gain
        return normed + self.bias if self.kind == "layernorm" else normed
