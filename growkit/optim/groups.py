"""Which parameters share a learning rate and a decay, and which stand still. No torch here.

A *selector* names parameters by what they are: ``embedding``, ``head``, ``attention``, ``mlp``, ``norm`` (components),
``keys``, ``values`` (roles), ``bank:1``, ``layer:3``, ``old`` (born before this stage), ``new``, and ``old_banks`` (old
parameter tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from growkit.errors import ConfigError
from growkit.models.spec import ParamSpec

_COMPONENTS = ("embedding", "head", "attention", "mlp", "norm")
_ROLES = ("keys", "values")
_AGES = ("old", "new", "old_banks")
_DECAYED = ("weight", "keys", "values")


@dataclass(frozen=True)
class ParamGroup:
    """``names`` share ``weight_decay``, ``lr_scale`` and, if ``new``, the warm-up of what this stage added."""

    names: tuple[str, ...]
    weight_decay: float
    lr_scale: float
    new: bool


def check_selector(selector: str, key: str) -> str:
    """``selector`` itself, or a ConfigError naming ``key``."""
    kind, colon, number = selector.partition(":")
    if selector in (*_COMPONENTS, *_ROLES, *_AGES) or (kind in ("bank", "layer") and colon and number.isdecimal()):
        return selector
    mend = f"allowed: {', '.join((*_COMPONENTS, *_ROLES, *_AGES))}, bank:N, layer:N"
    raise ConfigError("bad-selector", "selects no parameters growkit knows", key=key, value=selector, mend=mend)


def selected(selector: str, name: str, spec: ParamSpec, born: Mapping[str, int], stage: int) -> bool:
    """Whether ``selector`` covers the parameter."""
    new = stage > 0 and born.get(name, 0) == stage
    kind, _, number = selector.partition(":")
    if kind == "bank":
        return spec.bank == int(number)
    if kind == "layer":
        return spec.layer == int(number)
    if selector == "old_banks":
        return spec.bank is not None and not new
    if selector in _AGES:
        return new == (selector == "new")
    return selector in (spec.component, spec.role)


def frozen_names(
    specs: Mapping[str, ParamSpec], born: Mapping[str, int], stage: int, freeze: Iterable[str]
) -> frozenset[str]:
    """Parameters that stand still in ``stage``; their moments wait."""
    freeze = tuple(freeze)
    return frozenset(name for name, spec in specs.items() if any(selected(s, name, spec, born, stage) for s in freeze))


def param_groups(
    specs: Mapping[str, ParamSpec],
    born: Mapping[str, int],
    stage: int,
    *,
    weight_decay: float,
    decay_embedding: bool,
    lr_scale: Mapping[str, float],
) -> list[ParamGroup]:
    """Every parameter in exactly one group, groups in order of appearance. Scales of several selectors multiply."""
    groups: dict[tuple[float, float, bool], list[str]] = {}
    for name, spec in specs.items():
        decayed = spec.role in _DECAYED or (decay_embedding and spec.role in ("embedding", "head"))
        scale = 1.0
        for selector, factor in lr_scale.items():
            scale *= factor if selected(selector, name, spec, born, stage) else 1.0
        new = selected("new", name, spec, born, stage)
        groups.setdefault((weight_decay if decayed else 0.0, scale, new), []).append(name)
    return [ParamGroup(tuple(names), *key) for key, names in groups.items()]
