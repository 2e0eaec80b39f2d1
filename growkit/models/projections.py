"""The dense maps inside a layer: linear, or attention over parameter tokens.

Legend: B batch, T tokens, D embed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.models.config import Pattention, Projection
from growkit.models.ramp import Ramp, mask
from growkit.ops.pattention import Tokens, pattention


class LinearProjection(nn.Module):
    def __init__(self, inp: int, out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inp))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PattentionProjection(nn.Module):
    """Banks of parameter tokens, each its own pair of parameters: ``keys.g`` (n_g, in), ``values.g`` (n_g, out)."""

    def __init__(self, spec: Pattention, inp: int, out: int, backend: str, ramp: float) -> None:
        super().__init__()
        self.spec, self.op = spec, pattention(backend)
        self.keys = nn.ParameterList(nn.Parameter(torch.empty(n, inp)) for n in spec.banks)
        self.values = nn.ParameterList(nn.Parameter(torch.empty(n, out)) for n in spec.banks)
        self.bank_mask = mask([False], ramp) if spec.steady_banks is not None else None
        self.tau = Ramp(spec.tau_from, spec.taus, ramp) if spec.tau_from is not None else None

    def tokens(self) -> Tokens:
        spec, values = self.spec, list(self.values)
        if self.bank_mask is not None:  # on the values: what a bank adds to the sum is linear in them, whatever Θ is
            share = self.bank_mask.now[0]
            values[spec.steady_banks :] = [v * share for v in values[spec.steady_banks :]]
        taus: list[float | Tensor] = [*spec.taus] if self.tau is None else [*self.tau.now.unbind()]
        return Tokens(list(self.keys), values, taus, spec.theta, spec.scope)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, [self.tokens()])[0]


def projection(spec: Projection, inp: int, out: int, backend: str, ramp: float) -> nn.Module:
    if isinstance(spec, Pattention):
        return PattentionProjection(spec, inp, out, backend, ramp)
    return LinearProjection(inp, out, spec.bias)


def project(projections: list[nn.Module], x: Tensor) -> list[Tensor]:
    """Each projection of one x; those made of parameter tokens go through their op together."""
    pattentions = [p for p in projections if isinstance(p, PattentionProjection)]
    together = iter(pattentions[0].op(x, [p.tokens() for p in pattentions]) if pattentions else [])
    return [next(together) if isinstance(p, PattentionProjection) else p(x) for p in projections]
