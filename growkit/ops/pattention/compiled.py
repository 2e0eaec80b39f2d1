"""Pattention as a few torch calls: fast in eager mode, and transparent to Inductor (nothing here breaks a graph).

Norms are taken in float32 under bf16 autocast, as the reference does. In eager training with the default Θ, all banks
of all projections of one x run as one product with a backward pass of its own (``_NormGelu``): at small widths calls
and elementwise passes cost more than the products. Elsewhere the plain formula stands: torch.compile fuses it, and
decoding would pay for bringing the keys together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from growkit.ops.pattention.reference import NORM_FLOOR, Tokens


def pattention(x_TD: Tensor, projections: Sequence[Tokens]) -> list[Tensor]:
    """Same signature and meaning as ``reference.pattention``."""
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if plain or any(tokens.theta != "l2_norm_gelu" for tokens in projections):
        return [_formula(x_TD, tokens) for tokens in projections]
    dtype = x_TD.dtype
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
    layout, keys, values = _Layout(), [], []
    for tokens in projections:
        layout.add(tokens)
        keys += [k.to(dtype) for k in tokens.keys]
        values += [v.to(dtype) for v in tokens.values]
    flat = x_TD.to(dtype).reshape(-1, x_TD.shape[-1])
    with torch.autocast(x_TD.device.type, enabled=False):
        outputs = _NormGelu.apply(flat, layout, *keys, *values)  # type: ignore[no-untyped-call]
    return [out.view(*x_TD.shape[:-1], -1) for out in outputs]


def _formula(x: Tensor, tokens: Tokens) -> Tensor:
    out: Tensor | None = None
    for keys, values, tau in tokens.groups():
        a = F.linear(x, _joined(keys))
        part = F.linear(_activation(a, tokens.theta, tau), _joined(values).T)
        out = part if out is None else out + part
    assert out is not None
    return out


def _activation(a: Tensor, theta: str, tau: float | Tensor) -> Tensor:
    if theta == "l2_norm_gelu":
        return F.gelu(a * _scale(_norm(a), tau, a.dtype))
    if theta == "gelu_l2_norm":
        g = F.gelu(a)
        return g * _scale(_norm(g), tau, g.dtype)
    return torch.softmax(a, -1) * tau


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _norm(a: Tensor) -> Tensor:
    """‖a‖₂ per row, accumulated and kept in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=dtype)


def _scale(norm: Tensor, tau: float | Tensor, dtype: torch.dtype) -> Tensor:
    """τ / norm, given back in the scores' dtype so that the product stays narrow; to the bit the same for a number and
    a tensor τ."""
    return (norm.clamp_min(NORM_FLOOR).reciprocal() * tau).to(dtype)


class _Layout:
    """Where things lie among the columns of the scores of all banks of all projections, side by side."""

    def __init__(self) -> None:
        self.banks: list[slice] = []  # columns of each bank
        self.norms: list[tuple[slice, float | Tensor]] = []  # columns under one norm, and its τ
        self.outputs: list[tuple[slice, slice]] = []  # columns of each projection, and which banks they are
        self.width = 0

    def add(self, tokens: Tokens) -> None:
        start, first = self.width, len(self.banks)
        for keys, _, tau in tokens.groups():
            begin = self.width
            for k in keys:
                self.banks.append(slice(self.width, self.width + len(k)))
                self.width += len(k)
            self.norms.append((slice(begin, self.width), tau))
        self.outputs.append((slice(start, self.width), slice(first, len(self.banks))))

    def under_one_norm(self, *tensors: Tensor) -> list[tuple[float | Tensor, tuple[Tensor, ...]]]:
        """(τ, views) for each norm; norms of one size and one τ are one view (T, norms, size)."""
        if len({(columns.stop - columns.start, tau) for columns, tau in self.norms}) == 1:
            return [(self.norms[0][1], tuple(t.view(len(t), len(self.norms), -1) for t in tensors))]
        return [(tau, tuple(t[:, columns] for t in tensors)) for columns, tau in self.norms]


class _NormGelu(torch.autograd.Function):
    """gelu(s) V, s = τ a / ‖a‖₂ per norm, a = x Kᵀ. Differentiated by hand: da = τ/‖a‖ · (ds − s (s·ds)/τ²).

    Rows whose norm is at the floor are scaled by a constant, so their projection term is dropped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: _Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        keys, values = tensors[: len(layout.banks)], tensors[len(layout.banks) :]
        s = F.linear(x, _joined(list(keys)))
        scales = []
        for tau, (part,) in layout.under_one_norm(s):
            scales.append(_scale(_norm(part), tau, s.dtype))
            part.mul_(scales[-1])
        g = F.gelu(s)
        ctx.layout = layout
        ctx.save_for_backward(x, s, g, *scales, *tensors)
        return tuple(torch.mm(g[:, columns], _joined(list(values[banks]))) for columns, banks in layout.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        x, s, g, *rest = ctx.saved_tensors
        count = len(layout.banks)
        scales, keys, values = rest[: -2 * count], rest[-2 * count : -count], rest[-count:]
        wanted_keys, wanted_values = ctx.needs_input_grad[2 : 2 + count], ctx.needs_input_grad[2 + count :]

        d_values: list[Tensor | None] = []
        ds = torch.empty_like(s)
        for grad, (columns, banks) in zip(grads, layout.outputs, strict=True):
            torch.mm(grad, _joined(values[banks]).T, out=ds[:, columns])
            d_values += _per_bank(g, grad, layout.banks[banks], wanted_values[banks])
        torch.ops.aten.gelu_backward.grad_input(ds, s, grad_input=ds)
        wide = torch.promote_types(s.dtype, torch.float32)
        for (tau, (part, d_part)), scale in zip(layout.under_one_norm(s, ds), scales, strict=True):
            along = torch.linalg.vecdot(part.to(wide), d_part.to(wide)).unsqueeze(-1) / tau**2
            along = along.masked_fill(scale >= _scale(along.new_zeros(1), tau, scale.dtype), 0).to(s.dtype)
            d_part.addcmul_(part, along, value=-1).mul_(scale)
        dx = torch.mm(ds, _joined(keys)) if ctx.needs_input_grad[0] else None
        return dx, None, *_per_bank(ds, x, layout.banks, wanted_keys), *d_values


def _per_bank(columns_of: Tensor, rows: Tensor, banks: list[slice], wanted: Sequence[bool]) -> list[Tensor | None]:
    """``columns_ofᵀ rows`` for the columns of each bank; None for a bank that stands still."""
    if all(wanted):
        whole = torch.mm(columns_of[:, banks[0].start : banks[-1].stop].T, rows)
        return list(torch.split(whole, [bank.stop - bank.start for bank in banks]))
    return [torch.mm(columns_of[:, bank].T, rows) if want else None for bank, want in zip(banks, wanted, strict=True)]
