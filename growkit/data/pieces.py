"""Documents cut into pieces of a few lengths: dataset decomposition (Pouransari et al. 2024, arXiv 2405.13226). No
torch here; the rows that are made of them: data/decomposed.py.

Legend: a document is its (token, next token) pairs, the end token before it the first of them. L_0 < L_1 < ... the
lengths of rows, each a multiple of the one before it. A piece is a span of L_i pairs of one document; a tail what is
left of a document, fewer than L_0 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from growkit.errors import DataError


@dataclass(frozen=True)
class Pieces:
    """``begins``: length → the position at which each piece of it begins. ``tails``, ``tail_sizes``: where each tail
    begins, and how many pairs it has. All int64."""

    begins: dict[int, NDArray[np.int64]]
    tails: NDArray[np.int64]
    tail_sizes: NDArray[np.int64]

    @property
    def shortest(self) -> int:
        return min(self.begins)

    @property
    def tail_pairs(self) -> int:
        return int(self.tail_sizes.sum())

    def pairs(self, length: int) -> int:
        """That the bucket of ``length`` holds; that of the shortest has the tails too."""
        return len(self.begins[length]) * length + (self.tail_pairs if length == self.shortest else 0)


def pieces_of(starts: NDArray[np.int64], pairs: int, lengths: Sequence[int]) -> Pieces:
    """Each document cut into as many pieces of the longest length as it has, then of the next, and so on. Where
    lengths double, the pieces below the longest are the document's binary decomposition: one of each or none.

    ``starts``: token at which each document begins, the first at 0. ``pairs``: of all of them.
    """
    at = np.concatenate(([0], starts[1:] - 1))
    left = np.diff(np.append(at, pairs))
    begins: dict[int, NDArray[np.int64]] = {}
    for length in sorted(lengths, reverse=True):
        counts, left = np.divmod(left, length)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        begins[length] = np.repeat(at, counts) + number * length
        at = at + counts * length
    return Pieces(begins, at[left > 0], left[left > 0])


def require_pieces(pieces: Pieces, name: str) -> None:
    """Raises DataError if the text ``name`` has no row of one of the lengths."""
    for length in sorted(pieces.begins):
        if not pieces.pairs(length):
            problem = f"none of its documents has a piece of {length} tokens, and a step is to have rows of such"
            mend = "use shorter lengths (`growkit data prepare` shows what each has), other text, or packing documents"
            raise DataError("bucket-empty", problem, key="data.packing", value=name, mend=mend)
