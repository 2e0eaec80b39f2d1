"""Laying a tensor into a larger one along its named axes: the arithmetic shared by weights and moments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from growkit.growth.state import Moments
from growkit.models.axes import NEW, AnyAxis, Axis, Placement, index_map

if TYPE_CHECKING:
    from torch import Tensor


# Blocks of an expansion that are copied one by one; beyond, entries are gathered by index, at twice the memory.
MOST_BLOCKS = 4096


def expand(
    old: Tensor, old_axes: Sequence[AnyAxis], into: Tensor, axes: Sequence[AnyAxis], placement: Placement | None = None
) -> Tensor:
    """Writes ``old`` to its places in ``into`` (shape of ``axes``) and returns ``into``; the rest stays as it was.
    Leading axes that ``old`` has not (experts, of what was one block) are of size 1 there."""
    import torch

    old_axes = aligned(old_axes, axes)
    old = old.reshape(_sizes(old_axes))
    maps = index_maps(old_axes, axes, placement)
    runs = [_runs(held) for held in maps]
    if math.prod(map(len, runs)) <= MOST_BLOCKS:
        for block in itertools.product(*runs):
            into[tuple(slice(to, to + size) for to, _, size in block)] = old[
                tuple(slice(at, at + size) for _, at, size in block)
            ]
        return into
    last = len(axes) - 1
    places, sources = [], []  # one index tensor per dimension, broadcast: rows × columns is never written out
    for dim, held in enumerate(maps):
        index = torch.tensor(held, device=into.device)
        place = (index != NEW).nonzero()
        places.append(place.view(-1, *[1] * (last - dim)))
        sources.append(index[place].view(-1, *[1] * (last - dim)))
    into[tuple(places)] = old[tuple(sources)].to(into.dtype)
    return into


def aligned(old_axes: Sequence[AnyAxis], axes: Sequence[AnyAxis]) -> list[AnyAxis]:
    """``old_axes`` with those before them that they have not (experts, of what was one block), of size 1."""
    missing = axes[: len(axes) - len(old_axes)]
    assert all(isinstance(axis, Axis) for axis in missing), missing
    return [*(Axis(axis.name, 1) for axis in missing if isinstance(axis, Axis)), *old_axes]


def _sizes(axes: Sequence[AnyAxis]) -> list[int]:
    return [axis.size for axis in axes]


def index_maps(
    old_axes: Sequence[AnyAxis], axes: Sequence[AnyAxis], placement: Placement | None = None
) -> list[list[int]]:
    """For each dimension, what every index of it holds (axes.index_map)."""
    return [index_map(a, b, placement) for a, b in zip(old_axes, axes, strict=True)]


def _runs(held: Sequence[int]) -> list[tuple[int, int, int]]:
    """(place, old index, length) of each stretch along which the old indices count up by one."""
    runs: list[tuple[int, int, int]] = []
    for place, old in enumerate(held):
        if old == NEW:
            continue
        if runs and (place, old) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((place, old, 1))
    return runs


def expand_moments(
    old: Moments,
    old_axes: Sequence[AnyAxis],
    axes: Sequence[AnyAxis],
    *,
    gradient: float = 1.0,
    squared: float | None = None,
    placement: Placement | None = None,
) -> Moments:
    """Moments of an expanded parameter whose old entries have their gradient times ``gradient`` now. ``squared``: what
    the gradient's square is multiplied by, None if that is gradient².

    A weight times c that computes the same has its gradient times 1/c; exp_avg goes with the gradient, exp_avg_sq with
    its square. New entries: exp_avg 0, exp_avg_sq the mean of the old ones'. At an old step count Adam corrects
    nothing, so a zero exp_avg_sq would make the first update (1−β1)/√(1−β2) × lr (3.2 × at β2 = 0.999); seeded with the
    mean, new entries move at the old ones' pace.
    """
    shape = _sizes(axes)
    exp_avg = expand(old.exp_avg, old_axes, old.exp_avg.new_zeros(shape), axes, placement).mul_(gradient)
    scaled = old.exp_avg_sq * (gradient**2 if squared is None else squared)
    maps = index_maps(aligned(old_axes, axes), axes, placement)
    seeded = scaled.new_empty(shape).fill_(_copies(scaled.reshape(_sizes(aligned(old_axes, axes))), maps).mean())
    exp_avg_sq = expand(scaled, old_axes, seeded, axes, placement)
    return Moments(exp_avg, exp_avg_sq, old.step)


def _copies(old: Tensor, maps: Sequence[Sequence[int]]) -> Tensor:
    """What the larger tensor holds of ``old`` without the places between: clones as often as they are there."""
    import torch

    for dim, held in enumerate(maps):
        kept = [index for index in held if index != NEW]
        if kept != list(range(old.shape[dim])):
            old = old.index_select(dim, torch.tensor(kept, device=old.device))
    return old
