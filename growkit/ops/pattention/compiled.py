"""Pattention as a few torch calls: fast in eager mode, and transparent to Inductor (nothing here breaks a graph).

Norms are taken in float32 under bf16 autocast, as the reference does. In eager training with the default Θ, all banks
of all projections of one x run as one product with a backward pass of its own (``_NormGelu``): at small widths calls
and elementwise passes cost more than the products. It keeps the scaled scores, (T, n), and nothing else of that size:
what can be made from them is made again, for some rows at a time. Elsewhere the plain formula stands: torch.compile
fuses it, and decoding would pay for bringing the keys together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from growkit.ops.chunks import chunks
from growkit.ops.pattention import native
from growkit.ops.pattention.reference import Tokens
from growkit.ops.pattention.rows import Layout, Rows, TorchRows, norm, scale_of


def pattention(x_TD: Tensor, projections: Sequence[Tokens]) -> list[Tensor]:
    """Same signature and meaning as ``reference.pattention``."""
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if plain or any(tokens.theta != "l2_norm_gelu" for tokens in projections):
        return [_formula(x_TD, tokens) for tokens in projections]
    dtype = x_TD.dtype
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
    layout, keys, values = Layout(), [], []
    for tokens in projections:
        layout.add(tokens)
        keys += [k.to(dtype) for k in tokens.keys]
        values += [v.to(dtype) for v in tokens.values]
    flat = x_TD.to(dtype).reshape(-1, x_TD.shape[-1])
    with torch.autocast(x_TD.device.type, enabled=False):
        outputs = _NormGelu.apply(flat, layout, *keys, *values)  # type: ignore[no-untyped-call]
    return [out.view(*x_TD.shape[:-1], out.shape[-1]) for out in outputs]


def _formula(x: Tensor, tokens: Tokens) -> Tensor:
    out: Tensor | None = None
    for keys, values, tau in tokens.groups():
        a = F.linear(x, joined(keys))
        part = F.linear(_activation(a, tokens.theta, tau), joined(values).T)
        out = part if out is None else out + part
    assert out is not None
    return out


def _activation(a: Tensor, theta: str, tau: float | Tensor) -> Tensor:
    if theta == "l2_norm_gelu":
        return F.gelu(a * scale_of(norm(a), tau, a.dtype))
    if theta == "gelu_l2_norm":
        g = F.gelu(a)
        return g * scale_of(norm(g), tau, g.dtype)
    return torch.softmax(a, -1) * tau


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def _rows_of(x: Tensor) -> Rows:
    """How the rows of x's scores are gone through: by the kernel where there is one."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in native.DTYPES  # a fake one has no memory
    return (native.kernel() if plain else None) or TorchRows()


class _NormGelu(torch.autograd.Function):
    """gelu(s) V, s = τ a / ‖a‖₂ per norm, a = x Kᵀ; differentiated by hand, see ``rows``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        keys, values = tensors[: len(layout.banks)], tensors[len(layout.banks) :]
        side_by_side = [joined(values[banks]) for _, banks in layout.outputs]
        outputs = tuple(x.new_empty(len(x), v.shape[1]) for v in side_by_side)
        together, through = joined(keys).T, _rows_of(x)
        s = x.new_empty(len(x), layout.width)
        scales = through.scales(s, len(layout.norms))
        several = chunks(len(x), s.element_size() * layout.width, x.is_cuda)
        work = torch.empty_like(s[several[0]])
        for rows in several:
            part_s, g = torch.mm(x[rows], together, out=s[rows]), work[: rows.stop - rows.start]
            through.forward(layout, part_s, scales[rows], g)
            for out, v, (columns, _) in zip(outputs, side_by_side, layout.outputs, strict=True):
                torch.mm(g[:, columns], v, out=out[rows])
        ctx.layout, ctx.through = layout, through
        ctx.save_for_backward(x, s, scales, *tensors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        through: Rows = ctx.through
        x, s, scales, *tensors = ctx.saved_tensors
        count = len(layout.banks)
        keys = joined(tensors[:count])
        values = [joined(tensors[count:][banks]).T for _, banks in layout.outputs]
        several = chunks(len(x), s.element_size() * layout.width, x.is_cuda)
        d_keys = _Sums(layout.banks, ctx.needs_input_grad[2 : 2 + count], len(several))
        d_values = _Sums(layout.banks, ctx.needs_input_grad[2 + count :], len(several))
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        work = torch.empty_like(s[several[0]])
        slope = through.room(work)
        for rows in several:
            part_s, ds = s[rows], work[: rows.stop - rows.start]
            through.weights(layout, part_s, ds, slope)
            for grad, (_, banks) in zip(grads, layout.outputs, strict=True):
                d_values.add(ds, grad[rows], banks)
            for grad, v, (columns, _) in zip(grads, values, layout.outputs, strict=True):
                torch.mm(grad[rows], v, out=ds[:, columns])
            through.backward(layout, part_s, scales[rows], slope, ds)
            d_keys.add(ds, x[rows], slice(0, count))
            if dx is not None:
                torch.mm(ds, keys, out=dx[rows])
        return dx, None, *d_keys.each(x.dtype), *d_values.each(x.dtype)


class _Sums:
    """Gradients of banks, each a sum over chunks of rows; None for a bank that stands still. More than two narrow
    numbers are summed in float32; two are anyway, and rounded once."""

    def __init__(self, banks: list[slice], wanted: Sequence[bool], chunks: int) -> None:
        self.banks, self.wanted, self.chunks = banks, wanted, chunks
        self.found: dict[tuple[int, int], Tensor] = {}  # by the columns that one product has

    def add(self, columns_of: Tensor, rows: Tensor, which: slice) -> None:
        """``columns_ofᵀ rows`` for the columns of the banks ``which``."""
        banks, wanted = self.banks[which], self.wanted[which]
        spans = [(bank.start, bank.stop) for bank, want in zip(banks, wanted, strict=True) if want]
        if all(wanted):
            spans = [(banks[0].start, banks[-1].stop)]
        for span in spans:
            left = columns_of[:, slice(*span)].T
            if span not in self.found:
                self.found[span] = torch.mm(left, rows)
                continue
            total = self.found[span]
            if total.dtype in (torch.float32, torch.float64) and total.dtype == rows.dtype:
                total.addmm_(left, rows)
            elif self.chunks == 2:
                total.add_(torch.mm(left, rows))
            else:
                self.found[span] = total.to(torch.float32).add_(torch.mm(left, rows))

    def each(self, dtype: torch.dtype) -> list[Tensor | None]:
        for span in list(self.found):  # the wide one goes when the narrow one is there
            self.found[span] = self.found.pop(span).to(dtype)
        return [self._of(bank) if want else None for bank, want in zip(self.banks, self.wanted, strict=True)]

    def _of(self, bank: slice) -> Tensor:
        ((start, total),) = [
            (start, total) for (start, stop), total in self.found.items() if start <= bank.start and bank.stop <= stop
        ]
        return total[bank.start - start : bank.stop - start]
