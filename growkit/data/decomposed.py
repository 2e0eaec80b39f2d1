"""Dataset decomposition: rows of one length, each of one document (Pouransari et al. 2024, arXiv 2405.13226).

Legend: data/pieces.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from growkit.data.pieces import Pieces, pieces_of
from growkit.data.stream import Rows, State, require_pairs, rows_at


class Decomposed:
    """Endless rows of ``pieces``: those of a length come from the bucket of that length, in a new random order each
    epoch of the bucket. Each is a piece, whole, so nothing is padded and attention needs no bounds. Only the shortest
    bucket has other rows among them: the tails one after the other, joined, cut every L_0 pairs, and bounded by
    segments. What does not fill a row at the end of an epoch begins the next epoch's first one.

    State: ``cursor``, pairs given out; ``rows``, given out of each bucket; ``joined``, pairs of tails given out.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        starts: NDArray[np.int64],
        *,
        lengths: Sequence[int],
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.tokens, self._ends = tokens, starts[1:] - 1
        self.pieces = pieces_of(starts, require_pairs(tokens), lengths)
        self._buckets = {length: _Bucket(self.pieces, length, seed, shuffle) for length in self.pieces.begins}

    def begin(self) -> State:
        return {"cursor": 0, "rows": {str(length): 0 for length in sorted(self._buckets)}, "joined": 0}

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        bucket, own = self._buckets[context_length], str(context_length)
        numbers = bucket.numbers(state["rows"][own], rows)
        ends = self._ends if context_length == self.pieces.shortest else None
        found = rows_at(self.tokens, bucket.positions(numbers[mine]), ends)
        count = rows * context_length
        joined = int((numbers >= bucket.whole).sum()) * context_length
        after = {
            "cursor": state["cursor"] + count,
            "rows": {**state["rows"], own: state["rows"][own] + rows},
            "joined": state["joined"] + joined,
        }
        return found._replace(scored=count), after


class _Bucket:
    """The endless sequence of the rows of one length. Row numbers below ``whole`` are pieces; ``whole`` + j is the
    j-th row of the tails, which go on from epoch to epoch: in the first n epochs, ⌊n · tail pairs / length⌋ of them."""

    def __init__(self, pieces: Pieces, length: int, seed: int, shuffle: bool) -> None:
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.begins, self.whole = pieces.begins[length], len(pieces.begins[length])
        self.tails, self.tail_ends = pieces.tails, np.cumsum(pieces.tail_sizes)
        self.tail_pairs = pieces.tail_pairs if length == pieces.shortest else 0
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _before(self, epoch: int) -> int:
        """Rows of tails before ``epoch``."""
        return epoch * self.tail_pairs // self.length

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        joined = self._before(epoch)
        order = np.arange(self.whole + self._before(epoch + 1) - joined)
        if self.shuffle:
            key, counter = [self.seed, epoch], [0, 0, 0, self.length]  # every bucket has random numbers of its own
            order = np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(order)
        order[order >= self.whole] += joined
        return order

    def numbers(self, first: int, count: int) -> NDArray[np.int64]:
        """Of the ``count`` rows from the ``first`` on, over all epochs."""
        pairs, found, done = self.whole * self.length + self.tail_pairs, np.empty(count, dtype=np.int64), 0
        while done < count:
            row = first + done
            epoch = ((row + 1) * self.length - 1) // pairs  # the last before which there are at most ``row`` rows
            some = self._order(epoch)[row - epoch * pairs // self.length :][: count - done]
            found[done : done + len(some)] = some
            done += len(some)
        return found

    def positions(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Corpus positions of the rows, (rows, length)."""
        joined, along = numbers >= self.whole, np.arange(self.length)
        at = np.empty((len(numbers), self.length), dtype=np.int64)
        at[~joined] = self.begins[numbers[~joined], None] + along
        if joined.any():
            place = ((numbers[joined] - self.whole)[:, None] * self.length + along) % self.tail_pairs
            tail = np.searchsorted(self.tail_ends, place, side="right")
            at[joined] = self.tails[tail] + place - (self.tail_ends[tail] - np.diff(self.tail_ends, prepend=0)[tail])
        return at
