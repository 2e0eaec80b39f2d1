"""Documents that were there before: the same bytes, or nearly the same words.

Near duplicates are found by MinHash (Broder 1997): the share of permutations under which two documents have the same
smallest shingle estimates the Jaccard similarity J of their sets of shingles, with a standard error of √(J(1 − J)/n)
over n permutations. Bands of the signatures (LSH) name the candidates, the estimate decides.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import xxhash
from numpy.typing import NDArray

SHINGLE = 5  # words
RECALL = 0.99  # of candidates, at the threshold
_SEED = 1  # of the permutations: the same on every machine
_AT_ONCE = 1 << 18  # hashes under a permutation at a time: what a processor has near
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that a product loses nothing

# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces: there each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class ExactDuplicates:
    """Remembers the texts it has seen, as 16 bytes each."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def first(self, name: str, text: bytes) -> str | None:
        """The name of the first document with these bytes; None if this is the first, which is remembered."""
        digest = hashlib.blake2b(text, digest_size=16).digest()
        earlier = self._seen.get(digest)
        if earlier is None:
            self._seen[digest] = name
        return earlier


class NearDuplicates:
    """Remembers the signatures of the texts that were like none before."""

    def __init__(self, threshold: float, permutations: int) -> None:
        from datasketch import LeanMinHash, MinHash, MinHashLSH

        rows = band_rows(threshold, permutations)
        self._threshold, self._lean = threshold, LeanMinHash
        self._index = MinHashLSH(num_perm=permutations, params=(permutations // rows, rows))
        self._blank = MinHash(permutations, seed=_SEED, hashfunc=int, scheme="affine32")
        self._kept: list[tuple[str, LeanMinHash]] = []

    def first(self, name: str, text: str) -> str | None:
        """The name of the first remembered document that ``text`` is like; None if there is none: then this one is
        remembered. A text without words is like none."""
        hashes = shingles(text)
        if not len(hashes):
            return None
        sketch = self._blank.copy()
        step = max(1, _AT_ONCE // len(sketch))
        for start in range(0, len(hashes), step):
            sketch.update_batch(hashes[start : start + step].tolist())
        for place in sorted(self._index.query(sketch)):
            earlier, other = self._kept[place]
            if sketch.jaccard(other) >= self._threshold:
                return earlier
        self._index.insert(len(self._kept), sketch)
        self._kept.append((name, self._lean(sketch)))
        return None


def shingles(text: str) -> NDArray[np.uint32]:
    """Hashes of the set of runs of ``SHINGLE`` words, whatever their case; of all the words where there are fewer."""
    words = " ".join(_WORD.findall(text.lower())).encode().split()
    hashes = np.fromiter(map(xxhash.xxh64_intdigest, words), dtype=np.uint64, count=len(words))
    size = max(1, min(SHINGLE, len(words)))
    runs = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for start in range(size):
        runs = runs * _MIX + hashes[start : start + len(runs)]
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def band_rows(threshold: float, permutations: int) -> int:
    """Rows of a band: the most, so the fewest false candidates, with which two documents of similarity ``threshold``
    share one of the ⌊n/r⌋ bands, 1 − (1 − tʳ)^⌊n/r⌋ (Leskovec et al., Mining of Massive Datasets, 3.4.2), in
    ``RECALL`` of the cases."""
    found = [r for r in range(1, permutations // 2 + 1) if 1 - (1 - threshold**r) ** (permutations // r) >= RECALL]
    assert found, "the settings have been checked"
    return found[-1]
