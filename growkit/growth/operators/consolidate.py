"""Fewer banks: the parameter tokens of all banks laid into one, under one norm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from growkit.errors import ConfigError
from growkit.growth.operator import OPERATORS, Exactness, Grown, GrowthOperator, TensorGrowth, each_layer, whole_number
from growkit.growth.operators.param_tokens import pattention_of, pattentions, with_pattentions
from growkit.growth.operators.tokens_at_work import scales_under_one_norm
from growkit.growth.state import Moments
from growkit.models.config import LayerSpec, ModelConfig, Pattention

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Consolidate(GrowthOperator):
    name = "consolidate"
    fields = ("token_banks",)
    methods = {
        "fit": "one norm for all banks; keys and values scaled so that they do on a probe what they did",
        "join": "banks that share their norm already are laid together as they are",
    }
    looks = frozenset({"fit"})
    source = "growkit (docs/operators/consolidate.md)"

    def default_method(self, config: ModelConfig) -> str:
        return "join" if _scopes(config) == {"shared"} else "fit"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        if (count := whole_number(fields["token_banks"], "token_banks")) != 1:
            problem = "banks can be laid together into one only"
            raise ConfigError("bad-target", problem, key="grow.token_banks", value=count, mend="use 1")
        if not (scopes := _scopes(config)):
            raise ConfigError(
                "nothing-to-grow", "no projection has more than one bank", key="grow.token_banks", value=count
            )
        if scopes != {"shared" if method == "join" else "bank"}:
            mend = f"use {'join' if 'shared' in scopes else 'fit'}"
            problem = f"does not fit parameter tokens whose norm is '{scopes.pop()}'"
            raise ConfigError("method-does-not-fit", problem, key="methods.consolidate", value=method, mend=mend)

        def joined(layer: LayerSpec) -> LayerSpec:
            return with_pattentions(layer, {part: in_one(p) for part, p in pattentions(layer).items()})

        return dataclasses.replace(config, layers=tuple(joined(layer) for layer in config.layers))

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        def joined(layer: LayerSpec, wanted: LayerSpec) -> LayerSpec:
            there = pattentions(wanted)
            parts = {part: in_one(p) if _is_joined(p, there[part]) else p for part, p in pattentions(layer).items()}
            return with_pattentions(layer, parts)

        return each_layer(config, target, joined)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if method == "join":
            return Exactness("exact", "the banks shared their norm already")
        return Exactness("not", "banks with norms of their own now share one")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        factors = self._factors(growth)
        if factors is None:
            assert growth.old is not None
            return Grown(growth.old)
        import torch

        parts = {name: growth.layer[name] * factor for name, factor in factors.items()}
        sizes = {name: part.shape for name, part in parts.items()}
        return Grown(torch.cat(list(parts.values())), moments=lambda layer: _moments(layer, factors, sizes))

    def _factors(self, growth: TensorGrowth) -> dict[str, float] | None:
        """Local name → factor of the tensors that this one is laid together from; None if it stays as it is."""
        spec = growth.spec
        if spec.bank is None:
            return None
        assert spec.layer is not None
        prefix, before = pattention_of(growth.source.layer(spec.layer), spec.local)
        _, after = pattention_of(growth.target.layer(spec.layer), spec.local)
        if before == after:
            return None
        factors = [1.0] * len(before.banks)
        if growth.method == "fit":
            assert growth.seen is not None
            keys, values = scales_under_one_norm(growth.seen, growth.layer, prefix, before, after)
            factors = keys if spec.role == "keys" else values
        return {f"{prefix}{spec.role}.{bank}": factor for bank, factor in enumerate(factors)}


def _moments(layer: Mapping[str, Moments], factors: Mapping[str, float], sizes: Mapping[str, torch.Size]) -> Moments:
    """Moments laid together as the tensors were, which were multiplied by ``factors``; a bank that was never updated
    waits with none, and with the mean of the others' squares."""
    import torch

    mean = torch.cat([layer[name].exp_avg_sq.flatten() for name in factors if name in layer]).mean()

    def laid(kind: str, power: int, missing: Tensor) -> Tensor:
        parts = []
        for name, factor in factors.items():
            waiting = missing.expand(sizes[name])
            parts.append(getattr(layer[name], kind) / factor**power if name in layer else waiting)
        return torch.cat(parts)

    steps = max(layer[name].step for name in factors if name in layer)
    return Moments(laid("exp_avg", 1, torch.zeros_like(mean)), laid("exp_avg_sq", 2, mean), steps)


def in_one(spec: Pattention) -> Pattention:
    """All banks of ``spec`` in one; its τ is as large as theirs together (√n for τ_g = √n_g; n under a softmax)."""
    if len(spec.banks) == 1:
        return spec
    taus = spec.taus
    if spec.scope == "bank":
        taus = (sum(taus),) if spec.theta == "softmax" else (math.hypot(*taus),)
    return dataclasses.replace(spec, banks=(spec.tokens,), taus=taus)


def _is_joined(spec: Pattention, wanted: Pattention) -> bool:
    """Whether ``wanted`` has them in one: alone, and smaller if tokens are dropped as well, or with banks behind it."""
    return len(spec.banks) > 1 and (len(wanted.banks) == 1 or wanted.banks[0] == spec.tokens)


def _scopes(config: ModelConfig) -> set[str]:
    """The kinds of norm of projections with several banks."""
    return {p.scope for layer in config.layers for p in pattentions(layer).values() if len(p.banks) > 1}


OPERATORS.register("consolidate")(Consolidate())
