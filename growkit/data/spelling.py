"""Where each id of a byte-level tokenizer ends, told from what the ids spell: the ``tokenizers`` library gives offsets
too, but takes half as long again for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import tokenizers

_PLAIN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that GPT-2's alphabet leaves as they are
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]  # which it moves to 256 and on
_BYTE_OF = {byte: byte for byte in _PLAIN} | {256 + place: byte for place, byte in enumerate(_OTHERS)}
_ALPHABET = frozenset(map(chr, _BYTE_OF))
_UNSOUND = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")  # the last: ids that vary
_CHARACTER = 4  # bytes of the longest one


class Spelling:
    """``pieces``: the bytes of each id; none of one that spells nothing that is known."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def ends(self, ids: Sequence[int], document: bytes) -> NDArray[np.int64] | None:
        """Byte of ``document`` at which each of ``ids`` ends, one within a character at the character's end, as the
        library's offsets have it. None where they do not spell ``document``, byte by byte."""
        spelled = [self._pieces[id] for id in ids]
        if b"".join(spelled) != document:
            return None
        ends = np.cumsum(np.fromiter(map(len, spelled), dtype=np.int64, count=len(spelled)))
        if not document.isascii():
            within = np.append((np.frombuffer(document, dtype=np.uint8) & 0xC0) == 0x80, False)
            for _ in range(_CHARACTER - 1):
                ends += within[ends]
        return ends


def spelling_of(fast: tokenizers.Tokenizer) -> Spelling | None:
    """None where ids could spell the text and yet end elsewhere: where something may be added to the text, or is cut
    from the offsets. With what is let through, parts of a text can only be lost, and then it is not spelled."""
    said = json.loads(fast.to_str())
    model, steps = said["model"], list(_steps(said["pre_tokenizer"], "pretokenizers"))
    sound = (
        model["type"] == "BPE"
        and not any(model.get(key) for key in _UNSOUND)
        and all(step["type"] in ("NFC", "NFKC") for step in _steps(said["normalizer"], "normalizers"))
        and all(step["type"] in ("ByteLevel", "Split", "Digits", "Punctuation") for step in steps)
        and [step["add_prefix_space"] for step in steps if step["type"] == "ByteLevel"] == [False]
        and not any(step.get("trim_offsets") for step in _steps(said["post_processor"], "processors"))
    )
    if not sound:
        return None
    unknown, added = model.get("unk_token"), fast.get_added_tokens_decoder()
    vocab = fast.get_vocab(with_added_tokens=False)
    pieces = [b""] * (1 + max(chain(vocab.values(), added)))
    for token, id in vocab.items():
        if token != unknown and _ALPHABET.issuperset(token):
            pieces[id] = token.translate(_BYTE_OF).encode("latin-1")
    for id, one in added.items():
        pieces[id] = one.content.encode()
    return Spelling(pieces)


def _steps(part: Mapping[str, Any] | None, of: str) -> Iterator[Mapping[str, Any]]:
    """What a part of a tokenizer.json does, one thing after the other. ``of``: where a sequence has them."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[of]:
            yield from _steps(step, of)
    else:
        yield part
