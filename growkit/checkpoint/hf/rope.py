"""Rotary positions as a config.json states them: ``rope_parameters``, or ``rope_scaling`` and its neighbours of old.

Which value wins where there are several is transformers' own order (modeling_rope_utils.py, 5.23). No torch.
"""

from __future__ import annotations

import math
from typing import Any

from growkit.checkpoint.hf.settings import Settings
from growkit.errors import ConfigError
from growkit.models.config import Attention
from growkit.models.rope import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    ProportionalRope,
    RopeScaling,
    YarnRope,
)

DEFAULT_BASE = 10000.0
# What older files say outside of ``rope_parameters``; where that is written, these must go.
OLDER = (
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "original_max_position_embeddings",
)


def read_rope(
    config: Settings, head_dim: int, *, base_key: str, share_key: str, share: float
) -> tuple[float, float, RopeScaling | None]:
    """(base, fraction of the head that turns, scaling). ``base_key``, ``share_key``: what the family calls them outside
    of ``rope_parameters``, ``share``: its default. Raises ConfigError for a kind growkit does not know."""
    parameters = config.section("rope_scaling") or config.section("rope_parameters") or Settings({}, config.where)
    base = parameters.positive("rope_theta", float, config.positive(base_key, float, DEFAULT_BASE))
    share = parameters.get("partial_rotary_factor", float, config.get(share_key, float, share))
    if not 0 < share <= 1:
        raise config.refuse(share_key, f"turns the share {share:g} of a head, which must be in (0, 1]")
    kind = parameters.get("rope_type", str, parameters.get("type", str, "default"))
    if any(isinstance(value, dict) for value in parameters.values.values()):
        raise config.refuse("rope_parameters", "has angles of their own for different kinds of layers")
    if kind == "proportional":
        return base, 1.0, ProportionalRope(share, parameters.positive("factor", float, 1.0))
    rotated = int(head_dim * share)
    if rotated % 2 or rotated == 0:
        raise config.refuse(share_key, f"turns {rotated} dimensions of a head, which must be an even number")
    fraction = share if round(head_dim * share) == rotated else rotated / head_dim
    return base, fraction, _scaling(kind, parameters, config, rotated)


def _scaling(kind: str, parameters: Settings, config: Settings, rotated: int) -> RopeScaling | None:
    most = config.get("max_position_embeddings", int, 2048)
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(parameters.positive("factor", float))
    if kind == "dynamic":
        if rotated == 2:
            raise parameters.refuse("rope_type", "has no meaning for a single pair of dimensions")
        return DynamicRope(parameters.positive("factor", float), most)
    if kind not in ("yarn", "longrope", "llama3"):
        mend = "growkit knows default, linear, dynamic, yarn, longrope, llama3 and proportional"
        raise parameters.refuse("rope_type", "is not a kind of rotary positions growkit knows", mend=mend)
    inside = parameters.positive("original_max_position_embeddings", int, most)
    context = config.positive("original_max_position_embeddings", int, inside)
    if kind == "llama3":
        low, high = (parameters.positive(f"{name}_freq_factor", float) for name in ("low", "high"))
        if high <= low:
            raise ConfigError(
                "out-of-range", **parameters.at("high_freq_factor"), problem=f"must be above low_freq_factor = {low:g}"
            )
        return Llama3Rope(parameters.positive("factor", float), context, low, high)
    factor = parameters.positive("factor", float, most / context)
    if kind == "yarn":
        known = _yarn_attention(parameters, factor)
        return YarnRope(
            factor,
            context,
            parameters.get("attention_factor", float, known),
            parameters.get("beta_fast", float, 0.0) or 32.0,
            parameters.get("beta_slow", float, 0.0) or 1.0,
            parameters.get("truncate", bool, True),
        )
    known = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    short, long = (_factors(parameters, name, rotated // 2) for name in ("short_factor", "long_factor"))
    return LongRope(short, long, context, parameters.get("attention_factor", float, known))


def _yarn_attention(parameters: Settings, factor: float) -> float:
    """YaRN, eq. 22, and its form with two weights (``mscale``)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    above, below = (parameters.get(name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    return scale(above) / scale(below) if above and below else scale(1.0)


def _factors(parameters: Settings, name: str, pairs: int) -> tuple[float, ...]:
    listed: list[Any] = parameters.get(name, list)
    if len(listed) != pairs or not all(isinstance(f, int | float) and f > 0 for f in listed):
        raise ConfigError(
            "bad-model", **parameters.at(name), problem=f"must be {pairs} numbers above zero, one for each pair"
        )
    return tuple(float(f) for f in listed)


def rope_fields(mixer: Attention) -> dict[str, Any]:
    """The fields of a config.json that say ``mixer``'s rotary positions; a family that turns whole heads alone has
    refused others before."""
    scaling = mixer.rope_scaling
    said: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind, "rope_theta": mixer.rope_base}
    if mixer.rotated != mixer.head_dim:
        share = mixer.rope_fraction
        if int(mixer.head_dim * share) != mixer.rotated:  # it is cut off there, not rounded
            share = math.nextafter(mixer.rotated / mixer.head_dim, 1.0)
        said["partial_rotary_factor"] = share
    fields = {"rope_parameters": said}
    if isinstance(scaling, LinearRope | DynamicRope | YarnRope | Llama3Rope | ProportionalRope):
        said["factor"] = scaling.factor
    if isinstance(scaling, YarnRope | LongRope | Llama3Rope):
        said["original_max_position_embeddings"] = scaling.context
    if isinstance(scaling, YarnRope | LongRope):
        said["attention_factor"] = scaling.attention_factor
    if isinstance(scaling, YarnRope):
        said |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    elif isinstance(scaling, LongRope):
        said |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    elif isinstance(scaling, Llama3Rope):
        said |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    elif isinstance(scaling, ProportionalRope):
        said["partial_rotary_factor"] = scaling.share
    elif isinstance(scaling, DynamicRope):
        return fields | {"max_position_embeddings": scaling.context}
    return fields
