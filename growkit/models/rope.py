"""How fast rotary pairs turn when a context was stretched beyond the one trained on. No torch here.

The published ways, as Hugging Face's configurations name them. Each changes the inverse frequencies base^(−2i/r) of the
r/2 pairs of r rotated dimensions; some scale cosine and sine by an ``attention_factor`` as well, and with it the scores
by its square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Union


@dataclass(frozen=True)
class LinearRope:
    """Every position divided by ``factor`` (position interpolation, arXiv 2306.15595)."""

    factor: float
    kind: Literal["linear"] = "linear"

    attention_factor = 1.0


@dataclass(frozen=True)
class DynamicRope:
    """A base that grows with the sequence once it is longer than ``context`` positions ("dynamic NTK").

    The length is that of the whole sequence in a forward pass, or of what is cached and what is new: in decoding, keys
    keep the angles they were cached with.
    """

    factor: float
    context: int
    kind: Literal["dynamic"] = "dynamic"

    attention_factor = 1.0


@dataclass(frozen=True)
class YarnRope:
    """Pairs that turn more than ``beta_fast`` times in ``context`` positions stay, those that turn less than
    ``beta_slow`` times are slowed by ``factor``, with a ramp between (YaRN, arXiv 2309.00071, section 3.2).
    ``truncate``: the ramp begins and ends at whole pairs."""

    factor: float
    context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"


@dataclass(frozen=True)
class LongRope:
    """Each pair divided by a factor of its own: ``short`` up to ``context`` positions, ``long`` beyond (LongRoPE,
    arXiv 2402.13753). Which one is said by the length of the sequence, as for DynamicRope."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int
    attention_factor: float
    kind: Literal["longrope"] = "longrope"


@dataclass(frozen=True)
class Llama3Rope:
    """Wavelengths above ``context`` / ``low_freq_factor`` are stretched by ``factor``, those below ``context`` /
    ``high_freq_factor`` stay, with a ramp between (Llama 3.1)."""

    factor: float
    context: int
    low_freq_factor: float
    high_freq_factor: float
    kind: Literal["llama3"] = "llama3"

    attention_factor = 1.0


@dataclass(frozen=True)
class ProportionalRope:
    """Of all pairs of the head only the first ``share`` turn, at the speeds they have in a head that turns as a whole;
    positions divided by ``factor``."""

    share: float
    factor: float = 1.0
    kind: Literal["proportional"] = "proportional"

    attention_factor = 1.0


RopeScaling = Union[LinearRope, DynamicRope, YarnRope, LongRope, Llama3Rope, ProportionalRope]


def critical_lengths(scaling: RopeScaling) -> tuple[int, ...]:
    """Lengths of sequences that between them show every way the pairs turn."""
    if isinstance(scaling, DynamicRope | LongRope):
        return scaling.context, 2 * scaling.context + 1
    return (1,)


def inverse_frequencies(scaling: RopeScaling | None, base: float, rotated: int, length: int) -> tuple[float, ...]:
    """Radians per position of each of the ``rotated``/2 pairs, in a sequence of ``length`` positions."""
    if not isinstance(scaling, DynamicRope):  # of which only one is needed for each length class
        length = int(isinstance(scaling, LongRope) and length > scaling.context)
    return _frequencies(scaling, base, rotated, length)


@lru_cache(maxsize=256)
def _frequencies(scaling: RopeScaling | None, base: float, rotated: int, length: int) -> tuple[float, ...]:
    if isinstance(scaling, DynamicRope):
        stretch = scaling.factor * max(length, scaling.context) / scaling.context - (scaling.factor - 1)
        base = base * stretch ** (rotated / (rotated - 2))
    plain = [base ** -(i / rotated) for i in range(0, rotated, 2)]
    if scaling is None or isinstance(scaling, DynamicRope):
        return tuple(plain)
    if isinstance(scaling, LinearRope):
        return tuple(f / scaling.factor for f in plain)
    if isinstance(scaling, LongRope):
        return tuple(f / by for f, by in zip(plain, scaling.long if length else scaling.short, strict=True))
    if isinstance(scaling, Llama3Rope):
        return tuple(_llama3(scaling, f) for f in plain)
    if isinstance(scaling, ProportionalRope):
        turning = int(scaling.share * rotated // 2)
        return tuple(f / scaling.factor if i < turning else 0.0 for i, f in enumerate(plain))
    betas = scaling.beta_fast, scaling.beta_slow
    low, high = (_pair_that_turns(times, scaling.context, base, rotated) for times in betas)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    width = high - low if high != low else 0.001
    slowed = (min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain)))
    return tuple(f / scaling.factor * slow + f * (1 - slow) for f, slow in zip(plain, slowed))


def _pair_that_turns(times: float, context: int, base: float, rotated: int) -> float:
    """The (fractional) pair that turns ``times`` times in ``context`` positions: YaRN's inverse of eq. 17."""
    return rotated * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))


def _llama3(scaling: Llama3Rope, frequency: float) -> float:
    turns = scaling.context * frequency / (2 * math.pi)  # of the pair in the context trained on
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
