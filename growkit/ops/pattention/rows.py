"""What is elementwise in Pattention's compiled path, for some rows of scores at a time:

    s = τ a / ‖a‖₂ per norm,  g = gelu(s);   da = τ/‖a‖ · (ds − s (s·ds)/τ²),  ds = dg ⊙ gelu'(s).

Rows whose norm is at the floor are scaled by a constant, so their projection term is dropped.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from growkit.ops.pattention.reference import NORM_FLOOR, Tokens


class Layout:
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

    def under_one_norm(
        self, scales: Tensor, *tensors: Tensor
    ) -> list[tuple[float | Tensor, Tensor, tuple[Tensor, ...]]]:
        """(τ, views of the scales (T, norms), views of the tensors) for each norm; norms of one size and one τ are one
        view (T, norms, size)."""
        if len({(columns.stop - columns.start, tau) for columns, tau in self.norms}) == 1:
            views = tuple(t.view(len(t), len(self.norms), t.shape[1] // len(self.norms)) for t in tensors)
            return [(self.norms[0][1], scales.unsqueeze(-1), views)]
        return [
            (tau, scales[:, at : at + 1], tuple(t[:, columns] for t in tensors))
            for at, (columns, tau) in enumerate(self.norms)
        ]


class Rows(Protocol):
    """s, g, slope (C, n) in x's dtype; scales (C, norms), as ``scales`` makes them."""

    def scales(self, s: Tensor, norms: int) -> Tensor:
        """Room for τ/‖a‖ of all rows."""

    def forward(self, layout: Layout, s: Tensor, scales: Tensor, g: Tensor) -> None:
        """Scores in ``s`` become s; ``scales`` and ``g`` are filled."""

    def room(self, g: Tensor) -> Tensor | None:
        """For gelu'(s), where it is made together with g."""

    def weights(self, layout: Layout, s: Tensor, g: Tensor, slope: Tensor | None) -> None:
        """Fills ``g`` again, and ``slope``."""

    def backward(self, layout: Layout, s: Tensor, scales: Tensor, slope: Tensor | None, g: Tensor) -> None:
        """The gradient of gelu(s) in ``g`` becomes that of the scores."""


class TorchRows:
    """As torch calls: on a GPU, in float64, without a compiler."""

    def scales(self, s: Tensor, norms: int) -> Tensor:
        return s.new_empty(len(s), norms)

    def forward(self, layout: Layout, s: Tensor, scales: Tensor, g: Tensor) -> None:
        for tau, scale, (part,) in layout.under_one_norm(scales, s):
            part.mul_(scale.copy_(scale_of(norm(part), tau, s.dtype)))
        torch.ops.aten.gelu.out(s, out=g)

    def room(self, g: Tensor) -> None:
        return None

    def weights(self, layout: Layout, s: Tensor, g: Tensor, slope: Tensor | None) -> None:
        torch.ops.aten.gelu.out(s, out=g)

    def backward(self, layout: Layout, s: Tensor, scales: Tensor, slope: Tensor | None, g: Tensor) -> None:
        torch.ops.aten.gelu_backward.grad_input(g, s, grad_input=g)
        for tau, scale, (part, d_part) in layout.under_one_norm(scales, s, g):
            wide = torch.promote_types(s.dtype, torch.float32)
            along = torch.linalg.vecdot(part, d_part).to(wide).unsqueeze(-1) / tau**2  # summed in float32
            at_floor = scale >= scale_of(along.new_zeros(1), tau, scale.dtype)
            along = along.masked_fill(at_floor, 0).to(s.dtype)
            d_part.addcmul_(part, along, value=-1).mul_(scale)


def norm(a: Tensor) -> Tensor:
    """‖a‖₂ per row, accumulated and kept in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=dtype)


def scale_of(norm: Tensor, tau: float | Tensor, dtype: torch.dtype) -> Tensor:
    """τ / norm, given back in the scores' dtype so that the product stays narrow; to the bit the same for a number and
    a tensor τ."""
    return (norm.clamp_min(NORM_FLOOR).reciprocal() * tau).to(dtype)
