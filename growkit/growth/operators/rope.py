"""Other rotary angles, for contexts beyond the one trained on. No tensor changes; what attention computes does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from growkit.errors import ConfigError
from growkit.growth.operator import (
    OPERATORS,
    Exactness,
    Grown,
    GrowthOperator,
    TensorGrowth,
    attention_layers,
    each_attention,
    whole_number,
)
from growkit.models.config import Attention, ModelConfig
from growkit.models.rope import LinearRope, YarnRope, critical_lengths, inverse_frequencies


class Rope(GrowthOperator):
    """``rope_base`` is a new base. ``rope_factor`` s is how many times as long a context becomes as ``rope_context``,
    the one trained on, which only yarn asks for."""

    name = "rope"
    fields = ("rope_base", "rope_factor")
    options = ("rope_context",)
    methods = {
        "abf": "a new base, named by rope_base (adjusted base frequency)",
        "ntk": "the base times s^(d/(d−2)), d rotated dimensions: the slowest pair is slowed by s, the fastest stays",
        "yarn": "slow pairs are slowed by s, fast ones stay, scores are scaled by (0.1 ln s + 1)²",
        "linear": "every position is divided by s (position interpolation)",
    }
    source = (
        "abf: Xiong et al., arXiv 2309.16039; ntk: bloc97 (2023), as in Peng et al., arXiv 2309.00071, section 3.1; "
        "yarn: the same paper, section 3.4; linear: Chen et al., arXiv 2306.15595"
    )

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        wanted = "rope_base" if method == "abf" else "rope_factor"
        for field in fields.keys() - {wanted, *(self.options if method == "yarn" else ())}:
            other = "abf" if field == "rope_base" else "yarn" if field == "rope_context" else "ntk, yarn or linear"
            mend = f"name it in methods: {{rope: {other}}}, or give {wanted} instead"
            problem = f"means nothing to the method {method}"
            raise ConfigError("bad-target", problem, key=f"grow.{field}", value=fields[field], mend=mend)
        if wanted not in fields:
            mend = f"say grow.{wanted} as well, or drop it"
            raise ConfigError("bad-target", "does not say how far", key="grow.rope_context", mend=mend)
        value = _number(fields[wanted], f"grow.{wanted}", above=0 if method == "abf" else 1)
        context = None
        if method == "yarn":
            if "rope_context" not in fields:
                mend = "say grow.rope_context, the tokens of a sequence it was trained on so far"
                problem = "does not say from which context"
                raise ConfigError("bad-target", problem, key="grow.rope_factor", value=value, mend=mend)
            context = whole_number(fields["rope_context"], "rope_context")

        attention_layers(config, wanted, value)
        return each_attention(config, config, lambda mixer, _: _turned(mixer, method, value, context))

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        def change(mixer: Attention, wanted: Attention) -> Attention:
            return dataclasses.replace(mixer, rope_base=wanted.rope_base, rope_scaling=wanted.rope_scaling)

        return each_attention(config, target, change)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        mixers = [(old.mixer, new.mixer) for old, new in zip(source.layers, target.layers, strict=True)]
        pairs = [(a, b) for a, b in mixers if isinstance(a, Attention) and isinstance(b, Attention)]
        if all(_angles(old) == _angles(new) for old, new in pairs):
            return Exactness("exact", "every rotary pair turns as before")
        return Exactness("not", "rotary pairs turn at other speeds than those the weights were trained with")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        assert growth.old is not None, "rope adds no parameters"
        return Grown(growth.old)


def _turned(mixer: Attention, method: str, value: float, context: int | None) -> Attention:
    if method == "abf":
        return dataclasses.replace(mixer, rope_base=value)
    if method == "linear":
        return dataclasses.replace(mixer, rope_scaling=LinearRope(value))
    if method == "yarn":
        assert context is not None
        return dataclasses.replace(mixer, rope_scaling=YarnRope(value, context, 0.1 * math.log(value) + 1))
    rotated = mixer.rotated
    if rotated <= 2:
        problem = f"cannot slow the {rotated} rotated dimensions of a head by their base"
        mend = "use methods: {rope: linear} or {rope: yarn}"
        raise ConfigError("bad-target", problem, key="grow.rope_factor", value=value, mend=mend)
    return dataclasses.replace(mixer, rope_base=mixer.rope_base * value ** (rotated / (rotated - 2)))


def _angles(mixer: Attention) -> object:
    """All that attention sees of rotary positions, at every length that tells."""
    base, rotated, scaling = mixer.rope
    lengths = critical_lengths(scaling) if scaling is not None else (1,)
    scale = scaling.attention_factor if scaling is not None else 1.0
    return scale, {inverse_frequencies(scaling, base, rotated, length) for length in lengths}


def _number(value: Any, key: str, *, above: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise ConfigError("bad-target", f"must be a number above {above}", key=key, value=value)
    return float(value)


OPERATORS.register("rope")(Rope())
