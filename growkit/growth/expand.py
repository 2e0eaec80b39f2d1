"""Laying a tensor into a larger one along its named axes: the arithmetic shared by weights and moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from growkit.growth.state import Moments
from growkit.models.axes import AnyAxis, Placement, index_map

if TYPE_CHECKING:
    from torch import Tensor


def expand(
    old: Tensor, old_axes: Sequence[AnyAxis], into: Tensor, axes: Sequence[AnyAxis], placement: Placement | None = None
) -> Tensor:
    """Writes ``old`` to its places in ``into`` (shape of ``axes``) and returns ``into``; the rest stays as it was."""
    import torch

    last = len(axes) - 1
    index = tuple(  # one index tensor per dimension, broadcast against each other: rows × columns is never written out
        torch.tensor(index_map(a, b, placement), device=into.device).view(-1, *[1] * (last - dim))
        for dim, (a, b) in enumerate(zip(old_axes, axes, strict=True))
    )
    into[index] = old.to(into.dtype)
    return into


def expand_moments(
    old: Moments,
    old_axes: Sequence[AnyAxis],
    axes: Sequence[AnyAxis],
    *,
    scale: float = 1.0,
    placement: Placement | None = None,
) -> Moments:
    """Moments of an expanded parameter whose old entries were multiplied by ``scale``.

    A weight times c has its gradient times 1/c, so exp_avg goes by 1/c and exp_avg_sq by 1/c². New entries: exp_avg 0,
    exp_avg_sq the old mean. At an old step count Adam corrects nothing, so a zero exp_avg_sq would make the first
    update (1−β1)/√(1−β2) × lr (3.2 × at β2 = 0.999); seeded with the mean, new entries move at the old ones' pace.
    """
    shape = tuple(axis.size for axis in axes)
    exp_avg = old.exp_avg.new_zeros(shape)
    exp_avg_sq = old.exp_avg_sq.new_zeros(shape).fill_(float(old.exp_avg_sq.mean()) / scale**2)
    return Moments(
        expand(old.exp_avg / scale, old_axes, exp_avg, axes, placement),
        expand(old.exp_avg_sq / scale**2, old_axes, exp_avg_sq, axes, placement),
        old.step,
    )
