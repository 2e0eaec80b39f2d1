"""Wider dense axes: the MLP and the heads. Each tensor is laid into a larger one along named axes; what reads the new
dimensions is zero, so what writes them may be random; or both are, and the new dimensions are under a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

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
    each_layer,
    not_smaller,
    whole_number,
)
from growkit.growth.operators.gradmax import gated_readers, readers
from growkit.models.axes import NEW, Placement
from growkit.models.config import Attention, DenseMLP, LayerSpec, ModelConfig, MoEMLP
from growkit.models.spec import ParamSpec

if TYPE_CHECKING:
    from torch import Tensor


class Dense(GrowthOperator):
    """Expansion along ``axes``; new slices are zero where a tensor's ``zero_side`` lies on them, else fresh draws. With
    the method ``masked`` none is zero."""

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
        zero = written == (self.zero_side == "out") and growth.method != "masked"
        new = old.new_zeros(spec.shape) if zero else self.drawn(growth)
        return Grown(expand(old, old_spec.axes, new, spec.axes, placement), placement=placement)

    def placement(self, growth: TensorGrowth) -> Placement | None:
        return None

    def drawn(self, growth: TensorGrowth) -> Tensor:
        """What the new entries of a tensor that may be random start at, in the shape of the whole."""
        return growth.fresh()


class MLPWidth(Dense):
    name = "mlp"
    fields = ("mlp_dim",)
    methods = {
        "zero_down": "new hidden units read at random and write nothing yet",
        "gradmax": "as zero_down, but they read what makes their first gradient largest",
        "masked": "new hidden units read and write at random, and come in over the stage's grow_time",
    }
    looks = frozenset({"gradmax"})
    source = (
        "zero_down: Net2Net, arXiv 1511.05641, with zero outgoing weights; gradmax: GradMax, arXiv 2201.05125; "
        "masked: MSG, arXiv 2305.02869"
    )
    axes = frozenset({"mlp"})
    zero_side = "in"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        dim = whole_number(fields["mlp_dim"], "mlp_dim")
        layers = []
        for layer in config.layers:
            if not isinstance(layer.mlp, DenseMLP | MoEMLP):
                mend = "grow mlp_tokens, or start from model.preset=transformer"
                raise ConfigError("nothing-to-grow", "the MLP is not dense", key="grow.mlp_dim", value=dim, mend=mend)
            if method != "zero_down" and isinstance(layer.mlp, MoEMLP):
                problem = "does not choose for experts, which see some of the tokens only"
                problem = problem if method == "gradmax" else "has no masks for experts"
                mend = "use the method zero_down"
                raise ConfigError("method-does-not-fit", problem, key="methods.mlp", value=method, mend=mend)
            not_smaller(dim, layer.mlp.dim, "mlp_dim")
            grown = dataclasses.replace(layer.mlp, dim=dim)
            if method == "masked" and isinstance(grown, DenseMLP) and dim > layer.mlp.dim:
                grown = dataclasses.replace(grown, steady_dim=layer.mlp.dim)
            layers.append(dataclasses.replace(layer, mlp=grown))
        return dataclasses.replace(config, layers=tuple(layers))

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        def widened(layer: LayerSpec, wanted: LayerSpec) -> LayerSpec:
            if not isinstance(layer.mlp, DenseMLP | MoEMLP) or not isinstance(wanted.mlp, DenseMLP | MoEMLP):
                return layer
            grown = dataclasses.replace(layer.mlp, dim=wanted.mlp.dim)
            if isinstance(grown, DenseMLP) and isinstance(wanted.mlp, DenseMLP):
                grown = dataclasses.replace(grown, steady_dim=wanted.mlp.steady_dim)
            return dataclasses.replace(layer, mlp=grown)

        return each_layer(config, target, widened)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if method == "masked":
            return Exactness("exact", "the mask on the new hidden units is at 0")
        return Exactness("exact", "the new hidden units' outgoing weights are zero")

    def drawn(self, growth: TensorGrowth) -> Tensor:
        new = growth.fresh()
        if growth.method != "gradmax" or growth.spec.role != "weight":
            return new
        assert growth.seen is not None and growth.spec.layer is not None and growth.old is not None
        mlp = growth.target.layer(growth.spec.layer).mlp
        assert isinstance(mlp, DenseMLP)
        first = len(growth.old) // (2 if mlp.kind == "swiglu" else 1)
        if mlp.kind == "swiglu":
            gates, ups = new.chunk(2)  # views
            ups[first:] = gated_readers(growth.seen, gates[first:], ups[first:])
        else:
            new[first:] = readers(growth.seen, new[first:])
        return new


class Heads(Dense):
    name = "heads"
    fields = ("num_heads", "num_kv_heads")
    methods = {
        "zero_out": "new heads attend at random and write nothing yet; grouped queries keep their group",
        "masked": "new heads attend and write at random, and come in over the stage's grow_time",
    }
    source = (
        "zero_out: head appending as in LEMON, arXiv 2310.07999, with zero outgoing weights; "
        "masked: MSG, arXiv 2305.02869"
    )
    axes = frozenset({"heads", "kv_heads"})
    zero_side = "in"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        name = next(iter(fields))
        attention_layers(config, name, fields[name])

        def grown(mixer: Attention, _: Attention) -> Attention:
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
            before = mixer.num_heads, mixer.num_kv_heads
            mixer = dataclasses.replace(mixer, num_heads=heads, num_kv_heads=kv_heads)
            if method == "masked" and before != (heads, kv_heads):
                mixer = dataclasses.replace(mixer, steady_heads=before)
            return mixer

        return each_attention(config, config, grown)

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        def with_heads(mixer: Attention, there: Attention) -> Attention:
            sizes: dict[str, Any] = {name: getattr(there, name) for name in ("num_heads", "num_kv_heads")}
            return dataclasses.replace(mixer, **sizes, steady_heads=there.steady_heads)

        return each_attention(config, target, with_heads)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if method == "masked":
            return Exactness("exact", "the mask on the new heads is at 0, and old query heads keep their kv head")
        return Exactness("exact", "what reads the new heads is zero, and old query heads keep their kv head")

    def placement(self, growth: TensorGrowth) -> Placement | None:
        return query_placement(growth.spec, growth.source, growth.target)


def query_placement(spec: ParamSpec, source: ModelConfig, target: ModelConfig) -> Placement | None:
    """Position j of kv group g holds query head j of the same group, whose stride has grown."""
    old, new = attention_of(source, spec.layer), attention_of(target, spec.layer)
    group_old, group_new = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
    groups = [divmod(head, group_new) for head in range(new.num_heads)]
    return {"heads": [g * group_old + j if g < old.num_kv_heads and j < group_old else NEW for g, j in groups]}


OPERATORS.register("mlp")(MLPWidth())
OPERATORS.register("heads")(Heads())
