"""Which parameters share a learning rate and a decay, and which stand still. No torch here.

A *selector* names parameters by what they are: ``embedding``, ``head``, ``attention``, ``mlp``, ``norm``, ``stream``
(components; of a stream what reads and mixes its blocks), ``attention.q``, ``mlp.gate_up`` (parts of a layer),
``keys``, ``values`` (roles), ``bank:1``, ``layer:3``, ``old`` (born before this stage), ``new``, ``old_banks`` (old
parameter tokens), ``old_layers`` (what is old in layers), and, to freeze only, ``old_entries`` (as ``old``, but of what
this stage enlarged, the entries that were there).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from growkit.errors import ConfigError
from growkit.models.spec import ParamSpec

OLD_ENTRIES = "old_entries"
_COMPONENTS = ("embedding", "head", "attention", "mamba", "mlp", "norm", "stream")
_ROLES = ("keys", "values")
_AGES = ("old", "new", "old_banks", "old_layers", OLD_ENTRIES)
_WORDS = (*_COMPONENTS, *_ROLES, *_AGES)
_PART = re.compile(r"[a-z_]+(\.[A-Za-z_]+|\.[0-9]+)+", re.ASCII)  # of a parameter's name in its layer, from the front
_DECAYED = ("weight", "keys", "values", "conv")
_LISTED = 12  # of what a message lists of one kind


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
    if selector in _WORDS or (kind in ("bank", "layer") and colon and number.isdecimal()) or _PART.fullmatch(selector):
        return selector
    mend = f"allowed: {', '.join(_WORDS)}, bank:N, layer:N, and parts of layers such as attention.q"
    raise ConfigError("bad-selector", "selects no parameters growkit knows", key=key, value=selector, mend=mend)


def selected(selector: str, name: str, spec: ParamSpec, born: Mapping[str, int], stage: int) -> bool:
    """Whether ``selector`` covers the parameter; ``old_entries`` covers all of one that did not grow."""
    new = stage > 0 and born.get(name, 0) == stage
    kind, _, number = selector.partition(":")
    if kind == "bank":
        return spec.bank == int(number)
    if kind == "layer":
        return spec.layer == int(number)
    if selector == "old_banks":
        return spec.bank is not None and not new
    if selector == "old_layers":
        return spec.layer is not None and not new
    if selector in _AGES:
        return new == (selector == "new")
    if "." in selector:
        return f"{spec.local}.".startswith(f"{selector}.")
    return selector in (spec.component, spec.role)


def require_some(
    selectors: Iterable[str], key: str, specs: Mapping[str, ParamSpec], born: Mapping[str, int], stage: int
) -> None:
    """Raises ConfigError for the first of ``selectors`` that selects none of ``specs``, naming ``key``."""

    def finds(selector: str) -> bool:
        return any(selected(selector, name, spec, born, stage) for name, spec in specs.items())

    for selector in selectors:
        if finds(selector):
            continue
        banks = sorted({spec.bank for spec in specs.values() if spec.bank is not None})
        layers = dict.fromkeys(spec.layer for spec in specs.values() if spec.layer is not None)
        parts = dict.fromkeys(".".join(spec.local.split(".")[:2]) for spec in specs.values() if spec.layer is not None)
        kinds = (
            [word for word in _WORDS if finds(word)],
            [f"bank:{bank}" for bank in banks],
            [f"layer:{layer}" for layer in layers],
            list(parts),
        )
        there = [word for words in kinds for word in (words if len(words) <= _LISTED else [*words[:_LISTED], "..."])]
        problem, mend = "selects no parameter of the stage's model", f"what would: {', '.join(there)}"
        raise ConfigError("selects-nothing", problem, key=key, value=selector, mend=mend)


def is_part(selector: str) -> bool:
    """Whether ``selector`` is a part of a layer, which may be misspelt, and not one of the words."""
    return _PART.fullmatch(selector) is not None


def frozen_names(
    specs: Mapping[str, ParamSpec],
    born: Mapping[str, int],
    stage: int,
    freeze: Iterable[str],
    enlarged: Set[str] = frozenset(),
) -> frozenset[str]:
    """Parameters that stand still in ``stage``; their moments wait. Of those that this stage ``enlarged``,
    ``old_entries`` freezes only some entries, so they are not among them."""
    freeze = tuple(freeze)

    def stands(selector: str, name: str, spec: ParamSpec) -> bool:
        partly = selector == OLD_ENTRIES and name in enlarged
        return not partly and selected(selector, name, spec, born, stage)

    return frozenset(name for name, spec in specs.items() if any(stands(s, name, spec) for s in freeze))


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
