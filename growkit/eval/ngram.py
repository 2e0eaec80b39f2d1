"""An n-gram model of bytes with interpolated Kneser–Ney smoothing: the yardstick beside every validation score.

P_n(w | h) = max(c(hw) − D_n, 0)/c(h) + D_n·N(h·)/c(h) · P_{n−1}(w | h'), the lower orders on continuation counts
(Chen & Goodman 1998, section 2.7), D_n = n₁/(n₁ + 2n₂). Order 0 is uniform over 256 bytes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Counts = tuple[NDArray[np.uint64], NDArray[np.int64]]  # sorted codes, counts


class NGram:
    """Trained on ``tokens`` (uint8). ``order``: bytes of a gram, 1..7 (a code fits 64 bits); a shorter text lowers it
    to its length."""

    def __init__(self, tokens: NDArray[np.uint8], order: int) -> None:
        assert 1 <= order <= 7
        self.order = order = min(order, len(tokens))
        self._grams: dict[int, Counts] = {}
        self._contexts: dict[int, tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]] = {}
        codes, counts = np.unique(_codes(tokens, order), return_counts=True)
        for n in range(order, 0, -1):
            self._grams[n] = (codes, counts)
            contexts, first = np.unique(codes >> np.uint64(8), return_index=True)
            kinds = np.diff(np.append(first, len(codes)))
            self._contexts[n] = (contexts, np.add.reduceat(counts, first), kinds)
            if n > 1:  # continuation counts: distinct bytes seen before each shorter gram
                codes = np.union1d(codes, _codes(tokens[:n], n))  # the text's start, which no longer gram ends with
                codes, counts = np.unique(codes & np.uint64((1 << 8 * (n - 1)) - 1), return_counts=True)

    def bits_per_byte(self, tokens: NDArray[np.uint8], positions: NDArray[np.int64]) -> float:
        """Mean −log₂ P of ``tokens[positions]`` given the bytes before (positions ≥ order − 1)."""
        probability = np.full(len(positions), 1 / 256)
        for n in range(1, self.order + 1):
            code = np.zeros(len(positions), dtype=np.uint64)
            for back in range(n - 1, -1, -1):
                code = (code << np.uint64(8)) | tokens[positions - back].astype(np.uint64)
            codes, counts = self._grams[n]
            discount = _discount(counts)
            count, seen = _look_up(codes, counts, code)
            contexts, totals, kinds = self._contexts[n]
            total, known = _look_up(contexts, totals, code >> np.uint64(8))
            kind, _ = _look_up(contexts, kinds, code >> np.uint64(8))
            total = np.maximum(total, 1)
            mixed = np.where(seen, count - discount, 0) / total + discount * kind / total * probability
            probability = np.where(known, mixed, probability)
        return float(-np.log2(probability).mean())


def ngram_bits_per_byte(
    train: NDArray[np.uint8], validation: NDArray[np.uint8], targets: NDArray[np.int64], order: int
) -> float:
    """Score of an ``order``-gram on the target positions that have ``order − 1`` bytes before them."""
    return NGram(train, order).bits_per_byte(validation, targets[targets >= order - 1])


def _codes(tokens: NDArray[np.uint8], n: int) -> NDArray[np.uint64]:
    count = len(tokens) - n + 1
    code = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        code = (code << np.uint64(8)) | tokens[i : i + count].astype(np.uint64)
    return code


def _discount(counts: NDArray[np.int64]) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def _look_up(
    codes: NDArray[np.uint64], values: NDArray[np.int64], wanted: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    found = codes[at] == wanted
    return np.where(found, values[at], 0), found


def bits(nats: float, bytes_per_token: float = 1.0) -> float:
    """Nats per token → bits per byte; NaN of tokens that stand for none."""
    return nats / math.log(2) / bytes_per_token if bytes_per_token else math.nan
