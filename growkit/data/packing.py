"""Best-fit packing: rows of whole documents (Ding et al. 2024, arXiv 2404.10830, section 3).

Legend: a piece is a span [begin, end) of (token, next token) pairs of one document. Together the pieces are every pair
once: the end token before a document is the first of its piece, so that it stands for the beginning of a text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growkit.data.stream import Rows, State, require_pairs
from growkit.ops.targets import UNSCORED

ROWS_AHEAD = 32  # of pieces among which a row chooses; what is not used yet lies in the state

Piece = tuple[int, int]


class Packed:
    """The endless sequence of the pieces of ``tokens``, in a new random order each epoch, packed into rows: a row
    begins with the piece that waits longest, and goes on with the longest that still fits. What is left of it is
    padding: its targets are UNSCORED. No document is cut but those longer than ``block_tokens`` (each such piece waits
    by itself) or than a row.

    ``starts``: token at which each document begins, the first at 0. State: ``cursor``, pairs given out; ``pieces``,
    taken from the order so far; ``waiting``, those of them not given out yet; ``padding``, positions so far.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        starts: NDArray[np.int64],
        *,
        block_tokens: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.tokens, self.seed, self.shuffle = tokens, seed, shuffle
        self.begins, self.ends = _pieces(starts, require_pairs(tokens), block_tokens)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.begins))
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.begins))

    def begin(self) -> State:
        return {"cursor": 0, "pieces": 0, "waiting": [], "padding": 0}

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        line = _Line(state["waiting"])
        drawn, scored = state["pieces"], 0
        packed: list[list[Piece]] = []
        for _ in range(rows):
            while line.pairs < ROWS_AHEAD * context_length:
                line.join(self._piece(drawn))
                drawn += 1
            packed.append(line.row(context_length))
            scored += sum(end - begin for begin, end in packed[-1])
        after = {
            "cursor": state["cursor"] + scored,
            "pieces": drawn,
            "waiting": line.waiting,
            "padding": state["padding"] + rows * context_length - scored,
        }
        return Rows(*self._laid_out(packed[mine], context_length), scored), after

    def _piece(self, number: int) -> Piece:
        epoch, inside = divmod(number, len(self.begins))
        at = self._order(epoch)[inside]
        return int(self.begins[at]), int(self.ends[at])

    def _laid_out(self, packed: list[list[Piece]], context_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets and segments; padding is a segment of its own, of token 0."""
        tokens = np.zeros((len(packed), context_length), dtype=np.int64)
        targets = np.full_like(tokens, UNSCORED)
        segments = np.zeros(tokens.shape, dtype=np.int32)
        for row, pieces in enumerate(packed):
            at = 0
            for number, (begin, end) in enumerate(pieces):
                here = slice(at, at + end - begin)
                tokens[row, here], targets[row, here] = self.tokens[begin:end], self.tokens[begin + 1 : end + 1]
                segments[row, here] = number
                at = here.stop
            segments[row, at:] = len(pieces)
        return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(segments)


def _pieces(starts: NDArray[np.int64], pairs: int, block_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Begins and ends of the documents' pieces, none longer than ``block_tokens``."""
    begins = np.concatenate(([0], starts[1:] - 1))
    sizes = np.diff(np.append(begins, pairs))
    counts = -(-sizes // block_tokens)  # none of a document without a pair: the last, if it is one token
    first = np.repeat(begins, counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    cut = first + number * block_tokens
    return cut, np.minimum(cut + block_tokens, np.repeat(begins + sizes, counts))


class _Line:
    """Pieces that wait, by number in the order they came, and by length."""

    def __init__(self, waiting: Iterable[Sequence[int]]) -> None:
        self._pieces: dict[int, Piece] = {number: (begin, end) for number, (begin, end) in enumerate(waiting)}
        # Of the same length the one that waits longest is the last, and goes first.
        self._lengths = sorted((end - begin, -number) for number, (begin, end) in self._pieces.items())
        self._joined = len(self._pieces)
        self.pairs = sum(length for length, _ in self._lengths)

    @property
    def waiting(self) -> list[list[int]]:
        return [list(piece) for piece in self._pieces.values()]

    def join(self, piece: Piece) -> None:
        self._pieces[self._joined] = piece
        insort(self._lengths, (piece[1] - piece[0], -self._joined))
        self._joined += 1
        self.pairs += piece[1] - piece[0]

    def row(self, context_length: int) -> list[Piece]:
        """The pieces of the next row. Of one too long for it the rest waits on, in its place."""
        first = next(iter(self._pieces))
        row = [self._leave(first, context_length)]
        left = context_length - (row[0][1] - row[0][0])
        while left and (fit := bisect_right(self._lengths, (left, 0))):
            row.append(self._leave(-self._lengths[fit - 1][1], left))
            left -= row[-1][1] - row[-1][0]
        return row

    def _leave(self, number: int, most: int) -> Piece:
        begin, end = self._pieces[number]
        self._lengths.pop(bisect_left(self._lengths, (end - begin, -number)))
        cut = min(end, begin + most)
        if cut < end:
            self._pieces[number] = (cut, end)
            insort(self._lengths, (end - cut, -number))
        else:
            del self._pieces[number]
        self.pairs -= cut - begin
        return begin, cut
