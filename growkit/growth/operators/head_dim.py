"""Wider heads. Rotary positions turn pair i of r rotated dimensions by base^(−2i/r): with m times as many dimensions
the old pair i has to be pair m·i, where the angle is the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from growkit.errors import ConfigError
from growkit.growth.expand import expand
from growkit.growth.operator import (
    OPERATORS,
    Exactness,
    Grown,
    GrowthOperator,
    TensorGrowth,
    attention_layers,
    attention_of,
    each_attention,
    not_smaller,
    whole_number,
)
from growkit.growth.operators.width import padded_norm
from growkit.models.axes import NEW
from growkit.models.config import Attention, ModelConfig
from growkit.models.rope import LongRope, RopeScaling, critical_lengths, inverse_frequencies

ANGLE_TOLERANCE = 1e-12  # relative: the same speed by another formula, a few float64 roundings


class HeadDim(GrowthOperator):
    name = "head_dim"
    fields = ("head_dim",)
    methods = {
        "interleave": "new rotary pairs between the old ones; new queries ask nothing yet, new values go nowhere"
    }
    source = "growkit (docs/operators/head_dim.md)"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        dim = whole_number(fields["head_dim"], "head_dim")
        attention_layers(config, "head_dim", dim)

        def grown(mixer: Attention, _: Attention) -> Attention:
            not_smaller(dim, mixer.head_dim, "head_dim")
            if dim % mixer.head_dim:
                mend = f"use {2 * mixer.head_dim}: the rotary angles of the old dimensions exist only there"
                problem = f"is not a multiple of {mixer.head_dim}"
                raise ConfigError("bad-target", problem, key="grow.head_dim", value=dim, mend=mend)
            return _widened(mixer, dim)

        return each_attention(config, config, grown)

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        def widened(mixer: Attention, wanted: Attention) -> Attention:
            return _widened(mixer, wanted.head_dim) if wanted.head_dim % mixer.head_dim == 0 else mixer

        return each_attention(config, target, widened)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        for layer in attention_layers(source, "head_dim", None):
            before, after = attention_of(source, layer.id), attention_of(target, layer.id)
            scaling = before.rope_scaling
            if scaling is not None and not _angles_stay(before, after, scaling):
                reason = f"in wider heads the {scaling.kind} scaling of rotary positions gives old pairs other angles"
                return Exactness("not", reason)
        reason = "old rotary pairs keep their angles, √(d′/d) in the queries makes up for the scale of the scores"
        return Exactness("exact", reason, rescales=True)

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        spec, old, old_spec = growth.spec, growth.old, growth.old_spec
        assert old is not None and old_spec is not None, "wider heads add no parameters"
        if spec.shape == old_spec.shape:
            return Grown(old)
        before, after = attention_of(growth.source, spec.layer), attention_of(growth.target, spec.layer)
        part = spec.local.split(".")[1]  # q, k, v, o, q_norm or k_norm of "attention.…"
        placement = None if part in ("v", "o") else {"head_dim": rotary_placement(before, after)}
        new = growth.fresh()
        if part in ("q", "o"):  # a zero on one side of every product: of query and key, of value and output
            new.zero_()
        scale, root = 1.0, math.sqrt(after.head_dim / before.head_dim)
        if part == "q" and after.qk_norm is None:
            scale = root  # scores are divided by √d′ now; under QK-norm the norm of the padded query does this
        elif part == "k" and after.qk_norm is not None:
            # New dimensions of a key count in its norm, and zeros would be dead against the query's zeros. Clones leave
            # the mean square alone, and divided by the root they fit the smaller eps.
            scale = 1 / root
            clones = {"head_dim": rotary_placement(before, after, clones=True)}
            new = expand(old * scale, old_spec.axes, new, spec.axes, clones)
        return Grown(expand(old * scale, old_spec.axes, new, spec.axes, placement), 1 / scale, placement)


def _widened(mixer: Attention, dim: int) -> Attention:
    """A mean over more zeros is smaller by d/d′, so QK-norm's eps is too. Factors that a scaling of the angles has for
    each pair go with the pair, and its new neighbours take them over."""
    ratio, times = mixer.head_dim / dim, dim // mixer.head_dim
    norm = padded_norm(mixer.qk_norm, ratio) if mixer.qk_norm is not None else None
    scaling = mixer.rope_scaling
    if isinstance(scaling, LongRope):
        short, long = (tuple(f for f in by for _ in range(times)) for by in (scaling.short, scaling.long))
        scaling = dataclasses.replace(scaling, short=short, long=long)
    return dataclasses.replace(mixer, head_dim=dim, qk_norm=norm, rope_scaling=scaling)


def _angles_stay(before: Attention, after: Attention, scaling: RopeScaling) -> bool:
    """Whether pair i turns as pair m·i does in heads m times as wide, whatever the length of the sequence."""
    times = after.head_dim // before.head_dim
    for length in critical_lengths(scaling):
        (base, rotated, old), (_, wider, new) = before.rope, after.rope
        kept = inverse_frequencies(new, base, wider, length)[::times]
        turned = zip(inverse_frequencies(old, base, rotated, length), kept, strict=True)
        if not all(math.isclose(a, b, rel_tol=ANGLE_TOLERANCE) for a, b in turned):
            return False
    return True


def rotary_placement(before: Attention, after: Attention, *, clones: bool = False) -> list[int]:
    """What each dimension of the wider head holds. Rotated dimensions are two halves, i and i + r/2 of a pair.
    ``clones``: every place that would be new holds one more of an old dimension, so that all are there equally often.
    """
    times, pairs = after.head_dim // before.head_dim, round(before.head_dim * before.rope_fraction) // 2
    rest = range(2 * pairs, before.head_dim)
    held = [*(i // times for i in range(times * pairs)), *(pairs + i // times for i in range(times * pairs))]
    kept = [i % times == 0 for i in range(2 * times * pairs)]
    held += [*rest] * times
    kept += [i < len(rest) for i in range(times * len(rest))]
    return [i if stays or clones else NEW for i, stays in zip(held, kept, strict=True)]


OPERATORS.register("head_dim")(HeadDim())
