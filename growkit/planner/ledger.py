"""Bytes alive over time: what a dry run of the model's code books instead of allocating. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """A stretch of a run, relative to its start: ``change`` of the bytes alive, and ``peak``, the most in between."""

    peak: float
    change: float


class Ledger:
    """Counts bytes. ``live``: alive now; ``peak``: the most so far."""

    def __init__(self) -> None:
        self.live = self.peak = 0.0

    def take(self, *sizes: float) -> None:
        for size in sizes:
            self.live += size
            self.peak = max(self.peak, self.live)

    def give(self, *sizes: float) -> None:
        self.live -= sum(sizes)

    def passing(self, *sizes: float) -> None:
        """Sizes alive together for a moment."""
        self.take(*sizes)
        self.give(*sizes)

    def replay(self, trace: Trace) -> None:
        """A stretch that was booked before."""
        self.peak = max(self.peak, self.live + trace.peak)
        self.live += trace.change

    def close(self) -> Trace:
        """What was booked since the ledger was opened."""
        return Trace(self.peak, self.live)
