"""More layers: identity and masked inserts, which keep the function, and copies, which do not and are popular all the
same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from growkit.errors import ConfigError
from growkit.growth.operator import (
    OPERATORS,
    Exactness,
    Grown,
    GrowthOperator,
    TensorGrowth,
    not_smaller,
    whole_number,
)
from growkit.models.config import MOST_LAYERS, LayerSpec, ModelConfig

PLACES = ("interleaved", "end", "middle")


class Depth(GrowthOperator):
    name = "depth"
    fields = ("num_layers",)
    options = ("insert_at",)
    methods = {
        "identity": "a copy of the layer before, its writes to the residual stream zeroed",
        "stack": "layers 0..L-1 once more on top (G_stack)",
        "interleave": "every layer followed by its copy",
        "midas": "the middle block of layers, as many as are new, once more right after it",
        "solar": "two copies of the stack on each other, cut at the seam: the middle layers act twice",
        "masked": "a copy of the layer before, whole; what it writes comes in over the stage's grow_time",
    }
    source = (
        "identity: LLaMA-Pro, arXiv 2401.02415; stack: G_stack, arXiv 2405.15319; midas: arXiv 2409.19044; "
        "solar: SOLAR 10.7B, arXiv 2312.15166; masked: MSG, arXiv 2305.02869"
    )

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        count = whole_number(fields["num_layers"], "num_layers") if "num_layers" in fields else 0
        current = len(config.layers)
        if not count:
            mend = "say grow.num_layers as well"
            raise ConfigError("bad-target", "has nothing to insert", key="grow.insert_at", mend=mend)
        not_smaller(count, current, "num_layers")
        if count > MOST_LAYERS:
            raise ConfigError("too-large", f"must be at most {MOST_LAYERS}", key="grow.num_layers", value=count)
        after = _places(method, fields.get("insert_at"), current, count - current)
        next_id = max(layer.id for layer in config.layers) + 1
        layers: list[LayerSpec] = []
        for index, layer in enumerate(config.layers):
            layers.append(layer)
            for origin in after.get(index, ()):
                origin_spec = config.layers[origin]
                masked = method == "masked"
                layers.append(dataclasses.replace(origin_spec, id=next_id, origin=origin_spec.id, ramped=masked))
                next_id += 1
        return dataclasses.replace(config, layers=tuple(layers))

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        present = {layer.id: layer for layer in config.layers}
        layers = []
        for layer in target.layers:
            if layer.id in present:
                layers.append(present[layer.id])
            elif layer.origin in present:  # as its origin is now; what else it is to be, later links make it
                origin = present[layer.origin]
                layers.append(dataclasses.replace(origin, id=layer.id, origin=layer.origin, ramped=layer.ramped))
        if [layer for layer in layers if layer.id in present] != list(config.layers):
            return config  # layers were dropped or reordered: not this operator's to do
        return dataclasses.replace(config, layers=tuple(layers))

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if method == "identity":
            return Exactness("exact", "the new layers write zeros to the residual stream")
        if method == "masked":
            return Exactness("exact", "the mask on what the new layers write is at 0")
        return Exactness("not", "copied layers act a second time")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        if growth.old is not None:
            return Grown(growth.old)
        assert growth.origin is not None, "a new layer has an origin"
        copy, spec = growth.origin.clone(), growth.spec
        if growth.method == "identity" and spec.writes_residual:
            copy.zero_()
        if growth.method in ("identity", "masked") and spec.role == "mix":  # AltUp's blocks pass as they are
            copy = copy.zero_() if spec.constant is None else copy.new_tensor(spec.constant).view(spec.shape)
        return Grown(copy)


def _places(method: str, insert_at: Any, current: int, new: int) -> dict[int, list[int]]:
    """index of a layer → origins (indices) of the layers that go right after it."""
    if method == "stack":
        _no_choice(method, insert_at)
        return {current - 1: [i % current for i in range(new)]}
    if method == "interleave":
        _no_choice(method, insert_at)
        if new % current:
            raise ConfigError(
                "bad-target",
                f"is not a multiple of the current {current} layers",
                key="grow.num_layers",
                value=current + new,
                mend=f"use {2 * current}, or the method identity",
            )
        return {i: [i] * (new // current) for i in range(current)}
    if method in ("midas", "solar"):
        _no_choice(method, insert_at)
        block = _middle_block(method, current, new) if new else ()
        return {block[-1]: list(block)} if block else {}
    if insert_at in (None, "interleaved"):
        positions = [(i + 1) * current // new - 1 if new <= current else i * current // new for i in range(new)]
    elif insert_at == "end":
        positions = [current - 1] * new
    elif insert_at == "middle":
        positions = [(current - 1) // 2] * new
    else:
        positions = _explicit(insert_at, current, new)
    after: dict[int, list[int]] = {}
    for position in positions:
        after.setdefault(position, []).append(position)
    return after


def _middle_block(method: str, current: int, new: int) -> range:
    """The layers that act twice. MIDAS cuts the stack into blocks of ``new`` layers and repeats the middle one (the
    first of two); SOLAR drops the last m layers of one copy and the first m of another: m..current−m−1 are in both."""
    if method == "midas" and current % new == 0:
        start = (current // new - 1) // 2 * new
        return range(start, start + new)
    if method == "solar" and new <= current and (current - new) % 2 == 0:
        dropped = (current - new) // 2
        return range(dropped, current - dropped)
    fitting = [n for n in range(1, current + 1) if (current % n if method == "midas" else (current - n) % 2) == 0]
    raise ConfigError(
        "bad-target",
        f"cannot be reached from {current} layers by {method}",
        key="grow.num_layers",
        value=current + new,
        mend=f"use {' or '.join(str(current + n) for n in fitting)}, or the method identity",
    )


def _explicit(insert_at: Any, current: int, new: int) -> list[int]:
    listed = list(insert_at) if isinstance(insert_at, list | tuple) else None
    if listed is None or any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        mend = f"use {', '.join(PLACES)}, or a list of layer indices to insert after"
        raise ConfigError("bad-target", "is not a place", key="grow.insert_at", value=insert_at, mend=mend)
    if len(listed) != new or any(not 0 <= i < current for i in listed):
        mend = f"give {new} indices in 0..{current - 1}"
        raise ConfigError("bad-target", "does not fit num_layers", key="grow.insert_at", value=listed, mend=mend)
    return listed


def _no_choice(method: str, insert_at: Any) -> None:
    if insert_at is not None:
        mend = "drop it, or use the method identity"
        raise ConfigError("bad-target", f"means nothing to {method}", key="grow.insert_at", value=insert_at, mend=mend)


OPERATORS.register("depth")(Depth())
