"""What a run tells about itself, read in one pass and without torch: measurements as columns, events as records."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from growkit.checkpoint.metrics_log import Record, read_log
from growkit.errors import ConfigError

AXES = {"flops": "FLOPs", "tokens": "tokens", "seconds": "seconds"}
PLACE = ("step", "tokens", "flops", "seconds")
MEASURED = (
    "loss",
    "bits_per_byte",
    "lr",
    "grad_norm",
    "new_grad_share",
    "ramp",
    "context_length",
    "window",
    "prediction_gain",
    "tokens_per_second",
    "utilisation",
    "memory_bytes",
)
NORM = "grad_norm."  # a column for each component of the gradient's norm
LIKELY = "arm_probability."  # a column for each arm of a bandit
PARTED = {NORM: "grad_norms", LIKELY: "arm_probabilities"}  # columns: the field that holds a number for each

Column = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """``steps``: column → one value for each logged step, NaN where the log has none; PLACE, MEASURED,
    ``grad_norm.COMPONENT`` and ``arm_probability.ARM``. ``events``: the records of every other kind, in order."""

    name: str
    steps: Mapping[str, Column]
    events: tuple[Record, ...]

    @classmethod
    def of(cls, name: str, records: Iterable[Mapping[str, Any]]) -> History:
        """Takes records one at a time, so that a log of millions of lines becomes a few columns."""
        columns = {key: array("d") for key in (*PLACE, *MEASURED)}
        rows = [(key, columns[key].append) for key in columns]
        events = []
        count = 0
        for record in records:
            if record["kind"] != "step":
                events.append(dict(record))
                continue
            for key, append in rows:
                append(number(record.get(key)))
            for prefix, field in PARTED.items():
                parts = record.get(field)
                for part, value in parts.items() if isinstance(parts, dict) else ():
                    column = columns.setdefault(prefix + part, array("d"))
                    column.extend([math.nan] * (count - len(column)))  # a part that came later
                    column.append(number(value))
            count += 1
        for column in columns.values():
            column.extend([math.nan] * (count - len(column)))
        return cls(name, {key: np.array(column) for key, column in columns.items()}, tuple(events))

    @classmethod
    def read(cls, name: str, log: Path) -> History:
        """Raises CheckpointError for a log that is damaged or cannot be read."""
        return cls.of(name, read_log(log))

    def kind(self, kind: str) -> list[Record]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def place(self) -> dict[str, float | None]:
        """Where the run is by its log: step, tokens, FLOPs, seconds; None for what is not known."""
        at = dict.fromkeys(PLACE, math.nan)
        if len(self.steps["step"]):
            at = {key: float(self.steps[key][-1]) for key in PLACE}
        for event in self.events:
            at = {key: float(np.fmax(at[key], number(event.get(key)))) for key in PLACE}
        return {key: finite(value) for key, value in at.items()}

    def validations(self, x: str) -> tuple[Column, Column]:
        """Validation in bits per byte over ``x``, ascending; what has no ``x`` is left out."""
        points = [(number(r.get(x)), number(r.get("bits_per_byte"))) for r in self.kind("validation")]
        last = {at: value for at, value in points if math.isfinite(at) and math.isfinite(value)}
        ordered = sorted(last.items())
        return np.array([at for at, _ in ordered]), np.array([value for _, value in ordered])


def number(value: Any) -> float:
    """A measurement as a float; NaN for null and for what is no number."""
    if type(value) is float:
        return value
    return float(value) if type(value) is int and abs(value) < 1e300 else math.nan


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def labels(paths: Iterable[Path]) -> list[str]:
    """A name for each run: its folder's, with as many parents as tell it from the others. Raises ConfigError for a run
    that is there twice."""
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            mend = "name every run once"
            raise ConfigError("same-run", "is named twice", key="runs", value=str(path), mend=mend)
    depth = 1
    names = [path.name for path in whole]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in whole]
    return names


def smoothed(values: Column, width: int) -> Column:
    """Mean over the last ``width`` values that are there, fewer at the start; NaN where none is."""
    there = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(there, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(there)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    count = counts[end] - counts[start]
    return np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)


def kept(values: Column, most: int) -> NDArray[np.int64]:
    """Indices of at most ``most`` values that draw the same curve: the lowest and the highest of each stretch, so that
    a spike of one step stays; the first and the last; NaNs left out."""
    there = np.flatnonzero(np.isfinite(values))
    if len(there) <= most:
        return there
    stretches = np.array_split(there[1:-1], (most - 2) // 2)
    ends = [(part[values[part].argmin()], part[values[part].argmax()]) for part in stretches]
    return np.unique(np.concatenate((there[:1], np.array(ends, dtype=np.int64).ravel(), there[-1:])))
