"""Normalisations over the last axis: RMSNorm (arXiv 1910.07467) and LayerNorm with or without a gain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.models.config import Norm
from growkit.ops.elementwise import rms_norm


class Normalize(nn.Module):
    """x (…, dim) → the same shape and dtype; statistics in float32 at least."""

    def __init__(self, norm: Norm, dim: int) -> None:
        super().__init__()
        self.kind, self.eps, self.dim = norm.kind, norm.eps, dim
        if norm.kind != "layernorm_gainless":
            self.gain = nn.Parameter(torch.ones(dim))
        if norm.kind == "layernorm":
            self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return rms_norm(x, self.gain, self.eps)
        gain = self.gain if self.kind == "layernorm" else None
        bias = self.bias if self.kind == "layernorm" else None
        return F.layer_norm(x, (self.dim,), gain, bias, self.eps)
