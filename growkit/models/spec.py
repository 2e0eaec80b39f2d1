"""The table of parameters: for a configuration, every parameter's name, axes, role and start. No torch here.

The module tree (decoder.py), initialisation, parameter counts, FLOPs, optimizer groups and growth all read this one
table, so they cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from growkit.models.axes import AnyAxis, Axis, Concat, Product
from growkit.models.config import (
    AltUp,
    Attention,
    DenseMLP,
    LayerSpec,
    Linear,
    Mamba,
    ModelConfig,
    MoEMLP,
    Norm,
    Pattention,
    Projection,
    projections,
)

Role = Literal[
    "embedding", "head", "weight", "keys", "values", "gain", "bias",
    "enter", "leave", "read", "mix", "write",  # of AltUp's blocks (models/stream.py)
    "conv", "a_log", "skip",  # of Mamba (models/mamba.py)
]  # fmt: skip
Component = Literal["embedding", "attention", "mamba", "mlp", "norm", "head", "stream"]
Start = Literal["normal", "a_log", "dt_bias", "uniform"]
INIT_STD = 0.02  # embeddings and linear maps: GPT-2's choice


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. ``axes``: one per dimension. ``init_std``: None means a constant (gains 1, biases 0, or
    ``constant``, row-major), which is what there is besides the noise if there is both. ``start``: what is drawn, where
    that is no normal (models/mamba.py); ``between``: least and most of what is drawn log-uniformly.

    ``layer``/``local``: which layer it belongs to and its name there, so that an inserted layer finds its origin's.
    ``experts_per_token``: of its first axis, where that is experts and a token goes through some of them.
    """

    axes: tuple[AnyAxis, ...]
    role: Role
    component: Component
    init_std: float | None
    layer: int | None = None
    local: str = ""
    bank: int | None = None
    experts_per_token: int | None = None
    constant: tuple[float, ...] | None = None
    start: Start = "normal"
    between: tuple[float, float] | None = None
    routed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @cached_property
    def numel(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    @property
    def numel_per_token(self) -> int:
        """The entries that one token's products read."""
        if self.experts_per_token is None:
            return self.numel
        return self.numel // self.axes[0].size * self.experts_per_token

    @property
    def is_matmul(self) -> bool:
        """Whether a matrix product reads it (an embedding is looked up; a norm is elementwise)."""
        return self.role in ("head", "weight", "keys", "values") or self.routed

    @property
    def out_dim(self) -> int | None:
        """The dimension it writes: of a linear weight (out, in) or (experts, out, in) the last but one, 0 of its bias
        and of what Mamba has for each channel, 1 of values and of an embedding table. None of what a norm has, which
        scales and shifts what it reads, and of what mixes blocks."""
        if self.component in ("norm", "stream"):
            return None
        channels: dict[Role, int] = {"conv": 0, "a_log": 0, "skip": 0}
        return ({"weight": len(self.axes) - 2, "bias": 0, "values": 1, "embedding": 1} | channels).get(self.role)

    @property
    def writes_residual(self) -> bool:
        """Whether it, or its product, is added to the residual stream (or starts it)."""
        return self.out_dim is not None and "embed" in self.axes[self.out_dim].names

    def starts_at(self) -> float:
        """The constant an elementwise parameter starts at."""
        return 1.0 if self.role in ("gain", "skip") else 0.0


@lru_cache(maxsize=64)
def _specs(config: ModelConfig) -> tuple[tuple[str, ParamSpec], ...]:
    embed = Axis("embed", config.embed_dim)
    vocab = Axis("vocab", config.vocab_size)
    wide: AnyAxis = Product((Axis("parts", config.parts), embed)) if config.parts > 1 else embed
    table = [("embedding.weight", ParamSpec((vocab, wide), "embedding", "embedding", INIT_STD))]
    table += _ends(config.stream) if config.stream is not None else []
    depth = len(config.layers)
    for layer in config.layers:
        for local, spec in _layer(layer, config, embed, depth):
            table.append((f"layers.{layer.id}.{local}", spec))
    table += [(f"final_norm.{name}", spec) for name, spec in _norm(config.final_norm, wide)]
    if not config.tied_head:
        table.append(("head.weight", ParamSpec((vocab, wide), "head", "head", INIT_STD)))
    return tuple(table)


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Name → ParamSpec of every parameter, in the order of the model's ``named_parameters()``."""
    return dict(_specs(config))


def _norm(norm: Norm, axis: AnyAxis, local: str = "", layer: int | None = None) -> list[tuple[str, ParamSpec]]:
    rows: list[tuple[str, ParamSpec]] = []
    if norm.kind != "layernorm_gainless":
        rows.append(("gain", ParamSpec((axis,), "gain", "norm", None, layer, f"{local}gain")))
    if norm.kind == "layernorm":
        rows.append(("bias", ParamSpec((axis,), "bias", "norm", None, layer, f"{local}bias")))
    return rows


def _layer(layer: LayerSpec, config: ModelConfig, embed: Axis, depth: int) -> list[tuple[str, ParamSpec]]:
    rows: list[tuple[str, ParamSpec]] = []

    def norm(prefix: str, kind: Norm, axis: AnyAxis) -> None:
        rows.extend((prefix + name, spec) for name, spec in _norm(kind, axis, prefix, layer.id))

    def dense(prefix: str, kind: Projection, inp: AnyAxis, out: AnyAxis, part: Component) -> None:
        rows.extend(_projection(prefix, kind, inp, out, part, layer.id, depth))

    mixer = layer.mixer
    norm(f"{mixer.kind}_norm.", config.norm, embed)
    if isinstance(mixer, Mamba):
        rows += _mamba(mixer, embed, layer.id, depth)
    else:
        rows += _attention(mixer, embed, layer.id, depth)
    mlp = layer.mlp
    if mlp is not None:
        norm("mlp_norm.", config.norm, embed)
    if isinstance(mlp, DenseMLP | MoEMLP):
        read, inner = _hidden_axes(mlp)
        if isinstance(mlp, MoEMLP):
            rows.extend(_experts(mlp, embed, layer.id, depth))
        else:
            dense(f"mlp.{read}.", Linear(mlp.bias), embed, inner, "mlp")
            dense("mlp.down.", Linear(mlp.bias), Axis("mlp", mlp.dim), embed, "mlp")
    elif mlp is not None:
        dense("mlp.tokens.", mlp.projection, embed, embed, "mlp")
    if layer.stride > 1:
        rows += _coefficients(layer.id, mix=((Axis("taps", 2),), (1.0, 0.0)), write=((Axis("taps", 1),), (1.0,)))
    elif config.stream is not None:
        if config.stream.routed:
            rows += _routed(layer.id, config.stream.blocks, embed)
            norm("stream.router_norm.", config.norm, embed)
        else:
            rows += _static(layer, config.stream)
    return rows


Coefficients = tuple[tuple[AnyAxis, ...], tuple[float, ...]]
ROUTER_STD = 0.5  # routes that differ from token to token, and that tanh does not flatten
MIX_STD = 0.02  # of a fresh stream's mixing: blocks that start alike would stay so


def _ends(stream: AltUp) -> list[tuple[str, ParamSpec]]:
    """Fresh: every block is the embedding and the head reads their mean; in a full stream each has its own part. Of a
    round robin, whose layers read all blocks, the first block is the embedding and the head reads their sum."""
    K, P = stream.blocks, stream.parts
    if P > 1:
        enter = leave = _unit(K)
    elif stream.order == "round_robin":
        enter, leave = (1.0, *[0.0] * (K - 1)), (1.0,) * K
    else:
        enter, leave = (1.0,) * K, (1 / K,) * K
    blocks, parts = Axis("blocks", K), Axis("parts", P)
    return [
        ("stream.enter", ParamSpec((blocks, parts), "enter", "stream", None, constant=enter)),
        ("stream.leave", ParamSpec((parts, blocks), "leave", "stream", None, constant=leave)),
    ]


def _unit(size: int) -> tuple[float, ...]:
    return tuple(float(i == j) for i in range(size) for j in range(size))


def _static(layer: LayerSpec, stream: AltUp) -> list[tuple[str, ParamSpec]]:
    """Fresh: every block keeps what it is and gets what the layer changed; the layer reads its own block, or all."""
    K = stream.blocks
    blocks = Axis("blocks", K)
    given: dict[Role, Coefficients] = {}
    if stream.order == "round_robin":
        given["read"] = (blocks,), (1.0,) * K
    elif stream.order == "free":
        given["read"] = (blocks,), tuple(float(i == layer.block) for i in range(K))
    if stream.order != "round_robin":
        given["mix"], given["write"] = ((blocks, blocks), _unit(K)), ((blocks,), (1.0,) * K)
    return _coefficients(layer.id, **given)


def _coefficients(layer: int, **given: Coefficients) -> list[tuple[str, ParamSpec]]:
    rows = []
    for role, (axes, constant) in given.items():
        local, std = f"stream.{role}", MIX_STD if axes[-1].names == {"blocks"} and role == "mix" else None
        rows.append((local, ParamSpec(axes, role, "stream", std, layer, local, constant=constant)))  # type: ignore[arg-type]
    return rows


def _routed(layer: int, K: int, embed: Axis) -> list[tuple[str, ParamSpec]]:
    blocks, routes = Axis("blocks", K), Axis("routes", K)
    given: dict[Role, tuple[tuple[AnyAxis, ...], Role]] = {
        "weight": ((routes, embed), "weight"),
        "mix": ((Product((blocks, blocks)), routes), "mix"),
        "write": ((blocks, routes), "write"),
    }
    rows = []
    for name, (axes, role) in given.items():
        local = "stream.router" if name == "weight" else f"stream.{name}"
        std = ROUTER_STD if role == "weight" else INIT_STD
        spec = ParamSpec(axes, role, "stream", std, layer, local, routed=role != "weight")
        rows.append((local, spec))
    return rows


def _attention(mixer: Attention, embed: Axis, layer: int, depth: int) -> list[tuple[str, ParamSpec]]:
    heads, kv_heads = _head_axes(mixer)
    rows = []
    for name, inp, out in (("q", embed, heads), ("k", embed, kv_heads), ("v", embed, kv_heads), ("o", heads, embed)):
        kind = projections(mixer)[name]
        rows += _projection(f"attention.{name}.", kind, inp, out, "attention", layer, depth)
    if mixer.qk_norm is not None:
        for name in ("q_norm", "k_norm"):
            prefix = f"attention.{name}."
            normed = _norm(mixer.qk_norm, Axis("head_dim", mixer.head_dim), prefix, layer)
            rows += [(prefix + local, spec) for local, spec in normed]
    return rows


def _mamba(mixer: Mamba, embed: Axis, layer: int, depth: int) -> list[tuple[str, ParamSpec]]:
    """Starts as in the published code: what torch's linear layers and convolutions start at, Δ's own (``start``)."""
    inner, state, rank = Axis("inner", mixer.inner), Axis("state", mixer.state), Axis("dt_rank", mixer.dt_rank)
    conv = Axis("conv", mixer.conv)
    taps = 1 / math.sqrt(3 * mixer.conv)
    given: dict[str, tuple[tuple[AnyAxis, ...], Role, float | None, Start]] = {
        "A_log": ((inner, state), "a_log", None, "a_log"),
        "D": ((inner,), "skip", None, "normal"),
        "dt_bias": ((inner,), "bias", None, "dt_bias"),
        "conv_weight": ((inner, conv), "conv", taps, "uniform"),
        "conv_bias": ((inner,), "bias", taps, "uniform"),
    }
    rows = []
    for name, (axes, role, std, start) in given.items():
        if name != "conv_bias" or mixer.conv_bias:
            local = f"mamba.{name}"
            between = mixer.dt_start if start == "dt_bias" else None
            rows.append((local, ParamSpec(axes, role, "mamba", std, layer, local, start=start, between=between)))
    for name, inp, out in (
        ("in_proj", embed, Concat((inner, inner))),
        ("x_proj", inner, Concat((rank, state, state))),
        ("dt_proj", rank, inner),
        ("out_proj", inner, embed),
    ):
        std = 1 / math.sqrt(3 * inp.size)
        if name == "dt_proj":
            std = 1 / math.sqrt(3 * rank.size)
        elif name == "out_proj":
            std /= math.sqrt(depth)
        kind = projections(mixer)[name]
        made = _projection(f"mamba.{name}.", kind, inp, out, "mamba", layer, depth, std=std)
        rows += [(local, replace(spec, start="uniform") if spec.role == "weight" else spec) for local, spec in made]
    return rows


def _hidden_axes(mlp: DenseMLP | MoEMLP) -> tuple[str, AnyAxis]:
    """Name and output axis of what reads the stream: gate and up are one parameter."""
    wide = Axis("mlp", mlp.dim)
    return ("gate_up", Concat((wide, wide))) if mlp.gated else ("up", wide)


def _experts(mlp: MoEMLP, embed: Axis, layer: int, depth: int) -> list[tuple[str, ParamSpec]]:
    """A router and several dense blocks, which have a dense block's names, with an axis more: a block that becomes a
    mixture keeps its parameters."""
    wide = Axis("mlp", mlp.dim)
    name, inner = _hidden_axes(mlp)
    rows: list[tuple[str, tuple[AnyAxis, ...], float]] = [
        (f"mlp.{name}.weight", (inner, embed), INIT_STD),
        ("mlp.down.weight", (embed, wide), _writer_std(depth)),
    ]
    experts, k = Axis("experts", mlp.num_experts), mlp.experts_per_token
    router = "mlp.router.weight"
    return [
        (router, ParamSpec((experts, embed), "weight", "mlp", INIT_STD, layer, router)),
        *(
            (local, ParamSpec((experts, *axes), "weight", "mlp", std, layer, local, experts_per_token=k))
            for local, axes, std in rows
        ),
    ]


def _head_axes(mixer: Attention) -> tuple[Product, Product]:
    """(heads × head_dim, kv_heads × head_dim)."""
    head_dim = Axis("head_dim", mixer.head_dim)
    return Product((Axis("heads", mixer.num_heads), head_dim)), Product(
        (Axis("kv_heads", mixer.num_kv_heads), head_dim)
    )


def _writer_std(depth: int) -> float:
    """What writes the residual stream starts smaller by the root of the number of writes (GPT-2, section 2.3)."""
    return INIT_STD / math.sqrt(2 * depth)


def _projection(
    prefix: str,
    kind: Projection,
    inp: AnyAxis,
    out: AnyAxis,
    part: Component,
    layer: int,
    depth: int,
    *,
    std: float | None = None,
) -> list[tuple[str, ParamSpec]]:
    """``std``: of a linear weight, where it is not GPT-2's."""
    if not isinstance(kind, Pattention):
        if std is None:
            std = _writer_std(depth) if out.names == {"embed"} else INIT_STD
        weight, bias = f"{prefix}weight", f"{prefix}bias"
        rows = [(weight, ParamSpec((out, inp), "weight", part, std, layer, weight))]
        if kind.bias:
            rows.append((bias, ParamSpec((out,), "bias", part, None, layer, bias)))
        return rows
    rows = []
    # Keys of norm 1: their scale leaves the function as it is but sets how fast Adam turns them. Values: TokenFormer's
    # published start, except where they write the residual stream, which that start would drown at small widths.
    key_std = 1 / math.sqrt(inp.size)
    value_std = _writer_std(depth) if out.names == {"embed"} else 2 / (depth * math.sqrt(out.size))
    for side, axis, std in (("keys", inp, key_std), ("values", out, value_std)):
        for bank, size in enumerate(kind.banks):
            local = f"{prefix}{side}.{bank}"
            role: Role = "keys" if side == "keys" else "values"
            rows.append((local, ParamSpec((Axis("param_tokens", size), axis), role, part, std, layer, local, bank)))
    return rows
