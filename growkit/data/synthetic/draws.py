"""Random numbers that are a function of where they are used: of a seed, a sample's number and a place in the sample.

So a sample is the same whatever is drawn beside it, and a batch is drawn at once. The generator is SplitMix64 (Steele,
Lea & Flood 2014), begun at a place of its own for every sample and every call.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd: its multiples run through all 64-bit numbers


class Draws:
    """Of the samples ``first`` .. ``first + count`` of ``seed`` (0 .. 2^64 - 1); every call draws afresh."""

    def __init__(self, seed: int, first: int, count: int) -> None:
        start = _mixed(np.array([seed], dtype=np.uint64))
        numbers = np.arange(first, first + count, dtype=np.uint64)
        self._keys = _mixed(start + GOLDEN * (numbers + np.uint64(1)))
        self._calls = 0

    def uniform(self, columns: int) -> NDArray[np.float64]:
        """(samples, columns) in [0, 1), multiples of 2^-53."""
        self._calls += 1
        keys = _mixed(self._keys + _mixed(np.array([self._calls], dtype=np.uint64)))
        bits = _mixed(keys[:, None] + GOLDEN * np.arange(1, columns + 1, dtype=np.uint64))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, limit: int, columns: int) -> NDArray[np.int64]:
        """(samples, columns) of 0 .. limit - 1."""
        return (self.uniform(columns) * limit).astype(np.int64)

    def different(self, limit: int, columns: int) -> NDArray[np.int64]:
        """(samples, columns) of 0 .. limit - 1, no two of a sample the same, in any order."""
        return _smallest(self.uniform(limit), columns)

    def weighted(self, weights: NDArray[np.float64], columns: int) -> NDArray[np.int64]:
        """(samples, columns) of the places of ``weights``, no two of a sample the same: one after the other, each with
        a chance in proportion to its weight among those that are left."""
        return _smallest(-np.log1p(-self.uniform(len(weights))) / weights, columns)  # the first of exponential clocks


def _smallest(values: NDArray[np.float64], columns: int) -> NDArray[np.int64]:
    """Where the ``columns`` smallest of each row are, the smallest first."""
    places = np.argpartition(values, columns - 1, axis=1)[:, :columns]
    places.sort(axis=1)  # what partition leaves differs between machines
    order = np.argsort(np.take_along_axis(values, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: one to one, every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
