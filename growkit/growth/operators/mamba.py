"""A larger state space: more states, more channels, a higher rank of Δ, a longer convolution. What reads the new ones
is zero, so what writes them may be random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from growkit.errors import ConfigError
from growkit.growth.operator import (
    OPERATORS,
    Exactness,
    Grown,
    TensorGrowth,
    each_layer,
    not_smaller,
    whole_number,
)
from growkit.growth.operators.dense import Dense
from growkit.models.axes import NEW, Concat, Placement
from growkit.models.config import LayerSpec, Mamba, ModelConfig

SOURCE = "growkit (docs/operators/{0}.md); the block is Mamba's, arXiv 2312.00752"


class _OfMamba(Dense):
    """``size``: the field of the mixer that grows."""

    size: str

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        field, value = next(iter(fields.items()))
        wanted = self.wanted(config, field, whole_number(value, field))
        if not any(isinstance(layer.mixer, Mamba) for layer in config.layers):
            mend = "grow what the model has, or start from model.preset=mamba"
            problem = "the model has no Mamba layer"
            raise ConfigError("nothing-to-grow", problem, key=f"grow.{field}", value=value, mend=mend)

        def grown(mixer: Mamba, _: Mamba) -> Mamba:
            not_smaller(wanted, getattr(mixer, self.size), field)
            return self.sized(mixer, wanted)

        return _each_mamba(config, config, grown)

    def wanted(self, config: ModelConfig, field: str, value: int) -> int:
        return value

    def sized(self, mixer: Mamba, size: int) -> Mamba:
        sizes: dict[str, Any] = {self.size: size}
        return dataclasses.replace(mixer, **sizes)

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        return _each_mamba(config, target, lambda mixer, there: self.sized(mixer, getattr(there, self.size)))

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        return Exactness("exact", f"what reads the new {self.reads} is zero")

    reads: str


class State(_OfMamba):
    name = "state"
    fields = ("d_state",)
    methods = {"zero_c": "new states are written at random and read by zeros; they decay as the next ones would"}
    source = SOURCE.format("state")
    axes = frozenset({"state"})
    zero_side = "in"
    size, reads = "state", "states"

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if _normed_inside(source):
            return Exactness("not", "B and C are normalised over their states, and there are more of them")
        return super().exactness(source, target, method)

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        """Of B | C, which one map makes, the new B is drawn and the new C zero: never both, which would be dead."""
        grown = super().grow_tensor(growth)
        old = growth.old_spec
        assert old is not None
        for dim, (before, axis) in enumerate(zip(old.axes, growth.spec.axes, strict=True)):
            if isinstance(axis, Concat) and isinstance(before, Concat) and before != axis:
                new = axis.parts[-1].size - before.parts[-1].size
                grown.value.narrow(dim, axis.size - new, new).zero_()
        return grown


class Inner(_OfMamba):
    name = "inner"
    fields = ("expand", "d_inner")
    methods = {"zero_out": "new channels read at random and write nothing yet"}
    source = SOURCE.format("inner")
    axes = frozenset({"inner"})
    zero_side = "in"
    size, reads = "inner", "channels"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        if len(fields) > 1:
            mend = "leave one of grow.expand and grow.d_inner out"
            raise ConfigError("bad-target", "is said twice", key="grow.d_inner", value=fields["d_inner"], mend=mend)
        return super().target(config, fields, method)

    def wanted(self, config: ModelConfig, field: str, value: int) -> int:
        return value * config.embed_dim if field == "expand" else value


class DtRank(_OfMamba):
    name = "dt_rank"
    fields = ("dt_rank",)
    methods = {"zero_dt": "new dimensions of the rank are written at random and read by zeros"}
    source = SOURCE.format("dt_rank")
    axes = frozenset({"dt_rank"})
    zero_side = "in"
    size, reads = "dt_rank", "dimensions of the rank"

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if _normed_inside(source):
            return Exactness("not", "the rank is normalised as a whole, and it has more dimensions")
        return super().exactness(source, target, method)


class Conv(_OfMamba):
    name = "conv"
    fields = ("d_conv",)
    methods = {"left": "new taps, of tokens further back, are zero"}
    source = SOURCE.format("conv")
    axes = frozenset({"conv"})
    zero_side = "in"
    size, reads = "conv", "taps' tokens"

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        return Exactness("exact", "the new taps are zero")

    def placement(self, growth: TensorGrowth) -> Placement | None:
        assert growth.old is not None
        taps, old = growth.spec.shape[1], growth.old.shape[1]
        return {"conv": [*[NEW] * (taps - old), *range(old)]}


def _normed_inside(config: ModelConfig) -> bool:
    return any(isinstance(layer.mixer, Mamba) and layer.mixer.inner_norm is not None for layer in config.layers)


def _each_mamba(config: ModelConfig, target: ModelConfig, change: Callable[[Mamba, Mamba], Mamba]) -> ModelConfig:
    def changed(layer: LayerSpec, wanted: LayerSpec) -> LayerSpec:
        if isinstance(layer.mixer, Mamba) and isinstance(wanted.mixer, Mamba):
            return dataclasses.replace(layer, mixer=change(layer.mixer, wanted.mixer))
        return layer

    return each_layer(config, target, changed)


for _operator in (State(), Inner(), DtRank(), Conv()):
    OPERATORS.register(_operator.name)(_operator)
