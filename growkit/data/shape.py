"""What an optimizer step takes of the data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step trains on, over all processes. ``window``: the last keys that a query sees, its own
    among them; None: all."""

    rows: int
    context_length: int
    window: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.context_length
