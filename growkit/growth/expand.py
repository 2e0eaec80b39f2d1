"""Laying a tensor into a larger one along its named axes: the arithmetic shared by weights and moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from growkit.growth.state import Moments
from growkit.models.axes import NEW, AnyAxis, Axis, Placement, index_map

if TYPE_CHECKING:
    from torch import Tensor


def expand(
    old: Tensor, old_axes: Sequence[AnyAxis], into: Tensor, axes: Sequence[AnyAxis], placement: Placement | None = None
) -> Tensor:
    """Writes ``old`` to its places in ``into`` (shape of ``axes``) and returns ``into``; the rest stays as it was.
    Leading axes that ``old`` has not (experts, of what was one block) are of size 1 there."""
    import torch

    for axis in reversed(axes[: len(axes) - len(old_axes)]):
        assert isinstance(axis, Axis), axis
        old, old_axes = old[None], (Axis(axis.name, 1), *old_axes)
    last = len(axes) - 1
    places, held = [], []  # one index tensor per dimension, broadcast: rows × columns is never written out
    for dim, (a, b) in enumerate(zip(old_axes, axes, strict=True)):
        index = torch.tensor(index_map(a, b, placement), device=into.device)
        place = (index != NEW).nonzero()
        places.append(place.view(-1, *[1] * (last - dim)))
        held.append(index[place].view(-1, *[1] * (last - dim)))
    into[tuple(places)] = old[tuple(held)].to(into.dtype)
    return into


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
    import torch

    shape = tuple(axis.size for axis in axes)

    def laid(tensor: Tensor) -> Tensor:
        return expand(tensor, old_axes, tensor.new_zeros(shape), axes, placement)

    carried = laid(torch.ones_like(old.exp_avg_sq)) != 0
    exp_avg_sq = laid(old.exp_avg_sq) * (gradient**2 if squared is None else squared)
    mean = exp_avg_sq[carried].mean()
    return Moments(laid(old.exp_avg) * gradient, torch.where(carried, exp_avg_sq, mean), old.step)
