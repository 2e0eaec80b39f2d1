"""What an optimizer step takes of the data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

LAG = 2  # steps between what training has found and the first step drawn by it: a trainer fetches a step ahead


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step trains on, over all processes. ``window``: the last keys that a query sees, its own
    among them; None: all. ``drawn_length``: of the rows that are read and then cut, each into ``pieces`` of
    ``context_length``, what is left over dropped; None: rows are read as they are trained on. ``source``: which of a
    mixture's all rows are of; None: each source has its share."""

    rows: int
    context_length: int
    window: int | None = None
    drawn_length: int | None = None
    pieces: int = 1
    source: int | None = None

    def times(self, count: int) -> StepShape:
        """With ``count`` times the rows."""
        return self if count == 1 else replace(self, rows=self.rows * count)

    @property
    def tokens(self) -> int:
        """Trained on."""
        return self.rows * self.context_length

    @property
    def drawn_rows(self) -> int:
        return self.rows // self.pieces

    @property
    def drawn_tokens(self) -> int:
        """Read, which with cut rows are more than are trained on."""
        return self.tokens if self.drawn_length is None else self.drawn_rows * self.drawn_length
