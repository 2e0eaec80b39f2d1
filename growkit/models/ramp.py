"""Masks that are ramped from 0 to 1 while a model trains on (Masked Structural Growth, arXiv 2305.02869, section 3.2):
what is new may start arbitrary, since nothing of it is seen at first.

Where the ramp is belongs to the configuration (``ModelConfig.ramp``), and so does what is under it. Modules without
anything under it have no mask at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from growkit.models.config import Attention, ModelConfig


class Ramp(nn.Module):
    """Numbers that go from ``start`` to ``end`` in a straight line: ``now`` = (1 − ramp) · start + ramp · end, which is
    either of them exactly at 0 and 1.

    Called, it multiplies the last axis of its input by them. ``now`` is a buffer, so that it moves with the model and a
    compiled graph reads it anew; float64, so that a float64 model has τ to the last digit; in no state dict, since the
    configuration says it.
    """

    now: Tensor

    def __init__(self, start: Sequence[float], end: Sequence[float], ramp: float) -> None:
        super().__init__()
        # The device is said, so that they are real in a model that is laid out on the meta device.
        self._start, self._end = (torch.tensor(side, dtype=torch.float64, device="cpu") for side in (start, end))
        self.register_buffer("now", torch.empty_like(self._end), persistent=False)
        self.set(ramp)

    def set(self, ramp: float) -> None:
        """Moves ``now``, in place, to where ``ramp`` in 0..1 has it."""
        self.now.copy_((1 - ramp) * self._start + ramp * self._end)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.now.to(x.dtype)


def mask(steady: Sequence[bool], ramp: float) -> Ramp:
    """1 where ``steady``, the ramp elsewhere."""
    return Ramp([float(stays) for stays in steady], [1.0] * len(steady), ramp)


def stream_mask(config: ModelConfig, *, ramped: bool = False, parts: int = 1) -> Ramp | None:
    """Of what is written to the residual stream, (parts × embed_dim,): new dimensions, and of a ``ramped`` layer all of
    them. None where nothing is under the ramp."""
    if config.steady_dim is None and not ramped:
        return None
    steady = 0 if ramped else config.steady_dim or 0
    return mask([i < steady for i in range(config.embed_dim)] * parts, config.ramp)


def head_mask(spec: Attention, ramp: float) -> Ramp | None:
    """Of what the heads give out, (heads × head_dim,): new heads lie behind the old ones of their kv group, new groups
    behind the old groups."""
    if spec.steady_heads is None:
        return None
    heads, groups = spec.steady_heads
    old, size = heads // groups, spec.num_heads // spec.num_kv_heads
    stays = [head // size < groups and head % size < old for head in range(spec.num_heads)]
    return mask([steady for steady in stays for _ in range(spec.head_dim)], ramp)
