"""Models as banks of parameter tokens: two that grew from one ancestor laid side by side, and the newer banks left out.

A projection adds its banks up, so the banks that two models appended to one ancestor can stand beside each other; and
where the old banks were frozen, leaving the new ones out gives back the old model exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from growkit.errors import ConfigError
from growkit.growth.engine import Lazy
from growkit.growth.operator import Exactness
from growkit.growth.operators.param_tokens import pattentions, with_pattentions
from growkit.growth.state import Moments, TrainState
from growkit.growth.verify import certify
from growkit.models.config import LayerSpec, ModelConfig, Pattention, unmasked
from growkit.models.spec import param_specs


def merge(a: TrainState, b: TrainState, ancestor: TrainState) -> TrainState:
    """The banks of ``ancestor``, those that ``a`` appended, and those that ``b`` did; computed when asked for.

    What all three have is ancestor + (a − ancestor) + (b − ancestor), task arithmetic (arXiv 2212.04089): the
    ancestor's own where both kept it frozen. Banks keep their moments; of the rest, what neither moved does.
    Raises ConfigError when a or b did more than append banks with norms of their own, or one's ramp is not through.
    """
    a, b, ancestor = (dataclasses.replace(of, config=unmasked(of.config, "merge")) for of in (a, b, ancestor))
    for name, model in (("the first model", a), ("the second model", b)):
        if without_new_banks(model.config, ancestor.config) != ancestor.config:
            raise ConfigError(
                "cannot-merge",
                f"is not the ancestor of {name} with banks appended",
                key="--ancestor",
                mend="merge models that grew by param_tokens (bank) alone, and name the checkpoint they grew from",
            )
    layers = [_beside(*of) for of in zip(ancestor.config.layers, a.config.layers, b.config.layers, strict=True)]
    config = dataclasses.replace(ancestor.config, layers=tuple(layers))
    homes = _homes(config, a.config, ancestor.config)
    born = {name: at for name, (home, own) in homes.items() if (at := (b if home == "b" else a).born.get(own, 0))}

    def value(name: str) -> Tensor:
        home, own = homes[name]
        if home == "all":
            base = ancestor.params[name]
            return base + (a.params[name] - base) + (b.params[name] - base)
        return (a if home == "a" else b).params[own]

    def unmoved(name: str) -> bool:
        return torch.equal(a.params[name], b.params[name])

    def moments(name: str) -> Moments:
        home, own = homes[name]
        return (b if home == "b" else a).moments[own]

    kept = [
        name
        for name, (home, own) in homes.items()
        if own in (b if home == "b" else a).moments and (home != "all" or unmoved(name))
    ]
    return TrainState(config, Lazy(list(homes), value), Lazy(kept, moments), born)


def merge_record(one: TrainState, merged: TrainState, probe: Tensor) -> dict[str, Any]:
    """How far the merged model is from ``one`` of the two, measured on ``probe`` (rows, context + 1), as a growth's
    record (engine.GrowthReport)."""
    claim = Exactness("not", "the other model's banks add what they write")
    own, specs = param_specs(one.config), param_specs(merged.config)
    new = {name: torch.ones(spec.shape, dtype=torch.bool) for name, spec in specs.items() if name not in own}
    certificate = certify(one, merged, (claim,), probe, new=new)
    link = {"operator": "merge", "method": "side by side", **asdict(claim)}
    link["delta_logits_float64"] = certificate.delta_logits_float64
    return {
        "links": [link],
        "new_parameters": len(new),
        "parameters_before": one.config.num_params(),
        "parameters_after": merged.config.num_params(),
        "certificate": asdict(certificate),
    }


def without_new_banks(config: ModelConfig, ancestor: ModelConfig) -> ModelConfig:
    """``config`` with as many banks in each projection as ``ancestor`` has there."""
    wanted = {layer.id: layer for layer in ancestor.layers}

    def cut(layer: LayerSpec) -> LayerSpec:
        if layer.id not in wanted:
            return layer
        old = pattentions(wanted[layer.id])
        parts = pattentions(layer).items()
        return with_pattentions(layer, {part: _first(p, len(old[part].banks)) for part, p in parts if part in old})

    return dataclasses.replace(config, layers=tuple(cut(layer) for layer in config.layers))


def first_banks(config: ModelConfig, params: Mapping[str, Tensor], count: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model with the first ``count`` banks of each projection. Raises ConfigError for norms that banks share, and
    for a model whose last growth is under a ramp still."""
    config = unmasked(config, "--banks")
    specs = [p for layer in config.layers for p in pattentions(layer).values()]
    if not specs or any(p.scope == "shared" and len(p.banks) > count for p in specs):
        problem = "needs banks that have norms of their own, and the model has none"
        raise ConfigError("no-banks", problem, key="--banks", value=count, mend="leave it out")
    cut = [
        with_pattentions(layer, {part: _first(p, count) for part, p in pattentions(layer).items()})
        for layer in config.layers
    ]
    smaller = dataclasses.replace(config, layers=tuple(cut))
    return smaller, {name: params[name] for name in param_specs(smaller)}


def _first(spec: Pattention, count: int) -> Pattention:
    if spec.scope == "shared":
        return spec
    return dataclasses.replace(spec, banks=spec.banks[:count], taus=spec.taus[:count])


def _beside(ancestor: LayerSpec, a: LayerSpec, b: LayerSpec) -> LayerSpec:
    parts = {}
    for part, old in pattentions(ancestor).items():
        one, other, own = pattentions(a)[part], pattentions(b)[part], len(old.banks)
        banks, taus = one.banks + other.banks[own:], one.taus + other.taus[own:]
        parts[part] = dataclasses.replace(one, banks=banks, taus=taus)
    return with_pattentions(ancestor, parts)


def _homes(config: ModelConfig, a: ModelConfig, ancestor: ModelConfig) -> dict[str, tuple[str, str]]:
    """Of each parameter of the merged model: which model it is from (``all``, ``a`` or ``b``), and its name there."""
    in_all, in_a = param_specs(ancestor), param_specs(a)
    homes = {}
    for name, spec in param_specs(config).items():
        if name in in_all:
            homes[name] = ("all", name)
        elif name in in_a:
            homes[name] = ("a", name)
        else:
            stem, _, number = name.rpartition(".")
            ours = sum(1 for bank in range(int(number)) if f"{stem}.{bank}" in in_a)
            shared = sum(1 for bank in range(int(number)) if f"{stem}.{bank}" in in_all)
            assert spec.bank == int(number)
            homes[name] = ("b", f"{stem}.{int(number) - ours + shared}")
    return homes
