"""What growth takes and gives: a configuration, its tensors, their optimizer moments, and when each was born."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from growkit.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one parameter; ``step`` counts its updates."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float


@dataclass(frozen=True)
class TrainState:
    """``params`` and ``moments`` are keyed alike; a parameter that was never updated has no moments.

    ``born``: the stage in which a parameter appeared; absent means the first. Mappings may be lazy (read from disk, or
    grown on demand), so hold one tensor at a time where it matters.
    """

    config: ModelConfig
    params: Mapping[str, Tensor]
    moments: Mapping[str, Moments] = field(default_factory=dict)
    born: Mapping[str, int] = field(default_factory=dict)

    def materialized(self) -> TrainState:
        """The same with every tensor in memory."""
        return TrainState(self.config, dict(self.params), dict(self.moments), self.born)
