"""What a run decided for itself, written down so that it is never decided again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decision:
    """``by``: the kind of trigger that ended the stage. ``stage``, ``name``: of the stage. ``stage_step``: steps of it
    that were done; ``step``, ``tokens``, ``flops``: of the run then. ``evidence``: the numbers that said so, plain
    JSON."""

    by: str
    stage: int
    name: str
    stage_step: int
    step: int
    tokens: int
    flops: float
    evidence: Mapping[str, Any] = field(default_factory=dict)


def end_of(decisions: Iterable[Decision], stage: int) -> int | None:
    """The step of ``stage`` at which a trigger ended it; None if none did."""
    return next((made.stage_step for made in decisions if made.stage == stage), None)


def decided(record: Mapping[str, Any]) -> str:
    """Of a record of the log, or an entry of a lineage; what it lacks is left out."""
    by, evidence = record.get("by"), record.get("evidence") or {}
    why = f"{by}"
    if by == "plateau" and (falls := evidence.get("falls")):
        why = f"plateau: the loss fell by {_nats(falls)} nats from window to window"
    elif by == "crossing" and (predicted := evidence.get("predicted")):
        both = f"{_nats([predicted.get('grown')])} grown, {_nats([predicted.get('as it is')])} as it is"
        why = f"crossing: at equal FLOPs the loss is predicted to be {both}"
    return f"{record.get('name')} ended after {record.get('stage_step')} steps by {why}"


def _nats(values: list[Any]) -> str:
    return ", ".join(f"{value:.4g}" if isinstance(value, int | float) else "–" for value in values)
