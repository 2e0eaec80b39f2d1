"""What is trained on and what is held out: a pure function of the documents' groups and sizes in bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.int64]  # (documents, 2): the bytes, from .. to, of each in the text without anything between them

END_BYTES = 1  # between two documents that are joined


def digest_of(group: str) -> bytes:
    """32 bytes that stand for a group, and order it."""
    return hashlib.sha256(group.encode(errors="surrogateescape")).digest()


def split(
    sizes: NDArray[np.int64], digests: NDArray[np.uint64], names: Callable[[], Iterable[str]], fraction: float
) -> tuple[Spans, Spans]:
    """(documents to train on, to validate on): whole groups in the order of their digests until ``fraction`` of the
    bytes is set aside for validation.

    The order is a hash's so that it is the same everywhere and unrelated to the content; a group that alone would
    overshoot by half is passed over. ``sizes``: (documents,), ``digests``: (documents, 4), of their groups, as
    big-endian numbers; ``names``: of their groups, for the rare case that sizes alone decide.
    """
    wanted = round(int(sizes.sum()) * fraction)
    stops = np.cumsum(sizes)
    spans = np.stack([stops - sizes, stops], axis=1)
    order = np.lexsort(digests.T[::-1])
    ordered = digests[order]
    first = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1)))
    if len(first) == 1:
        return cut(spans, wanted)
    totals = np.add.reduceat(sizes[order], first)
    group = np.empty(len(sizes), dtype=np.int64)  # number of each document's, in the order of digests
    group[order] = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(sizes))))
    chosen = np.zeros(len(first), dtype=bool)
    taken = 0
    for number, total in enumerate(totals.tolist()):
        if taken >= wanted:
            break
        if taken + total <= max(1.5 * wanted, 1):
            chosen[number] = True
            taken += total
    if not chosen.any():  # a few large groups: the smallest one
        least = totals == totals.min()
        candidates = ((name, number) for name, number in zip(names(), group.tolist(), strict=True) if least[number])
        chosen[min(candidates)[1]] = True
    held_out = chosen[group]
    return spans[~held_out], spans[held_out]


def cut(spans: Spans, wanted: int) -> tuple[Spans, Spans]:
    """The text of ``spans``, joined by an end, cut ``wanted`` bytes before its end: what is left of each on either
    side."""
    sizes = spans[:, 1] - spans[:, 0]
    stops = np.cumsum(sizes + END_BYTES) - END_BYTES  # of each document in the joined text
    place = int(stops[-1]) - wanted
    number = int(np.searchsorted(stops, place))  # a cut at a document's end is behind it
    at = int(spans[number, 0] + place - (stops[number] - sizes[number]))
    before, after = spans[: number + 1].copy(), spans[number:].copy()
    before[-1, 1] = after[0, 0] = at
    return before, after
