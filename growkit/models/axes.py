"""Every dimension of every parameter has a name: growth reads axes, never parameter names.

An ``Axis`` is a name and a size; a ``Product`` is several axes flattened row-major (heads × head_dim); a ``Concat``
is several laid one after the other (gate | up). ``index_map`` says which index of a smaller dimension each index of the
larger one holds: the one piece of arithmetic all dense growth rests on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

NAMES = (
    "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "experts", "param_tokens",
    "inner", "state", "dt_rank", "conv", "blocks", "parts", "routes", "taps",
)  # fmt: skip

# What a grown axis holds: axis name -> for each of its positions an old index, or NEW. Default: the old at the front.
Placement = Mapping[str, Sequence[int]]
NEW = -1


@dataclass(frozen=True)
class Axis:
    name: str
    size: int

    def __post_init__(self) -> None:
        assert self.name in NAMES, self.name

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.name})


@dataclass(frozen=True)
class Product:
    axes: tuple[Axis, ...]

    @cached_property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(axis.names for axis in self.axes))


@dataclass(frozen=True)
class Concat:
    parts: tuple[Axis | Product, ...]

    @cached_property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(part.names for part in self.parts))


AnyAxis = Axis | Product | Concat


def index_map(old: AnyAxis, new: AnyAxis, placement: Placement | None = None) -> list[int]:
    """For every index of ``new`` the index of ``old`` that it holds, or NEW (same structure, sizes no smaller).

    An ``Axis`` keeps its indices at the front unless ``placement`` says otherwise, and every old index is held at least
    once: more often, if it is cloned. In a ``Product`` the maps of the factors combine row-major; in a ``Concat`` each
    part keeps to itself. Where there was an ``Axis`` and a ``Product`` with it has taken its place, the other factors
    were of size 1.
    """
    placement = placement or {}
    if isinstance(old, Axis) and isinstance(new, Product):
        assert old.name in new.names, (old, new)
        old = Product(tuple(old if axis.name == old.name else Axis(axis.name, 1) for axis in new.axes))
    if isinstance(old, Axis) and isinstance(new, Axis):
        assert old.name == new.name and old.size <= new.size, (old, new)
        front = [*range(old.size), *[NEW] * (new.size - old.size)]
        held = list(placement.get(old.name, front)) if old.size != new.size else front
        assert len(held) == new.size and set(held) - {NEW} == set(range(old.size)), (old, new, placement)
        return held
    if isinstance(old, Product) and isinstance(new, Product):
        result = [0]
        for factor_old, factor_new in zip(old.axes, new.axes, strict=True):
            factor = index_map(factor_old, factor_new, placement)
            result = [NEW if NEW in (base, i) else base * factor_old.size + i for base in result for i in factor]
        return result
    assert isinstance(old, Concat) and isinstance(new, Concat), (old, new)
    result, offset = [], 0
    for part_old, part_new in zip(old.parts, new.parts, strict=True):
        result += [NEW if i == NEW else offset + i for i in index_map(part_old, part_new, placement)]
        offset += part_old.size
    return result
