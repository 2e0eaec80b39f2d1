"""How far a run is. Ours, not the trainer's: it is what a checkpoint holds and what every metric is logged against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from growkit.schedule.decisions import Decision


@dataclass(frozen=True)
class Progress:
    """``stage_step``: optimizer steps done in ``stage``. ``tokens``, ``flops``: over all stages and processes.
    ``data``: the state of the data after the last step, of which ``cursor``, the tokens read, is a part, and that of a
    bandit, if any; empty before the first. ``micro_batch_size``: of the current stage, when memory made it smaller than
    planned. ``decisions``: what the run decided, in order, which the schedule follows from."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int | None = None
    decisions: tuple[Decision, ...] = ()

    @property
    def cursor(self) -> int:
        return int(self.data.get("cursor", 0))
