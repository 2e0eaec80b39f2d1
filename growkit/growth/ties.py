"""Blocks of an AltUp stream that training cannot tell apart: the model is the same, gradients included, when the two
change places. Many blocks are then worth one."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch
from torch import Tensor

from growkit.growth.state import TrainState
from growkit.models.axes import AnyAxis, Axis, Product
from growkit.models.spec import param_specs

# Relative, of what the two have of a parameter's gradient. It is some 1e-3 of the whole where little reads them yet, so
# that float32 leaves 1e-5 of it; blocks that are mixed differently are apart by 1e-2 or more.
TIED_GRADIENT = 1e-3
SWAPPED = frozenset({"blocks", "parts"})


class Ties:
    """``pairs``: those that no parameter that was looked at tells apart. A block that a layer works on is told apart by
    that; and there are none where a parameter of the blocks is not among those ``seen``."""

    def __init__(self, state: TrainState, seen: Collection[str]) -> None:
        stream, self._specs = state.config.stream, param_specs(state.config)
        self.pairs: set[tuple[int, int]] = set()
        mine = (name for name, spec in self._specs.items() if any(axis.names & SWAPPED for axis in spec.axes))
        if stream is not None and all(name in seen for name in mine):
            idle = set(range(stream.blocks)) - {layer.block for layer in state.config.layers}
            self.pairs = set(itertools.combinations(sorted(idle), 2))

    def look(self, name: str, value: Tensor, gradient: Tensor) -> None:
        """Drops the pairs of which this parameter is another one after they have changed places."""
        axes = self._specs[name].axes
        if self.pairs and any(axis.names & SWAPPED for axis in axes):
            self.pairs = {pair for pair in self.pairs if _same(value, gradient, axes, pair)}


def _same(value: Tensor, gradient: Tensor, axes: tuple[AnyAxis, ...], pair: tuple[int, int]) -> bool:
    swapped, turned, theirs = value, gradient, torch.zeros((), dtype=torch.bool, device=value.device)
    for dim, axis in enumerate(axes):
        order = torch.tensor(_order(axis, pair), device=value.device)
        swapped, turned = swapped.index_select(dim, order), turned.index_select(dim, order)
        moved = order != torch.arange(len(order), device=value.device)
        theirs = theirs | moved.view(-1, *[1] * (value.dim() - 1 - dim))
    apart, size = (turned - gradient).norm(), (gradient * theirs).norm()
    return torch.equal(swapped, value) and bool(apart <= TIED_GRADIENT * size)


def _order(axis: AnyAxis, pair: tuple[int, int]) -> list[int]:
    """The indices of ``axis`` after the pair has changed places; a single part is every block's."""
    if isinstance(axis, Axis):
        a, b = pair
        swaps = axis.name in SWAPPED and axis.size > b
        return [{a: b, b: a}.get(i, i) if swaps else i for i in range(axis.size)]
    result = [0]
    for factor in axis.axes if isinstance(axis, Product) else ():
        result = [base * factor.size + i for base in result for i in _order(factor, pair)]
    return result if isinstance(axis, Product) else list(range(axis.size))
