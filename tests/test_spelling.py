"""Ends of ids told from what they spell: those of the library's offsets, whatever the text and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.data.bpe import train_bpe
from growkit.data.spelling import spelling_of
from growkit.data.tokenizer import FastTokenizer
from tests.support import TEXT

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORDS = {"type": "Split", "pattern": {"Regex": r"\w+| +"}, "behavior": "Isolated", "invert": False}
PREFIXED = BYTES | {"add_prefix_space": True}
MARK = {"id": 300, "content": "<m>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def sequence(key: str, *steps: object) -> dict[str, object]:
    return {"type": "Sequence", key: list(steps)}


# What is changed in a plain tokenizer.json, of which the spelling tells ends, and of which it must not.
TOLD: dict[str, dict[str, Any]] = {
    "plain": {},
    "a bos before each": {},
    "NFC": {"normalizer": sequence("normalizers", {"type": "NFC"})},
    "words": {"pre_tokenizer": sequence("pretokenizers", WORDS, BYTES | {"use_regex": False})},
    "spaces lost": {"pre_tokenizer": sequence("pretokenizers", WORDS | {"behavior": "Removed", "invert": True}, BYTES)},
    "a token": {"added_tokens": [MARK]},
    "a token that takes the space before it": {"added_tokens": [MARK | {"lstrip": True}]},
    "a token that takes the space behind it": {"added_tokens": [MARK | {"rstrip": True}]},
    "no exclamation mark": {"lost": ("!", None)},
    "an unknown one": {"lost": ("!", "#")},
}
NOT_TOLD: dict[str, dict[str, Any]] = {
    "a space is added": {
        "pre_tokenizer": BYTES | {"add_prefix_space": True},
        "added_tokens": [MARK | {"rstrip": True}],
    },
    "offsets are trimmed": {"post_processor": BYTES},
    "capitals are lost": {"normalizer": {"type": "Lowercase"}},
    "ids vary": {"dropout": 0.5},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bpe") / "made"
    train_bpe([TEXT.encode() * 3], 300, folder)
    said: dict[str, Any] = json.loads((folder / "tokenizer.json").read_bytes())
    return said


def changed(plain: dict[str, Any], change: dict[str, Any]) -> tokenizers.Tokenizer:
    change = dict(change)
    lost, unknown = change.pop("lost", (None, None))
    model = plain["model"] | {"dropout": change.pop("dropout", None), "unk_token": unknown}
    model["vocab"] = {token: id for token, id in model["vocab"].items() if token != lost}
    tokens = [*plain["added_tokens"], *(one | {"special": False} for one in change.pop("added_tokens", []))]
    return tokenizers.Tokenizer.from_str(json.dumps(plain | change | {"model": model, "added_tokens": tokens}))


texts = st.text(alphabet="aE <m>!#\n\u00e9\u4e16\U0001f600\u0301x", max_size=14).map(str.encode)
documents = st.lists(st.one_of(texts, st.binary(max_size=8), st.just(b"a <m> <m>a!")), min_size=1, max_size=5)


@settings(max_examples=60)
@given(st.sampled_from([*TOLD, *NOT_TOLD][:-1]), documents)
def test_ends_are_those_of_the_offsets(plain: dict[str, Any], way: str, documents: list[bytes]) -> None:
    fast = changed(plain, (TOLD | NOT_TOLD)[way])
    bos = 5 if "bos" in way else None
    mine, other = FastTokenizer(way, fast, 0, bos), FastTokenizer(way, fast, 0, bos)
    assert (mine._spelling is not None) == (way in TOLD)
    other.__dict__["_spelling"] = None  # offsets alone
    (ids, ends), (wanted_ids, wanted) = (one.encode_documents(documents, ends=True) for one in (mine, other))
    assert ids.dtype == wanted_ids.dtype and np.array_equal(ids, wanted_ids)
    assert ends is not None and wanted is not None and ends.dtype == wanted.dtype and np.array_equal(ends, wanted)
    assert np.array_equal(mine.encode_documents(documents)[0], ids)


def test_what_is_spelled_needs_no_offsets(plain: dict[str, Any], tmp_path: Path) -> None:
    fast = changed(plain, TOLD["a token"])
    spelling = spelling_of(fast)
    assert spelling is not None and spelling_of(changed(plain, NOT_TOLD["ids vary"])) is None
    text = "the fox <m> na\u00efve \u4e16\u754c \U0001f600!"
    ends = spelling.ends(fast.encode(text).ids, text.encode())
    assert ends is not None and ends[-1] == len(text.encode())
    assert spelling.ends(fast.encode(text).ids, text.encode() + b"!") is None
    for model in (tokenizers.models.WordLevel({"a": 0}, unk_token="a"), tokenizers.models.BPE()):
        assert spelling_of(tokenizers.Tokenizer(model)) is None
