"""Wider dense axes: the residual stream, the MLP, the heads. Each tensor is laid into a larger one along named axes.

One rule makes each exact. *width*: what writes the new residual dimensions is zero, so what reads them sees zeros and
may be random. *mlp*, *heads*: what reads the new dimensions is zero, so what writes them may be random.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from growkit.errors import ConfigError
from growkit.growth.expand import expand
from growkit.growth.operator import (
    OPERATORS,
    Exactness,
    Grown,
    GrowthOperator,
    TensorGrowth,
    not_smaller,
    whole_number,
)
from growkit.models.axes import Placement
from growkit.models.config import DenseMLP, ModelConfig, Norm
from growkit.models.spec import ParamSpec


class _Dense(GrowthOperator):
    """Expansion along ``axes``; new slices are zero where a tensor's ``zero_side`` lies on them, else fresh draws."""

    axes: frozenset[str]
    zero_side: Literal["in", "out"]

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        spec, old, old_spec = growth.spec, growth.old, growth.old_spec
        assert old is not None and old_spec is not None, f"{self.name} adds no parameters"
        if old_spec.shape == spec.shape:
            return Grown(old)
        placement = self.placement(growth)
        out_dims = {spec.out_dim} if spec.out_dim is not None else set()
        grown = {d for d, axis in enumerate(spec.axes) if axis.names & self.axes and old.shape[d] != axis.size}
        written = grown <= out_dims
        zero = written == (self.zero_side == "out")
        new = growth.fresh().zero_() if zero else growth.fresh()
        return Grown(expand(old, old_spec.axes, new, spec.axes, placement), placement=placement)

    def placement(self, growth: TensorGrowth) -> Placement | None:
        return None


class Width(_Dense):
    name = "width"
    fields = ("embed_dim",)
    methods = {"pad": "new residual dimensions start at zero; norm gains ×√(d/d′), eps ×d/d′"}
    source = "zero padding as in Net2WiderNet's sense, RMSNorm correction: growkit (docs/operators/width.md)"
    axes = frozenset({"embed"})
    zero_side = "out"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        width = whole_number(fields["embed_dim"], "embed_dim")
        not_smaller(width, config.embed_dim, "embed_dim")
        ratio = config.embed_dim / width
        return dataclasses.replace(
            config,
            embed_dim=width,
            norm=padded_norm(config.norm, ratio),
            final_norm=padded_norm(config.final_norm, ratio),
        )

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        return dataclasses.replace(
            config,
            embed_dim=target.embed_dim,
            norm=dataclasses.replace(config.norm, eps=target.norm.eps),
            final_norm=dataclasses.replace(config.final_norm, eps=target.final_norm.eps),
        )

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        kinds = {source.norm.kind, source.final_norm.kind}
        if kinds == {"rmsnorm"}:
            return Exactness(
                "exact", "padding with zeros scales the mean square by d/d′, which gain and eps undo", rescales=True
            )
        return Exactness("not", "zero padding shifts a LayerNorm's mean and variance")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        if growth.spec.role not in ("gain", "bias") or growth.spec.axes[0].names != self.axes:
            return super().grow_tensor(growth)
        assert growth.old is not None and growth.old_spec is not None
        if growth.spec.role == "bias":
            return Grown(expand(growth.old, growth.old_spec.axes, growth.fresh().zero_(), growth.spec.axes))
        scale = math.sqrt(growth.source.embed_dim / growth.target.embed_dim)
        new = growth.fresh().fill_(scale)
        return Grown(expand(growth.old * scale, growth.old_spec.axes, new, growth.spec.axes), scale=scale)


def padded_norm(norm: Norm, ratio: float) -> Norm:
    """The norm after padding, ``ratio`` = d/d′: a mean over more zeros is smaller by it, so eps is too."""
    return dataclasses.replace(norm, eps=norm.eps * ratio) if norm.kind == "rmsnorm" else norm


class MLPWidth(_Dense):
    name = "mlp"
    fields = ("mlp_dim",)
    methods = {"zero_down": "new hidden units read at random and write nothing yet"}
    source = "Net2Net-style widening with zero outgoing weights, as in GradMax, arXiv 2201.05125, without its choice"
    axes = frozenset({"mlp"})
    zero_side = "in"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        dim = whole_number(fields["mlp_dim"], "mlp_dim")
        layers = []
        for layer in config.layers:
            if not isinstance(layer.mlp, DenseMLP):
                mend = "grow mlp_tokens, or start from model.preset=transformer"
                raise ConfigError("nothing-to-grow", "the MLP is not dense", key="grow.mlp_dim", value=dim, mend=mend)
            not_smaller(dim, layer.mlp.dim, "mlp_dim")
            layers.append(dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, dim=dim)))
        return dataclasses.replace(config, layers=tuple(layers))

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        wanted = {layer.id: layer.mlp for layer in target.layers}
        layers = tuple(
            dataclasses.replace(layer, mlp=wanted[layer.id])
            if isinstance(layer.mlp, DenseMLP) and isinstance(wanted.get(layer.id), DenseMLP)
            else layer
            for layer in config.layers
        )
        return dataclasses.replace(config, layers=layers)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        return Exactness("exact", "the new hidden units' outgoing weights are zero")


class Heads(_Dense):
    name = "heads"
    fields = ("num_heads", "num_kv_heads")
    methods = {"zero_out": "new heads attend at random and write nothing yet; grouped queries keep their group"}
    source = "head appending as in LEMON, arXiv 2310.07999, with zero outgoing weights"
    axes = frozenset({"heads", "kv_heads"})
    zero_side = "in"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        layers = []
        for layer in config.layers:
            mixer = layer.mixer
            group = mixer.num_heads // mixer.num_kv_heads
            heads = whole_number(fields.get("num_heads", mixer.num_heads), "num_heads")
            # An ungrouped model stays ungrouped; a grouped one keeps its kv heads unless told otherwise.
            default = heads if group == 1 else mixer.num_kv_heads
            kv_heads = whole_number(fields.get("num_kv_heads", default), "num_kv_heads")
            not_smaller(heads, mixer.num_heads, "num_heads")
            not_smaller(kv_heads, mixer.num_kv_heads, "num_kv_heads")
            if heads % kv_heads:
                mend = f"use a multiple of {kv_heads}"
                problem = f"is not divisible by the {kv_heads} kv heads"
                raise ConfigError("kv-heads-do-not-divide", problem, key="grow.num_heads", value=heads, mend=mend)
            if kv_heads != mixer.num_kv_heads and heads // kv_heads < group:
                mend = f"use at least {group * kv_heads} heads"
                problem = f"leaves fewer than {group} query heads in a group"
                raise ConfigError("shrinking-target", problem, key="grow.num_heads", value=heads, mend=mend)
            mixer = dataclasses.replace(mixer, num_heads=heads, num_kv_heads=kv_heads)
            layers.append(dataclasses.replace(layer, mixer=mixer))
        return dataclasses.replace(config, layers=tuple(layers))

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        wanted = {layer.id: layer.mixer for layer in target.layers}
        layers = []
        for layer in config.layers:
            if (mixer := wanted.get(layer.id)) is not None:
                grown = dataclasses.replace(layer.mixer, num_heads=mixer.num_heads, num_kv_heads=mixer.num_kv_heads)
                layer = dataclasses.replace(layer, mixer=grown)
            layers.append(layer)
        return dataclasses.replace(config, layers=tuple(layers))

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        return Exactness("exact", "what reads the new heads is zero, and old query heads keep their kv head")

    def placement(self, growth: TensorGrowth) -> Placement | None:
        return query_placement(growth.spec, growth.source, growth.target)


def query_placement(spec: ParamSpec, source: ModelConfig, target: ModelConfig) -> Placement | None:
    """Query head j of kv group g goes to position j of the same group, whose stride has grown."""
    assert spec.layer is not None
    old, new = source.layer(spec.layer).mixer, target.layer(spec.layer).mixer
    group_old, group_new = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
    return {"heads": [g * group_new + j for g in range(old.num_kv_heads) for j in range(group_old)]}


OPERATORS.register("width")(Width())
OPERATORS.register("mlp")(MLPWidth())
OPERATORS.register("heads")(Heads())
