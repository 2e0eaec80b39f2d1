"""A wider token: K blocks of embed_dim between layers (AltUp), from the residual stream or from fewer blocks, and parts
of embedding and head of each block's own.

All starts keep the function because what reads the new blocks is zero, or because the blocks are copies whose readers
add up to the one's. Of what is free, the mixing is drawn: blocks that start alike and are mixed alike stay so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
from growkit.models.config import AltUp, ModelConfig
from growkit.models.presets import check_blocks, check_order, check_round_robin, check_routed, router_scale

if TYPE_CHECKING:
    from torch import Tensor

# Standard deviation of what a new block's mixing starts at besides its own value, over √layers: products of such
# matrices neither vanish nor burst along the depth, and blocks are apart by more than 0.05 from the start.
SPREAD = 0.5
HALF = 0.5  # push: of what a layer changed, what its own block gets; the next one gets all of it
# method from one block → the orders it can start, the first by default
STARTS: Mapping[str, tuple[str, ...]] = {
    "pull": ("gemma",),
    "push": ("paper",),
    "same": ("gemma", "paper"),
    "copies": ("gemma", "paper", "free"),
    "round_robin": ("round_robin",),
}
LIFTS = ("clone", "passive")


class Blocks(GrowthOperator):
    name = "altup"
    fields = ("altup_blocks", "altup_variant")
    options = ("altup_order", "altup_coefficients")
    methods = {
        "pull": "from one block: layers take turns on the blocks, each reads the block that the layer before wrote",
        "push": "from one block: layers take turns on the blocks, each writes the block that the next one reads",
        "same": "from one block: all layers stay on the first block, the others go beside it",
        "copies": "from one block: every block starts as the old stream, and layers and head read them together",
        "round_robin": "from one block: layers read the sum of all blocks, and each adds to the next one",
        "clone": "from several blocks: all of them once more, layers take turns on the clones",
        "passive": "from several blocks: new ones that read the old, on which no layer works",
    }
    source = (
        "AltUp, arXiv 2301.13310; Gemma 3n's order and router; copies, free: hyper-connections, arXiv 2409.19606; "
        "the starts and lifts are growkit's (docs/operators/altup.md)"
    )

    def default_method(self, config: ModelConfig) -> str:
        return "pull" if config.stream is None else "clone"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        old = config.stream
        blocks = whole_number(fields.get("altup_blocks", old.blocks if old else 1), "altup_blocks")
        not_smaller(blocks, old.blocks if old else 1, "altup_blocks")
        check_blocks(blocks, "grow.altup_blocks")
        full = _full(fields.get("altup_variant"), blocks, old)
        if any(layer.stride > 1 for layer in config.layers):
            problem, mend = "does not go with layers of a stride", "start from a model without altup_stride"
            raise ConfigError("streams-exclude", problem, key="grow.altup_blocks", value=blocks, mend=mend)
        if old is None and blocks == 1:
            return config
        allowed = tuple(STARTS) if old is None else LIFTS
        if method not in allowed:
            problem = "starts from one block" if old is not None else "starts from several blocks, and there is one"
            mend = f"use {', '.join(allowed)}"
            raise ConfigError("method-does-not-fit", problem, key="methods.altup", value=method, mend=mend)
        if old is None:
            stream = _started(config, blocks, full, fields, method)
        else:
            stream = _lifted(old, blocks, full, fields, len(config.layers))
        if old is not None and method == "clone" and blocks % old.blocks:
            mend = f"use a multiple of {old.blocks}, or the method passive"
            problem = f"is not a multiple of the {old.blocks} blocks that are cloned"
            raise ConfigError("bad-target", problem, key="grow.altup_blocks", value=blocks, mend=mend)

        if old is not None and old.order == "round_robin" and method == "passive" and blocks > old.blocks:
            problem, mend = "makes blocks that no layer of a round robin would ever write", "use the method clone"
            raise ConfigError("method-does-not-fit", problem, key="methods.altup", value=method, mend=mend)

        def block(index: int) -> int:
            if old is None:
                return 0 if method == "same" else index % blocks
            now = config.layers[index].block
            return now + index % (blocks // old.blocks) * old.blocks if method == "clone" else now

        layers = tuple(dataclasses.replace(layer, block=block(i)) for i, layer in enumerate(config.layers))
        return dataclasses.replace(config, stream=stream, layers=layers)

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        if config.stream == target.stream:
            return config
        config = dataclasses.replace(config, stream=target.stream)
        return each_layer(config, target, lambda layer, wanted: dataclasses.replace(layer, block=wanted.block))

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        assert target.stream is not None
        if source.stream is not None and source.stream.blocks == target.stream.blocks:
            return Exactness("exact", "the new parts of embedding and head are zero")
        if method == "round_robin":
            return Exactness("exact", "what the layers add lies in other blocks, and its sum is read")
        if method in ("copies", "clone"):
            return Exactness("exact", "what reads the copies of a block adds up to what read the one", rescales=True)
        return Exactness("exact", "what reads the new blocks is zero, and the old stream passes from block to block")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        spec, old, old_spec = growth.spec, growth.old, growth.old_spec
        if old is not None and old_spec is not None and old_spec.axes == spec.axes:
            return Grown(old)
        if spec.component != "stream":  # embedding, final norm and head have new parts, a router its norm
            new = growth.fresh()
            if spec.role in ("embedding", "head"):
                new.zero_()
            return Grown(new if old is None or old_spec is None else expand(old, old_spec.axes, new, spec.axes))
        if old is None:
            return Grown(_start(growth))
        if spec.role == "weight":  # a router of tokens to more routes
            return Grown(expand(old, growth.old_spec.axes, growth.fresh(), spec.axes))  # type: ignore[union-attr]
        return _lift(growth, old)


def _full(variant: Any, blocks: int, old: AltUp | None) -> bool:
    key = "grow.altup_variant"
    if variant not in (None, "recycled", "full"):
        raise ConfigError("unknown-choice", "is not allowed", key=key, value=variant, mend="allowed: recycled, full")
    if variant == "recycled" and old is not None and old.full:
        problem, mend = "would drop all parts of embedding and head but one", "leave it out: the model stays full"
        raise ConfigError("shrinking-target", problem, key=key, value=variant, mend=mend)
    if variant is not None and blocks == 1:
        mend = "grow altup_blocks to 2 or more as well"
        raise ConfigError("nothing-to-grow", "is a choice between blocks, and there is one", key=key, mend=mend)
    return variant == "full" or (variant is None and old is not None and old.full)


def _started(config: ModelConfig, blocks: int, full: bool, fields: Mapping[str, Any], method: str) -> AltUp:
    order = fields.get("altup_order", STARTS[method][0])
    check_order(order, "grow.altup_order", STARTS[method], f"the method {method}")
    routed = _routed(fields)
    if routed:
        check_routed(blocks, order, "grow.altup_coefficients")
        if method not in ("same", "copies"):
            problem = f"does not go with the method {method}, which takes another block from layer to layer"
            mend = "use the method same or copies, or static coefficients"
            raise ConfigError("nothing-to-route", problem, key="grow.altup_coefficients", value="routed", mend=mend)
    check_round_robin(blocks, order, len(config.layers), "grow.altup_blocks")
    return AltUp(blocks, full, order, routed, router_scale(config.embed_dim) if routed else 1.0)


def _lifted(old: AltUp, blocks: int, full: bool, fields: Mapping[str, Any], layers: int) -> AltUp:
    check_order(fields.get("altup_order", old.order), "grow.altup_order", (old.order,), "a stream of that order")
    if _routed(fields) and not old.routed:
        mend = "leave it out: a stream keeps the coefficients it has"
        problem = "cannot be reached from static coefficients"
        raise ConfigError("bad-target", problem, key="grow.altup_coefficients", value="routed", mend=mend)
    check_round_robin(blocks, old.order, layers, "grow.altup_blocks")
    return dataclasses.replace(old, blocks=blocks, full=full)


def _routed(fields: Mapping[str, Any]) -> bool:
    value = fields.get("altup_coefficients", "static")
    if value not in ("static", "routed"):
        mend = "allowed: static, routed"
        raise ConfigError("unknown-choice", "is not allowed", key="grow.altup_coefficients", value=value, mend=mend)
    return bool(value == "routed")


def _noise(growth: TensorGrowth) -> Tensor:
    """Standard normals, in the shape of a mixing parameter."""
    assert growth.spec.init_std is not None
    drawn = growth.fresh()
    if growth.spec.constant is not None:
        drawn = drawn - drawn.new_tensor(growth.spec.constant).view(drawn.shape)
    return drawn / growth.spec.init_std


def _start(growth: TensorGrowth) -> Tensor:
    """A coefficient of a stream that was one block."""
    spec, method, stream, layers = growth.spec, growth.method, growth.target.stream, growth.target.layers
    assert stream is not None
    K, role = stream.blocks, spec.role
    value = growth.fresh().zero_() if role != "weight" else growth.fresh()
    if role == "enter":
        value.fill_diagonal_(1)  # of a full stream: every part its block
        if method == "copies":
            value[:, 0] = 1
        elif not stream.full and method != "round_robin":  # the old embedding, in every block another share of it
            value[:, 0] = value.new_tensor([1 - k / K for k in range(K)])
    elif role == "leave":
        value.fill_diagonal_(1)
        if method == "copies":  # shares, not alike either: what the last layer's blocks are for would be one thing
            shares = value.new_tensor([1 + k / K for k in range(K)])
            value[0] = shares / shares.sum()
        elif method == "round_robin":
            value[0] = 1
        else:
            value[0] = 0
            last = layers[-1].block
            value[0, (last + 1) % K if method == "push" else last] = 1
    elif role == "read":
        value = value.fill_(1) if method == "round_robin" else growth.fresh()
    elif role in ("mix", "write"):
        index = next(i for i, layer in enumerate(layers) if layer.id == spec.layer)
        value = _routing(growth, K) if spec.routed else _mixing(growth, K, index)
    return value


def _mixing(growth: TensorGrowth, K: int, index: int) -> Tensor:
    """``mix`` and ``write`` of layer ``index``, alike for all tokens."""
    value, layers, block = growth.fresh(), growth.target.layers, growth.target.layers[index].block
    if growth.spec.role == "write":
        value.fill_(1)
        if growth.method == "push":  # both blocks would hold what the layer made
            value[block] = HALF
        return value
    noise = _noise(growth) * (SPREAD / math.sqrt(len(layers)))
    if growth.method == "copies":
        noise = noise - noise.mean(1, keepdim=True)
    else:
        noise.fill_diagonal_(0)
    value = noise + noise.new_ones(K).diag()
    if growth.method == "push":
        value[(block + 1) % K] = value[block]
    elif growth.method != "copies":
        value[block] = 0
        value[block, layers[index - 1].block if index and growth.method == "pull" else block] = 1
    return value


def _routing(growth: TensorGrowth, K: int) -> Tensor:
    """``mix`` and ``write`` that are made for each token: of the first block, or of copies, they change nothing."""
    value = _noise(growth) * (SPREAD / math.sqrt(len(growth.target.layers)))
    if growth.spec.role == "write":
        return value.zero_() if growth.method == "copies" else _without_first(value)
    rows = value.view(K, K, K)
    if growth.method == "copies":
        return (rows - rows.mean(1, keepdim=True)).view_as(value)
    return _without_first(rows).view_as(value)


def _without_first(rows: Tensor) -> Tensor:
    rows[0] = 0
    return rows


def _lift(growth: TensorGrowth, old: Tensor) -> Grown:
    """A coefficient of more blocks from that of fewer, or of as many whose parts are more. Moments of what clones share
    are an even share: which of them will be read more, nothing says."""
    spec, source, target = growth.spec, growth.source.stream, growth.target.stream
    assert source is not None and target is not None and growth.old_spec is not None
    K, more, clones = source.blocks, target.blocks, growth.method == "clone"
    split = clones and source.order == "round_robin"  # a block's content is shared out, not copied
    copies = more // K if clones else 1
    shared = 1 / copies
    if spec.role == "enter":
        value = old.new_zeros(spec.shape).fill_diagonal_(1)
        value[:, : old.shape[1]] = 0
        for at in range(0, more if clones and not split else K, K):
            value[at : at + K, : old.shape[1]] = old
        if not clones and not source.full:
            value[K:, 0] = 1
        return Grown(value, gradient=shared)
    if spec.role == "leave":
        value = old.new_zeros(spec.shape).fill_diagonal_(1)
        value[: len(old)] = 0
        for at in range(0, K * copies, K):
            value[: len(old), at : at + K] = old if split else old / copies
        return Grown(value, gradient=shared if split else 1.0)
    if spec.role == "read":
        value = old.new_zeros(spec.shape)
        for at in range(0, K * copies, K):
            value[at : at + K] = old if split else old / copies
        return Grown(value, gradient=shared if split else 1.0)
    return Grown(_lifted_mixing(growth, old, K, more, clones), gradient=shared)


def _lifted_mixing(growth: TensorGrowth, old: Tensor, K: int, more: int, clones: bool) -> Tensor:
    """``mix`` and ``write``: old blocks read no new ones. Clones are mixed as what they are clones of; other new blocks
    read all of them."""
    spec = growth.spec
    routes = spec.shape[-1] if spec.routed else 1
    blocks = (more, more) if spec.role == "mix" else (more,)
    old = old.view(*(K for _ in blocks), -1)
    if clones:
        value = old.new_zeros(*blocks, routes)
        for at in range(0, more, K):
            value[(*(slice(at, at + K) for _ in blocks), slice(old.shape[-1]))] = old
        return value.view(spec.shape)
    if spec.routed:
        value = _noise(growth) * (SPREAD / math.sqrt(len(growth.target.layers)))
    elif spec.role == "write":
        value = growth.fresh().fill_(1)
    else:
        value = (_noise(growth) * (SPREAD / math.sqrt(len(growth.target.layers)))).fill_diagonal_(1)
    value = value.view(*blocks, routes)
    value[:K] = 0
    value[(*(slice(K) for _ in blocks), slice(old.shape[-1]))] = old
    return value.view(spec.shape)


OPERATORS.register("altup")(Blocks())
