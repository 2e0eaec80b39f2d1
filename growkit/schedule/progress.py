"""How far a run is. Ours, not the trainer's: it is what a checkpoint holds and what every metric is logged against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``stage_step``: optimizer steps done in ``stage``. ``tokens``, ``flops``: over all stages and processes.
    ``cursor``: the token stream's position after the last step. ``micro_batch_size``: of the current stage, when memory
    made it smaller than planned."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    cursor: int = 0
    micro_batch_size: int | None = None
