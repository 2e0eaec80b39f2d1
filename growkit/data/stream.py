"""Batches as a pure function of a cursor that counts tokens.

The stream is the corpus cut into blocks, the blocks in a new random order each epoch. Position p of the stream is a
(token, next token) pair of the corpus; every pair occurs once per epoch. A batch of any shape is the next
``rows × context`` pairs, so changing context or batch size repeats and skips nothing, and the cursor alone resumes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growkit.errors import DataError


class Batch(NamedTuple):
    """``tokens``, ``targets``: int64 (rows, context). ``cursor``: where the stream stands *after* this batch,
    over all processes; it travels with the batch because a trainer may fetch ahead."""

    tokens: Tensor
    targets: Tensor
    cursor: int


class TokenStream:
    """The endless stream over ``tokens`` (uint8 or any integer array)."""

    def __init__(self, tokens: NDArray[np.integer], *, block_tokens: int, seed: int, shuffle: bool = True) -> None:
        self.tokens, self.block_tokens, self.seed, self.shuffle = tokens, block_tokens, seed, shuffle
        self.epoch_tokens = len(tokens) - 1
        if self.epoch_tokens < 1:
            raise DataError("corpus-too-short", "has no pair of tokens", key="data.source")
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """Block numbers in the epoch's order; a last, shorter block keeps its place at the end."""
        whole = self.epoch_tokens // self.block_tokens
        if not self.shuffle:
            return np.arange(whole)
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(whole)

    def positions(self, start: int, count: int) -> NDArray[np.int64]:
        """Corpus positions of stream positions start .. start+count."""
        stream = np.arange(start, start + count, dtype=np.int64)
        epochs, inside = np.divmod(stream, self.epoch_tokens)
        result = np.empty_like(stream)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            mine = epochs == epoch
            block, offset = np.divmod(inside[mine], self.block_tokens)
            order = self._order(epoch)
            tail = block >= len(order)
            block[~tail] = order[block[~tail]]
            result[mine] = block * self.block_tokens + offset
        return result

    def read(self, start: int, rows: int, context_length: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets), each int64 (rows, context_length), from stream position ``start``."""
        at = self.positions(start, rows * context_length)
        shape = (rows, context_length)
        tokens = torch.from_numpy(self.tokens[at].astype(np.int64)).view(shape)
        return tokens, torch.from_numpy(self.tokens[at + 1].astype(np.int64)).view(shape)


@dataclass
class Batches:
    """Endless micro-batches from ``cursor`` on. Process ``rank`` of ``world_size`` takes its rows of each."""

    stream: TokenStream
    cursor: int
    micro_batch_size: int
    context_length: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[Batch]:
        cursor = self.cursor
        mine = self.micro_batch_size * self.context_length
        while True:
            tokens, targets = self.stream.read(cursor + self.rank * mine, self.micro_batch_size, self.context_length)
            cursor += mine * self.world_size
            yield Batch(tokens, targets, cursor)


def validation_windows(
    tokens: NDArray[np.integer], context_length: int, wanted_tokens: int, unscored: int = 0
) -> tuple[NDArray[np.int64], int]:
    """Start positions of windows spread evenly over ``tokens``, and how many tokens they score.

    The first ``unscored`` targets of a window are only context; the windows do not overlap in the others.
    """
    scored = context_length - unscored
    possible = (len(tokens) - 1 - unscored) // scored
    count = max(1, min(possible, wanted_tokens // scored))
    starts = np.floor(np.arange(count) * (possible / count)).astype(np.int64) * scored
    return starts, count * scored


def windows(tokens: NDArray[np.integer], starts: NDArray[np.int64], context_length: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), int64 (len(starts), context_length)."""
    at = starts[:, None] + np.arange(context_length)
    return torch.from_numpy(tokens[at].astype(np.int64)), torch.from_numpy(tokens[at + 1].astype(np.int64))
