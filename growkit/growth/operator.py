"""The seam every way to grow goes through. No torch at import: a target is checked before torch is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from growkit.errors import ConfigError
from growkit.growth.state import Moments
from growkit.models.axes import Placement
from growkit.models.config import Attention, LayerSpec, ModelConfig
from growkit.models.spec import ParamSpec
from growkit.registry import Registry, closest

if TYPE_CHECKING:
    from torch import Tensor

    from growkit.growth.observe import Seen

# Relative Δlogits of an exact step, logits in float64: some 1e5 roundings of 1e-16 through a deep model stay below.
EXACT_FLOAT64 = 1e-10
# The same when a step rescales weights that are stored in float32: each rounds once, by 6e-8; through the layers, 1e-6.
RESCALED_FLOAT32 = 2e-6


@dataclass(frozen=True)
class Exactness:
    """Whether a step keeps the function, and why. ``rescales``: old weights are multiplied, so they round once."""

    kind: Literal["exact", "not"]
    reason: str
    rescales: bool = False

    def tolerance(self, stored_in_float64: bool) -> float:
        """Largest relative error of the float64 logits of an exact step."""
        return RESCALED_FLOAT32 if self.rescales and not stored_in_float64 else EXACT_FLOAT64


@dataclass(frozen=True)
class TensorGrowth:
    """What an operator sees of one tensor of the target.

    ``old``/``old_spec``: the same parameter before the step, None if it is new. ``origin``: for a parameter of an
    inserted layer, the same parameter of the layer it came from. ``fresh()``: a draw from the target's initial
    distribution, from a generator that belongs to this tensor alone. ``layer``: all old tensors of the parameter's
    layer, by their local names. ``seen``: what its part of the layer sees on the probe, for methods that look.
    """

    spec: ParamSpec
    old_spec: ParamSpec | None
    old: Tensor | None
    origin: Tensor | None
    source: ModelConfig
    target: ModelConfig
    method: str
    fresh: Callable[[], Tensor]
    layer: Mapping[str, Tensor]
    seen: Seen | None = None


@dataclass(frozen=True)
class Grown:
    """A tensor of the target. ``gradient``: what the gradient of old entries is multiplied by, as moments will be;
    ``placement``: what the grown axes hold, when the old indices are not at their front (axes.index_map); ``squared``:
    what the gradient's square is multiplied by, where that is not gradient² (entries that see fewer tokens now).
    ``moments``: of a tensor laid together from parts of old ones, its moments from theirs, by local name."""

    value: Tensor
    gradient: float = 1.0
    placement: Placement | None = None
    squared: float | None = None
    moments: Callable[[Mapping[str, Moments]], Moments] | None = None


class GrowthOperator:
    """One way to grow. Subclasses say what they grow (``fields``), how (``methods``, the first one is the default),
    from which work (``source``), and map one tensor at a time."""

    name: str
    fields: tuple[str, ...]  # keys of a stage's ``grow:``
    options: tuple[str, ...] = ()  # further keys that only say how
    methods: Mapping[str, str]  # method: what it does
    looks: frozenset[str] = frozenset()  # methods that choose by what the model sees on a probe
    source: str

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        """``config`` grown to the values in ``fields``. Raises ConfigError when that is impossible."""
        raise NotImplementedError

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        """``config`` moved along this operator's axes, and no others, to where ``target`` has them."""
        raise NotImplementedError

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        """Whether the step source → target keeps the function, with the reason."""
        raise NotImplementedError

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        """One tensor of the target."""
        raise NotImplementedError

    def default_method(self, config: ModelConfig) -> str:
        """The method meant when a recipe names none."""
        return next(iter(self.methods))

    def check_method(self, method: str, key: str) -> str:
        if method not in self.methods:
            mend = closest(method, self.methods)
            raise ConfigError("unknown-method", f"is not a method of {self.name}", key=key, value=method, mend=mend)
        return method


OPERATORS: Registry[GrowthOperator] = Registry("growth operator")


def each_layer(
    config: ModelConfig, target: ModelConfig, change: Callable[[LayerSpec, LayerSpec], LayerSpec]
) -> ModelConfig:
    """``config`` with every layer made by ``change`` from it and the target's layer of the same id, if there is one."""
    wanted = {layer.id: layer for layer in target.layers}
    layers = (change(layer, wanted[layer.id]) if layer.id in wanted else layer for layer in config.layers)
    return dataclasses.replace(config, layers=tuple(layers))


def attention_layers(config: ModelConfig, field: str, value: Any) -> tuple[LayerSpec, ...]:
    """Those that mix tokens by attention. Raises ConfigError for ``grow.field`` where there are none."""
    found = tuple(layer for layer in config.layers if isinstance(layer.mixer, Attention))
    if not found:
        mend = "grow d_state, expand, dt_rank or d_conv, or start from a model with attention"
        raise ConfigError("nothing-to-grow", "the model has no attention", key=f"grow.{field}", value=value, mend=mend)
    return found


def each_attention(
    config: ModelConfig, target: ModelConfig, change: Callable[[Attention, Attention], Attention]
) -> ModelConfig:
    """``config`` with every attention mixer made by ``change`` from it and that of the target's layer of the same
    id."""

    def changed(layer: LayerSpec, wanted: LayerSpec) -> LayerSpec:
        if isinstance(layer.mixer, Attention) and isinstance(wanted.mixer, Attention):
            return dataclasses.replace(layer, mixer=change(layer.mixer, wanted.mixer))
        return layer

    return each_layer(config, target, changed)


def attention_of(config: ModelConfig, layer: int | None) -> Attention:
    """The mixer of a layer that is known to have attention."""
    assert layer is not None
    mixer = config.layer(layer).mixer
    assert isinstance(mixer, Attention)
    return mixer


def whole_number(value: Any, field: str) -> int:
    """``value`` as a positive int, or a ConfigError that names the field."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError("bad-target", "must be a whole number above zero", key=f"grow.{field}", value=value)
    return value


def not_smaller(
    value: int, current: int, field: str, *, mend: str = "growth only enlarges, so choose {0} or more"
) -> None:
    if value < current:
        raise ConfigError(
            "shrinking-target",
            f"is below the current {current}",
            key=f"grow.{field}",
            value=value,
            mend=mend.format(current),
        )
