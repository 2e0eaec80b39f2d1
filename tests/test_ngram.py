"""The n-gram yardstick: a probability, the published formula by dictionaries, and better with more context."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.eval.ngram import NGram, bits, ngram_bits_per_byte
from growkit.eval.validate import mean_loss, target_positions
from growkit.models.decoder import build
from tests.support import TEXT, model_config, trained_like

ROUNDING = 1e-12  # relative, float64: sums of at most 256 terms


def probability(model: NGram, context: bytes, byte: int) -> float:
    """P(byte | context), through the one public door: the score of a single position."""
    text = np.frombuffer(context + bytes([byte]), dtype=np.uint8)
    return 2 ** -model.bits_per_byte(text, np.array([len(text) - 1]))


class Slow:
    """Interpolated Kneser–Ney by dictionaries (Chen & Goodman 1998, section 2.7): how often a gram of the highest order
    occurs, and for the lower ones how many different bytes come before it."""

    def __init__(self, text: bytes, order: int) -> None:
        self.order = order
        grams = {n: [text[i : i + n] for i in range(len(text) - n + 1)] for n in range(1, order + 1)}
        self.counts = {order: Counter(grams[order])}
        for n in range(1, order):
            self.counts[n] = Counter(longer[1:] for longer in set(grams[n + 1]))

    def probability(self, context: bytes, byte: int, n: int | None = None) -> float:
        n = self.order if n is None else n
        if n == 0:
            return 1 / 256
        history = context[len(context) - (n - 1) :]
        lower = self.probability(context, byte, n - 1)
        followers = {gram[-1]: count for gram, count in self.counts[n].items() if gram[:-1] == history}
        total = sum(followers.values())
        if not total:
            return lower
        frequencies = Counter(self.counts[n].values())
        once, twice = frequencies[1], frequencies[2]
        discount = once / (once + 2 * twice) if once else 0.5
        return (max(followers.get(byte, 0) - discount, 0) + discount * len(followers) * lower) / total


@settings(max_examples=40)
@given(st.binary(min_size=8, max_size=60), st.integers(1, 4), st.data())
def test_the_slow_implementation(text: bytes, order: int, data: st.DataObject) -> None:
    """On any text, of contexts that it has and has not seen."""
    text = bytes(byte % 5 for byte in text)  # few different bytes, so that grams repeat
    model, slow = NGram(np.frombuffer(text, dtype=np.uint8), order), Slow(text, order)
    for _ in range(4):
        context = bytes(data.draw(st.lists(st.integers(0, 6), min_size=order - 1, max_size=order + 1)))
        byte = data.draw(st.integers(0, 6))
        wanted = slow.probability(context, byte)
        assert math.isclose(probability(model, context, byte), wanted, rel_tol=ROUNDING)


def test_real_text_by_the_slow_implementation() -> None:
    """A tiny corpus, scored whole: the mean over positions, as a validation has it."""
    train, held_out = TEXT.encode() * 3 + b"a lazy dog", b"my quick liquor box"
    for order in (1, 2, 3, 5):
        slow = Slow(train, order)
        positions = range(order - 1, len(held_out))
        wanted = -sum(math.log2(slow.probability(held_out[:i], held_out[i])) for i in positions) / len(positions)
        arrays = (np.frombuffer(text, dtype=np.uint8) for text in (train, held_out))
        found = ngram_bits_per_byte(*arrays, np.arange(len(held_out)), order)
        assert math.isclose(found, wanted, rel_tol=ROUNDING)


@settings(max_examples=15)  # 256 scores each
@given(st.binary(min_size=8, max_size=80), st.integers(1, 7), st.binary(min_size=6, max_size=8))
def test_probabilities_sum_to_one(text: bytes, order: int, context: bytes) -> None:
    text = bytes(byte % 7 for byte in text)
    context = bytes(byte % 8 for byte in context)
    model = NGram(np.frombuffer(text, dtype=np.uint8), order)
    each = [probability(model, context, byte) for byte in range(256)]
    assert min(each) > 0
    assert math.isclose(sum(each), 1, rel_tol=ROUNDING)


def test_the_longest_grams_do_not_overflow() -> None:
    """Seven bytes of 255 fill 56 bits of a code."""
    model = NGram(np.full(50, 255, dtype=np.uint8), 7)
    context = bytes([255] * 6)
    assert math.isclose(sum(probability(model, context, byte) for byte in range(256)), 1, rel_tol=ROUNDING)
    assert probability(model, context, 255) > 0.9


def test_by_hand() -> None:
    """``aab``, order 1: two a, one b; one byte seen once, one twice, so D = 1/3."""
    model = NGram(np.frombuffer(b"aab", dtype=np.uint8), 1)
    spread = (1 / 3) * 2 / 3 / 256
    for byte, count in ((b"a", 2), (b"b", 1), (b"c", 1 / 3)):
        assert math.isclose(probability(model, b"", byte[0]), (count - 1 / 3) / 3 + spread, rel_tol=ROUNDING)


def test_more_context_helps_where_there_is_structure() -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("ab", k=9)) + " " for _ in range(12)]  # to know the word takes several letters
    text = "".join(generator.choice(words) for _ in range(2000)).encode()
    train, held_out = (np.frombuffer(part, dtype=np.uint8) for part in (text[:15000], text[15000:]))
    targets = np.arange(10, len(held_out))
    scores = [ngram_bits_per_byte(train, held_out, targets, order) for order in range(1, 6)]
    assert all(better < 0.97 * worse for worse, better in itertools.pairwise(scores)), scores
    noise = np.random.Generator(np.random.Philox(0)).integers(0, 256, 20000).astype(np.uint8)
    assert ngram_bits_per_byte(noise[:15000], noise[15000:], np.arange(4000), 5) > 7.9, "noise was predicted"


@pytest.mark.parametrize("order", [1, 3])
def test_positions_without_enough_context_are_left_out(order: int) -> None:
    train = np.frombuffer(TEXT.encode(), dtype=np.uint8)
    targets = np.arange(20)
    found = ngram_bits_per_byte(train, train, targets, order)
    assert found == NGram(train, order).bits_per_byte(train, targets[order - 1 :])


def test_a_text_shorter_than_the_order() -> None:
    """Its longest grams are taken: the score is that of the order it has bytes for."""
    short = np.frombuffer(b"abc", dtype=np.uint8)
    assert NGram(short, 7).bits_per_byte(short, np.array([2])) == NGram(short, 3).bits_per_byte(short, np.array([2]))


def test_bits() -> None:
    assert bits(math.log(256)) == pytest.approx(8, rel=ROUNDING)


@pytest.mark.parametrize("world_size", [2, 3, 5, 9])
def test_processes_share_the_validation_windows(world_size: int) -> None:
    """What all score together is what one scores, as the n-gram is, with windows left over and with too few of them."""
    config, tokens = model_config("transformer", vocab_size=256), np.frombuffer(TEXT.encode() * 2, dtype=np.uint8)
    model = build(config, trained_like(config, dtype=torch.float32).params)
    alone = mean_loss(model, tokens, 16, 7 * 14)
    shares = [mean_loss(model, tokens, 16, 7 * 14, rank=r, world_size=world_size) for r in range(world_size)]
    assert alone[1] == 7 * 14 == len(target_positions(tokens, 16, 7 * 14)) == sum(count for _, count in shares)
    assert sum(total for total, _ in shares) == pytest.approx(alone[0], rel=1e-6)  # float32, other batches
