"""More parameter tokens: append banks of key/value pairs to Pattention projections (TokenFormer, section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from growkit.errors import ConfigError
from growkit.growth.operator import (
    OPERATORS,
    Exactness,
    Grown,
    GrowthOperator,
    TensorGrowth,
    each_layer,
    not_smaller,
    whole_number,
)
from growkit.growth.operators.tokens_at_work import most_used
from growkit.growth.state import Moments
from growkit.models.config import PROJECTIONS, LayerSpec, ModelConfig, Pattention, PattentionMLP, projections
from growkit.models.presets import initial_tau

if TYPE_CHECKING:
    from torch import Tensor

# A key for all projections of a mixer, and which they are; mlp_tokens and one for each projection are beside it.
TOGETHER = {f"{kind}_tokens": parts for kind, parts in PROJECTIONS.items()}
FITTING = {"bank": ("bank", "masked"), "shared": ("held", "published", "annealed")}  # norm: methods that append to it


class ParamTokens(GrowthOperator):
    name = "param_tokens"
    fields = (*TOGETHER, *(f"{part}_tokens" for parts in TOGETHER.values() for part in parts), "mlp_tokens")
    methods = {
        "bank": "a bank with its own norm: random keys, zero values",
        "held": "inside the shared norm, its τ held: zero keys, random values",
        "published": "inside the shared norm as the public code does it: random rows, τ from the new count",
        "shrink": "fewer: of each bank the tokens stay that write most on a probe; τ held",
        "masked": "a bank with its own norm, keys and values random; it comes in over the stage's grow_time",
        "annealed": "as held, and over the stage's grow_time τ goes to what is published for the new count",
    }
    looks = frozenset({"shrink"})
    source = "TokenFormer, arXiv 2410.23168, section 3.3; masked: MSG, arXiv 2305.02869; banks, annealed: growkit"

    def default_method(self, config: ModelConfig) -> str:
        shared = any(p.scope == "shared" for layer in config.layers for p in pattentions(layer).values())
        return "held" if shared else "bank"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        wanted = {name: whole_number(value, name) for name, value in fields.items()}
        for together, parts in TOGETHER.items():
            if together in wanted:
                common = wanted.pop(together)
                wanted = {f"{part}_tokens": common for part in parts} | wanted
        layers = []
        for layer in config.layers:
            grown = {}
            for part, projection in pattentions(layer).items():
                if (count := wanted.get(f"{part}_tokens")) is not None:
                    grown[part] = _append(projection, count, method, next(f for f in fields if _names(f, part)))
            layers.append(with_pattentions(layer, grown))
        there = {part for layer in config.layers for part in pattentions(layer)}
        for field, value in fields.items():
            if not any(_names(field, part) for part in there):
                mend = "grow embed_dim, mlp_dim or num_layers, or start from model.preset=tokenformer"
                problem = "the model has no parameter tokens there"
                raise ConfigError("nothing-to-grow", problem, key=f"grow.{field}", value=value, mend=mend)
        return dataclasses.replace(config, layers=tuple(layers))

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        return each_layer(config, target, lambda layer, wanted: with_pattentions(layer, pattentions(wanted)))

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if method == "bank":
            return Exactness("exact", "the new banks' values are zero and their norms are their own")
        if method == "masked":
            return Exactness("exact", "the mask on the new banks is at 0 and their norms are their own")
        if method == "shrink":
            return Exactness("not", "tokens are dropped")
        if method == "published":
            return Exactness("not", "new rows are random and enter the norm of the old ones, and τ changes")
        if any(p.theta == "softmax" for layer in source.layers for p in pattentions(layer).values()):
            return Exactness("not", "a zero score still takes its share of a softmax")
        tau = "τ is held" if method == "held" else "τ starts where it was"
        return Exactness("exact", f"zero keys add nothing to the shared norm, gelu(0) = 0, and {tau}")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        if growth.old is not None:
            kept = _kept(growth)
            return Grown(growth.old) if kept is None else _some(growth.old, growth.spec.local, kept)
        fresh = growth.fresh()
        zeroed = {"bank": "values", "held": "keys", "annealed": "keys"}.get(growth.method)
        return Grown(fresh.zero_() if growth.spec.role == zeroed else fresh)


def _some(old: Tensor, local: str, kept: Tensor) -> Grown:
    """The rows ``kept`` of the old tensor, and of its moments."""

    def moments(layer: Mapping[str, Moments]) -> Moments:
        whole = layer[local]
        return Moments(whole.exp_avg[kept], whole.exp_avg_sq[kept], whole.step)

    return Grown(old[kept], moments=moments)


def _kept(growth: TensorGrowth) -> Tensor | None:
    """Which rows of the old tensor stay; None: all."""
    spec, old_spec = growth.spec, growth.old_spec
    if old_spec is None or spec.shape == old_spec.shape:
        return None
    assert spec.layer is not None and spec.bank is not None and growth.seen is not None
    prefix, before = pattention_of(growth.source.layer(spec.layer), spec.local)
    _, after = pattention_of(growth.target.layer(spec.layer), spec.local)
    return most_used(growth.seen, growth.layer, prefix, before, after.banks)[spec.bank]


def _names(field: str, part: str) -> bool:
    return field == f"{part}_tokens" or part in TOGETHER.get(field, ())


def pattentions(layer: LayerSpec) -> dict[str, Pattention]:
    """The Pattention projections of a layer: q, k, v, o or those of a Mamba mixer, mlp."""
    parts = projections(layer.mixer)
    if isinstance(layer.mlp, PattentionMLP):
        parts["mlp"] = layer.mlp.projection
    return {name: p for name, p in parts.items() if isinstance(p, Pattention)}


def pattention_of(layer: LayerSpec, local: str) -> tuple[str, Pattention]:
    """How the names of the projection's parameters begin that ``local`` is one of, and that projection of ``layer``."""
    prefix = local.rsplit(".", 2)[0] + "."  # attention.q. of attention.q.keys.0
    return prefix, pattentions(layer)["mlp" if prefix.startswith("mlp.") else prefix.split(".")[1]]


def with_pattentions(layer: LayerSpec, parts: Mapping[str, Pattention]) -> LayerSpec:
    dense: dict[str, Any] = {name: p for name, p in parts.items() if name in PROJECTIONS[layer.mixer.kind]}
    mixer = dataclasses.replace(layer.mixer, **dense)
    mlp = PattentionMLP(parts["mlp"]) if "mlp" in parts else layer.mlp
    return dataclasses.replace(layer, mixer=mixer, mlp=mlp)


def _append(projection: Pattention, count: int, method: str, field: str) -> Pattention:
    current = projection.tokens
    if method == "shrink":
        return _shrunk(projection, count, field)
    not_smaller(
        count,
        current,
        field,
        mend="growth only enlarges, so choose {0} or more, or the method shrink, which drops tokens",
    )
    if count == current:
        return projection
    if method not in FITTING[projection.scope]:
        raise ConfigError(
            "method-does-not-fit",
            f"does not fit parameter tokens whose norm is '{projection.scope}'",
            key="methods.param_tokens",
            value=method,
            mend=f"use {' or '.join(FITTING[projection.scope])}",
        )
    new = count - current
    grown = dataclasses.replace(projection, banks=(*projection.banks, new))
    if projection.scope == "bank":
        steady = len(projection.banks) if method == "masked" else None
        return dataclasses.replace(
            grown, taus=(*projection.taus, initial_tau(projection.theta, new)), steady_banks=steady
        )
    if method == "held":
        return grown
    start = projection.taus if method == "annealed" else None
    return dataclasses.replace(grown, taus=(initial_tau(projection.theta, count),), tau_from=start)


def _shrunk(projection: Pattention, count: int, field: str) -> Pattention:
    """Every bank smaller in proportion, by largest remainders; no bank is lost."""
    banks, current = projection.banks, projection.tokens
    if not len(banks) <= count <= current:
        mend = f"choose {len(banks)} to {current}" + (", or consolidate the banks before" if len(banks) > 1 else "")
        problem = f"is not a part of the {current} tokens in {len(banks)} banks that there are"
        raise ConfigError("bad-target", problem, key=f"grow.{field}", value=count, mend=mend)
    spare, rest = count - len(banks), current - len(banks)  # beyond the one of each bank that stays
    exact = [(size - 1) * spare / max(rest, 1) for size in banks]
    sizes = [1 + int(share) for share in exact]
    by_remainder = sorted(range(len(banks)), key=lambda i: int(exact[i]) - exact[i])
    for bank in by_remainder[: count - sum(sizes)]:
        sizes[bank] += 1
    return dataclasses.replace(projection, banks=tuple(sizes))


OPERATORS.register("param_tokens")(ParamTokens())
