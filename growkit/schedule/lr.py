"""Learning rates as pure functions of the step within a stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LR_BY = ("steps", "tokens")


@dataclass(frozen=True)
class LRSchedule:
    """Warm-up from ``start`` to ``peak``, then constant, cosine, or WSD (constant, then a linear fall to ``final``
    over the last ``decay_steps``; arXiv 2404.06395). Steps count from 0 within the stage."""

    kind: str
    start: float
    peak: float
    final: float
    steps: int
    warmup_steps: int
    decay_steps: int

    def lr(self, step: int, done: Callable[[int], float] = lambda steps: steps) -> float:
        """The rate of optimizer step ``step`` (0 ≤ step < steps). ``done``: how far the first n of ``steps`` steps are,
        from 0 to ``steps``, where they are not alike; after the warm-up, the rate goes by it."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * (step + 1) / self.warmup_steps
        if self.kind == "cosine":
            warm = done(self.warmup_steps)
            share = (done(step + 1) - warm) / max(1, self.steps - warm)
            return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * share)) / 2
        left = self.steps - done(step)
        if self.kind == "wsd" and left <= self.decay_steps:
            return self.final + (self.peak - self.final) * left / (self.decay_steps + 1)
        return self.peak

    @property
    def last(self) -> float:
        """The rate of the last step, if all steps are alike."""
        return self.lr(self.steps - 1)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear 0 → 1 over ``warmup_steps`` for parameters that are new in the stage."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
