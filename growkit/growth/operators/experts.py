"""More experts: a dense block becomes a mixture of its copies, a mixture gets clones of its experts.

Copies compute what the one did, and gates add up to 1: so does their mixture, whoever is chosen. Clones of an expert
that score alike, m of each, take the places of one if a token goes through m times as many. If it does not, two clones
would take the places of two experts, for ever: then the new experts get scores of their own.
"""

from __future__ import annotations

import dataclasses
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
    each_layer,
    not_smaller,
    whole_number,
)
from growkit.models.config import DenseMLP, LayerSpec, ModelConfig, MoEMLP
from growkit.models.presets import mixture

NOISE = 0.5  # clone_noise: standard deviation, as a share of the weights' own root mean square
DEFAULT = MoEMLP(1, 2, 2)  # what a dense block becomes, where a recipe does not say


class Experts(GrowthOperator):
    name = "experts"
    fields = ("num_experts",)
    options = ("experts_per_token", "balance_loss")
    methods = {
        "copy": "experts are copies, of the dense block or of experts; the router is drawn small, or copied too",
        "clone_noise": "copies of experts, and noise on what they write that sums to zero over the clones of one",
    }
    source = (
        "copy: Sparse Upcycling, arXiv 2212.05055, with gates that add up to 1; clone_noise: HyperCloning's noise, "
        "arXiv 2409.12903, on experts (docs/operators/experts.md)"
    )

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        if "num_experts" not in fields:
            key = next(iter(fields))
            mend = "say grow.num_experts as well"
            raise ConfigError("bad-target", "has no experts to grow", key=f"grow.{key}", value=fields[key], mend=mend)
        count = whole_number(fields["num_experts"], "num_experts")
        layers = tuple(dataclasses.replace(layer, mlp=_target(layer, count, fields, method)) for layer in config.layers)
        return dataclasses.replace(config, layers=layers)

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        def mixed(layer: LayerSpec, wanted: LayerSpec) -> LayerSpec:
            if isinstance(layer.mlp, DenseMLP | MoEMLP) and isinstance(wanted.mlp, MoEMLP):
                return dataclasses.replace(layer, mlp=dataclasses.replace(wanted.mlp, dim=layer.mlp.dim))
            return layer

        return each_layer(config, target, mixed)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        mixtures = [layer for layer in source.layers if isinstance(layer.mlp, MoEMLP)]
        if not all(_alike(layer.mlp, target.layer(layer.id).mlp) for layer in mixtures):
            return Exactness("not", "a token goes through other experts than before")
        if mixtures:
            reason = "the clones of an expert are chosen together and share its gate"
            return Exactness("exact", reason, rescales=method == "clone_noise")
        return Exactness("exact", "the experts are copies of the block, and their gates add up to 1")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        spec, old, old_spec = growth.spec, growth.old, growth.old_spec
        if old is None or old_spec is None:
            return Grown(growth.fresh())  # a router
        if spec.axes == old_spec.axes:
            return Grown(old)
        assert spec.layer is not None
        block, mixture = growth.source.layer(spec.layer).mlp, growth.target.layer(spec.layer).mlp
        (before, k_before), (after, k_after) = _sizes(block), _sizes(mixture)
        if spec.axes[spec.out_dim or 0].names == {"experts"} and not _alike(block, mixture):
            return Grown(expand(old, old_spec.axes, growth.fresh(), spec.axes))
        placement = {"experts": [i % before for i in range(after)]}
        value = expand(old, old_spec.axes, old.new_empty(spec.shape), spec.axes, placement)
        if growth.method == "clone_noise" and spec.writes_residual:
            assert spec.init_std is not None
            drawn = (growth.fresh() / spec.init_std).view(-1, before, *spec.shape[1:])
            noise = (drawn - drawn.mean(0)).flatten(0, 1)
            value += NOISE * old.square().mean().sqrt() * noise
        # The copies' gradients add up to the one's. An expert sees k/E of the tokens, each with a gate of about 1/k: of
        # gradients that are mostly noise from token to token the square goes by (k/E)/k², not by the mean's 1/E².
        share = before / after
        return Grown(value, gradient=share, placement=placement, squared=share * k_before / k_after)


def _target(layer: LayerSpec, count: int, fields: Mapping[str, Any], method: str) -> MoEMLP:
    old = layer.mlp
    if not isinstance(old, DenseMLP | MoEMLP):
        mend = "grow mlp_tokens, or start from model.preset=transformer"
        raise ConfigError("nothing-to-grow", "the MLP is not dense", key="grow.num_experts", value=count, mend=mend)
    if isinstance(old, DenseMLP) and old.steady_dim is not None:
        problem = "has no masks for experts, which this stage makes of the block"
        raise ConfigError("method-does-not-fit", problem, key="methods.mlp", value="masked", mend="use zero_down")
    now = old if isinstance(old, MoEMLP) else DEFAULT
    chosen = whole_number(fields.get("experts_per_token", now.experts_per_token), "experts_per_token")
    balance = fields.get("balance_loss", now.balance_loss)
    if isinstance(balance, bool) or not isinstance(balance, int | float):
        raise ConfigError("bad-target", "must be a number", key="grow.balance_loss", value=balance)
    if isinstance(old, MoEMLP):
        not_smaller(count, old.num_experts, "num_experts")
        not_smaller(chosen, old.experts_per_token, "experts_per_token")
        if count % old.num_experts:
            problem, mend = f"is not a multiple of {old.num_experts}", f"use {2 * old.num_experts}"
            raise ConfigError("bad-target", problem, key="grow.num_experts", value=count, mend=mend)
    new = mixture(old, count, chosen, balance, "grow")
    if method == "clone_noise" and not (isinstance(old, MoEMLP) and _alike(old, new)):
        problem = "needs clones that are always chosen together"
        mend = "use the method copy"
        if isinstance(old, MoEMLP):
            mend += f", or experts_per_token={old.experts_per_token * count // old.num_experts}"
        raise ConfigError("method-does-not-fit", problem, key="methods.experts", value=method, mend=mend)
    return new


def _sizes(mlp: object) -> tuple[int, int]:
    """(experts, experts per token); a dense block is one expert that every token goes through."""
    return (mlp.num_experts, mlp.experts_per_token) if isinstance(mlp, MoEMLP) else (1, 1)


def _alike(old: object, new: object) -> bool:
    """Whether a token goes through as large a share of the experts as before."""
    (before, k_before), (after, k_after) = _sizes(old), _sizes(new)
    return after * k_before == before * k_after


OPERATORS.register("experts")(Experts())
