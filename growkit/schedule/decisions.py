"""What a run decided for itself, written down so that it is never decided again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

CANDIDATES = "candidates"  # by what a stage's growth was chosen
NONE = "none"  # what is chosen where not growing is best


@dataclass(frozen=True)
class Decision:
    """``by``: the kind of trigger that ended the stage, or CANDIDATES of a choice at its start. ``stage``, ``name``: of
    the stage. ``stage_step``: steps of it that were done; ``step``, ``tokens``, ``flops``: of the run then.
    ``evidence``: the numbers that said so, plain JSON. ``chosen``: which candidate, or NONE. ``probe_flops``,
    ``probe_tokens``: spent on the choice; ``flops`` has the first, ``tokens`` not the second."""

    by: str
    stage: int
    name: str
    stage_step: int
    step: int
    tokens: int
    flops: float
    evidence: Mapping[str, Any] = field(default_factory=dict)
    chosen: str | None = None
    probe_flops: float = 0.0
    probe_tokens: int = 0


def end_of(decisions: Iterable[Decision], stage: int) -> int | None:
    """The step of ``stage`` at which a trigger ended it; None if none did."""
    return next((made.stage_step for made in decisions if made.stage == stage and made.by != CANDIDATES), None)


def choice_of(decisions: Iterable[Decision], stage: int) -> Decision | None:
    """The choice among the candidates of ``stage``; None before it."""
    return next((made for made in decisions if made.stage == stage and made.by == CANDIDATES), None)


def decided(record: Mapping[str, Any]) -> str:
    """Of a record of the log, or an entry of a lineage; what it lacks is left out."""
    by, evidence = record.get("by"), record.get("evidence") or {}
    if by == CANDIDATES:
        tried = {name: (way or {}).get("loss") for name, way in (evidence.get("candidates") or {}).items()}
        best_first = sorted(tried.items(), key=lambda way: (way[1] is None, way[1] or 0.0, way[0]))
        losses = ", ".join(f"{name} {_nats([loss])}" for name, loss in best_first)
        return f"{record.get('name')} chose {record.get('chosen')}: held-out nats after the probe: {losses}"
    why = f"{by}"
    if by == "plateau" and (falls := evidence.get("falls")):
        why = f"plateau: the loss fell by {_nats(falls)} nats from window to window"
    elif by == "crossing" and (predicted := evidence.get("predicted")):
        both = f"{_nats([predicted.get('grown')])} grown, {_nats([predicted.get('as it is')])} as it is"
        why = f"crossing: at equal FLOPs the loss is predicted to be {both}"
    return f"{record.get('name')} ended after {record.get('stage_step')} steps by {why}"


def _nats(values: list[Any]) -> str:
    return ", ".join(f"{value:.4g}" if isinstance(value, int | float) else "–" for value in values)
