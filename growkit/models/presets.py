"""Short ways to say a whole model in a recipe. A preset's fields are sugar: ``written_out`` has every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from growkit.errors import ConfigError
from growkit.models.config import (
    MLP_KINDS,
    MOST_LAYERS,
    NORM_KINDS,
    STREAM_ORDERS,
    THETAS,
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
    PattentionMLP,
)
from growkit.registry import Registry


class Preset(Protocol):
    def written_out(self) -> ModelConfig: ...


PRESETS: Registry[type[Any]] = Registry("model preset")


def initial_tau(theta: str, tokens: int) -> float:
    """τ of a fresh set of parameter tokens: √n, or n for softmax (TokenFormer, table 9 and appendix A)."""
    return float(tokens) if theta == "softmax" else math.sqrt(tokens)


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value <= 0:
            raise ConfigError("not-positive", "must be above zero", key=f"model.{name}", value=value)


def _choice(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        mend = f"allowed: {', '.join(allowed)}"
        raise ConfigError("unknown-choice", "is not allowed", key=f"model.{name}", value=value, mend=mend)


def mixture(block: DenseMLP | MoEMLP, experts: int, per_token: int, balance_loss: float, section: str) -> MoEMLP:
    """``experts`` blocks, ``per_token`` of them for a token. Raises ConfigError naming a key of ``section``."""
    if per_token < 2:
        mend = "use 2 or more: of one expert the gate is always 1, and the router would never learn"
        raise ConfigError("too-small", "is too few", key=f"{section}.experts_per_token", value=per_token, mend=mend)
    if experts < per_token:
        problem = f"is below {section}.experts_per_token = {per_token}"
        mend = f"use {per_token} or more"
        raise ConfigError("too-small", problem, key=f"{section}.num_experts", value=experts, mend=mend)
    if not 0 <= balance_loss < math.inf:
        problem = "must be 0 or more"
        raise ConfigError("out-of-range", problem, key=f"{section}.balance_loss", value=balance_loss)
    if isinstance(block, DenseMLP) and (block.bias or block.kind == "gelu_tanh"):
        what = "biases" if block.bias else "GELU by tanh"
        mend = "leave num_experts out, or start from blocks without biases, swiglu or gelu"
        raise ConfigError(
            "unknown-choice", f"does not go with {what}", key=f"{section}.num_experts", value=experts, mend=mend
        )
    kind: Literal["moe_swiglu", "moe_gelu"] = "moe_swiglu" if block.gated else "moe_gelu"
    return MoEMLP(block.dim, experts, per_token, float(balance_loss), kind)


MOST_BLOCKS = 64  # K² coefficients in every layer


def check_blocks(blocks: int, key: str) -> None:
    """Raises ConfigError naming ``key`` for more blocks than a stream may have."""
    if blocks > MOST_BLOCKS:
        raise ConfigError("too-large", f"must be at most {MOST_BLOCKS}", key=key, value=blocks)


def check_order(order: Any, key: str, allowed: tuple[str, ...], of: str) -> None:
    """Raises ConfigError naming ``key`` for an order that is not among those ``allowed`` for ``of``."""
    if order not in allowed:
        mend = f"allowed for {of}: {', '.join(allowed)}"
        raise ConfigError("unknown-choice", "is not allowed", key=key, value=order, mend=mend)


def check_round_robin(blocks: int, order: str, layers: int, key: str) -> None:
    """Raises ConfigError naming ``key`` where a round robin never comes to some of its blocks."""
    if order == "round_robin" and blocks > layers:
        problem, mend = f"leaves blocks that none of the {layers} layers writes", f"use {layers} or fewer"
        raise ConfigError("too-large", problem, key=key, value=blocks, mend=mend)


def router_scale(embed_dim: int) -> float:
    """Of a stream that growkit makes: with weights of size 1 a token's routes are then of size 1."""
    return 1 / math.sqrt(embed_dim)


def check_routed(blocks: int, order: str, key: str) -> None:
    """Raises ConfigError naming ``key`` where the coefficients of a stream cannot be routed."""
    if blocks == 1:
        problem = "has nothing to route: there is one block"
        mend = "set altup_blocks to 2 or more, or use static coefficients"
        raise ConfigError("nothing-to-route", problem, key=key, value="routed", mend=mend)
    if order not in ("gemma", "paper"):
        problem, mend = f"does not go with the order {order}", "use the order gemma or paper, or static coefficients"
        raise ConfigError("nothing-to-route", problem, key=key, value="routed", mend=mend)


@dataclass
class _Common:
    """Fields every preset has."""

    preset: str = ""
    vocab_size: int = 256  # entries of the embedding table; 256 = bytes
    embed_dim: int = 128  # width of the residual stream
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # default: num_heads; fewer = grouped-query attention
    head_dim: int | None = None  # default: embed_dim / num_heads
    norm: str = "rmsnorm"  # rmsnorm | layernorm | layernorm_gainless, inside the blocks
    final_norm: str | None = None  # default: norm
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_fraction: float = 1.0  # share of each head that is rotated
    qk_norm: bool = False
    tied_head: bool = True
    dropout: float = 0.0  # on every residual write, 0..1
    altup_blocks: int = 1  # K: a token is so many vectors of embed_dim between layers, at one layer's cost
    altup_variant: str = "recycled"  # recycled: blocks share one embedding and head | full: each has its own part
    altup_order: str = "gemma"  # gemma | paper | free (hyper-connections) | round_robin
    altup_active: str = "alternating"  # the block a layer works on: alternating | same (always the first)
    altup_coefficients: str = "static"  # static | routed (each token its own, as Gemma 3n; gemma and paper only)
    altup_stride: int = 1  # Sequence-AltUp: all layers but first and last run on every so many tokens

    def _check(self) -> None:
        self._check_stream()
        _positive(self, "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "norm_eps")
        _positive(self, "rope_base")
        if self.num_layers > MOST_LAYERS:
            problem = f"must be at most {MOST_LAYERS}"
            raise ConfigError("too-large", problem, key="model.num_layers", value=self.num_layers)
        _choice(self.norm, NORM_KINDS, "norm")
        _choice(self.final_norm or self.norm, NORM_KINDS, "final_norm")
        if not 0 <= self.dropout < 1:
            raise ConfigError("out-of-range", "must be in [0, 1)", key="model.dropout", value=self.dropout)

    def _check_heads(self) -> None:
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ConfigError(
                "heads-do-not-divide",
                f"is not divisible by model.num_heads = {self.num_heads}",
                key="model.embed_dim",
                value=self.embed_dim,
                mend=f"use a multiple of {self.num_heads}, or set model.head_dim",
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "kv-heads-do-not-divide",
                f"does not divide model.num_heads = {self.num_heads}",
                key="model.num_kv_heads",
                value=self.num_kv_heads,
                mend=f"use a divisor of {self.num_heads}",
            )
        if not 0 <= self.rope_fraction <= 1:
            raise ConfigError("out-of-range", "must be in [0, 1]", key="model.rope_fraction", value=self.rope_fraction)
        rotated = self._head_dim * self.rope_fraction  # 0.28 · 50 is 14.000000000000002
        if abs(rotated - round(rotated)) > 1e-9 or round(rotated) % 2:
            raise ConfigError(
                "odd-rotation",
                f"rotates {rotated:g} of {self._head_dim} dimensions of a head, which must be an even number",
                key="model.rope_fraction",
                value=self.rope_fraction,
                mend="choose head_dim and rope_fraction so that their product is even",
            )

    def _check_stream(self) -> None:
        _positive(self, "altup_blocks", "altup_stride")
        _choice(self.altup_variant, ("recycled", "full"), "altup_variant")
        check_order(self.altup_order, "model.altup_order", STREAM_ORDERS, "a stream")
        _choice(self.altup_active, ("alternating", "same"), "altup_active")
        _choice(self.altup_coefficients, ("static", "routed"), "altup_coefficients")
        check_blocks(self.altup_blocks, "model.altup_blocks")
        check_round_robin(self.altup_blocks, self.altup_order, self.num_layers, "model.altup_blocks")
        if self.altup_coefficients == "routed":
            check_routed(self.altup_blocks, self.altup_order, "model.altup_coefficients")
        if self.altup_stride > 1 and self.altup_blocks > 1:
            problem, mend = "does not go with model.altup_blocks above 1", "leave one of the two out"
            raise ConfigError("streams-exclude", problem, key="model.altup_stride", value=self.altup_stride, mend=mend)

    def _stream(self) -> AltUp | None:
        if self.altup_blocks == 1:
            return None
        routed = self.altup_coefficients == "routed"
        scale = router_scale(self.embed_dim) if routed else 1.0
        return AltUp(self.altup_blocks, self.altup_variant == "full", self.altup_order, routed, scale)  # type: ignore[arg-type]

    def _layer(self, place: int, **parts: Any) -> LayerSpec:
        block = place % self.altup_blocks if self.altup_active == "alternating" else 0
        inside = 0 < place < self.num_layers - 1
        return LayerSpec(place, **parts, block=block, stride=self.altup_stride if inside else 1)

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    def _model(
        self, mixer: Attention, mlp: DenseMLP | MoEMLP | PattentionMLP, *, parallel: bool = False
    ) -> ModelConfig:
        return self._stacked([{"mixer": mixer, "mlp": mlp, "parallel": parallel}] * self.num_layers)

    def _stacked(self, layers: Sequence[Mapping[str, Any]]) -> ModelConfig:
        """A model of ``layers``, each by the fields of its LayerSpec that are its own."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            embed_dim=self.embed_dim,
            layers=tuple(self._layer(i, **layer) for i, layer in enumerate(layers)),
            norm=Norm(self.norm, self.norm_eps),  # type: ignore[arg-type]
            final_norm=Norm(self.final_norm or self.norm, self.norm_eps),  # type: ignore[arg-type]
            tied_head=self.tied_head,
            dropout=self.dropout,
            stream=self._stream(),
        )

    def _attention(self, q: Any, k: Any, v: Any, o: Any) -> Attention:
        return Attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self._head_dim,
            q=q,
            k=k,
            v=v,
            o=o,
            rope_base=self.rope_base,
            rope_fraction=self.rope_fraction,
            qk_norm=Norm("rmsnorm", self.norm_eps) if self.qk_norm else None,
        )


@PRESETS.register("tokenformer")
@dataclass
class TokenFormer(_Common):
    """Attention and MLP as attention over parameter tokens (arXiv 2410.23168)."""

    preset: str = "tokenformer"
    attention_tokens: int = 128  # parameter tokens of each of q, k, v, o
    q_tokens: int | None = None  # default for each: attention_tokens
    k_tokens: int | None = None
    v_tokens: int | None = None
    o_tokens: int | None = None
    mlp_tokens: int = 512  # parameter tokens of the feed-forward block
    theta: str = "l2_norm_gelu"  # l2_norm_gelu | gelu_l2_norm | softmax
    token_norm: str = "bank"  # bank: every bank normalised on its own; shared: over all tokens, as published

    def written_out(self) -> ModelConfig:
        self._check()
        self._check_heads()
        _positive(self, "attention_tokens", "q_tokens", "k_tokens", "v_tokens", "o_tokens", "mlp_tokens")
        _choice(self.theta, THETAS, "theta")
        _choice(self.token_norm, ("bank", "shared"), "token_norm")

        def tokens(count: int | None) -> Pattention:
            size = count if count is not None else self.attention_tokens
            return Pattention((size,), (initial_tau(self.theta, size),), self.theta, self.token_norm)  # type: ignore[arg-type]

        mixer = self._attention(*(tokens(n) for n in (self.q_tokens, self.k_tokens, self.v_tokens, self.o_tokens)))
        return self._model(mixer, PattentionMLP(tokens(self.mlp_tokens)))


@PRESETS.register("transformer")
@dataclass
class Transformer(_Common):
    """Transformer++: RoPE, RMSNorm, SwiGLU, no biases, unless told otherwise."""

    preset: str = "transformer"
    mlp_dim: int | None = None  # default: 8/3 · embed_dim, rounded up to a multiple of 16
    mlp: str = "swiglu"  # swiglu | gelu | gelu_tanh
    num_experts: int | None = None  # feed-forward blocks of mlp_dim in each layer; default: one, without a router
    experts_per_token: int = 2  # of them that a token goes through, 2..num_experts
    balance_loss: float = 0.01  # weight of the experts' load-balancing loss in training, 0 or more
    bias: bool = False  # on every dense map of a layer
    parallel: bool = False  # attention and MLP of a layer read the same residual stream, as in GPT-NeoX

    def written_out(self) -> ModelConfig:
        self._check()
        self._check_heads()
        _positive(self, "mlp_dim")
        _choice(self.mlp, MLP_KINDS, "mlp")
        dim = self.mlp_dim or math.ceil(self.embed_dim * 8 / 3 / 16) * 16
        linear = Linear(self.bias)
        mlp: DenseMLP | MoEMLP = DenseMLP(dim, self.mlp, self.bias)  # type: ignore[arg-type]
        if self.num_experts is not None:
            mlp = mixture(mlp, self.num_experts, self.experts_per_token, self.balance_loss, "model")
        return self._model(self._attention(linear, linear, linear, linear), mlp, parallel=self.parallel)


@PRESETS.register("mamba")
@dataclass
class MambaLM(_Common):
    """Mamba (arXiv 2312.00752), alone or with attention layers between, over linear maps or parameter tokens."""

    preset: str = "mamba"
    pattern: str | None = None  # mixers in order, such as mamba*7+attention, repeated to num_layers; default: mamba
    d_state: int = 16  # states of each channel
    expand: int = 2  # channels, in embed_dim
    d_conv: int = 4  # taps of the convolution
    dt_rank: int | None = None  # of what Δ is made of; default: embed_dim / 16, rounded up
    dt_min: float = 1e-3  # least Δ of a fresh channel: 1 / dt_min tokens are how long it remembers
    dt_max: float = 0.1  # most
    conv_bias: bool = True  # on the convolution
    bias: bool = False  # on the projections into and out of the mixer
    projection: str = "linear"  # linear | pattention: parameter tokens in place of every dense map of the mixers
    mamba_tokens: int = 128  # parameter tokens of each projection of a Mamba layer
    attention_tokens: int = 128  # of each of q, k, v and o, in attention layers
    mlp_tokens: int = 512  # of the MLP that an attention layer has
    mlp_dim: int | None = None  # of that MLP with linear maps, SwiGLU; default: 8/3 · embed_dim, up to a multiple of 16
    theta: str = "l2_norm_gelu"  # l2_norm_gelu | gelu_l2_norm | softmax
    token_norm: str = "bank"  # bank | shared

    def written_out(self) -> ModelConfig:
        self._check()
        _positive(self, "d_state", "expand", "d_conv", "dt_rank", "mamba_tokens", "attention_tokens", "mlp_tokens")
        _positive(self, "mlp_dim", "dt_min", "dt_max")
        if self.dt_max < self.dt_min:
            problem, mend = f"is below model.dt_min = {self.dt_min}", f"use dt_max={max(0.1, self.dt_min)}"
            raise ConfigError("too-small", problem, key="model.dt_max", value=self.dt_max, mend=mend)
        _choice(self.projection, ("linear", "pattention"), "projection")
        _choice(self.theta, THETAS, "theta")
        _choice(self.token_norm, ("bank", "shared"), "token_norm")
        mixers = self._mixers()
        if "attention" in mixers:
            self._check_heads()
        rank = self.dt_rank or math.ceil(self.embed_dim / 16)
        around, inside = (self._map(self.mamba_tokens, bias) for bias in (self.bias, False))
        sizes = self.expand * self.embed_dim, self.d_state, rank, self.d_conv
        layers: dict[str, dict[str, Any]] = {
            "mamba": {
                "mixer": Mamba(
                    *sizes, around, inside, inside, around, self.conv_bias, dt_start=(self.dt_min, self.dt_max)
                ),
                "mlp": None,
            }
        }
        if "attention" in mixers:
            layers["attention"] = self._with_attention()
        return self._stacked([layers[mixer] for mixer in mixers])

    def _map(self, tokens: int, bias: bool = False) -> Linear | Pattention:
        if self.projection == "linear":
            return Linear(bias)
        return Pattention((tokens,), (initial_tau(self.theta, tokens),), self.theta, self.token_norm)  # type: ignore[arg-type]

    def _with_attention(self) -> dict[str, Any]:
        token_mlp = self._map(self.mlp_tokens)
        dim = self.mlp_dim or math.ceil(self.embed_dim * 8 / 3 / 16) * 16
        mlp = PattentionMLP(token_mlp) if isinstance(token_mlp, Pattention) else DenseMLP(dim)
        return {"mixer": self._attention(*[self._map(self.attention_tokens)] * 4), "mlp": mlp}

    def _mixers(self) -> list[str]:
        """The mixer of every layer, from ``pattern``."""
        key, said = "model.pattern", self.pattern or "mamba"
        mixers: list[str] = []
        for part in said.split("+"):
            name, _, count = (word.strip() for word in part.partition("*"))
            if name not in ("mamba", "attention") or not (count.isdecimal() and int(count) if "*" in part else True):
                mend = "write mixers and how often, such as mamba*7+attention"
                raise ConfigError("bad-layers", "is no pattern of mamba and attention", key=key, value=said, mend=mend)
            mixers += [name] * min(int(count or 1), MOST_LAYERS)
        if self.num_layers % len(mixers):
            problem = f"is of {len(mixers)} layers, which do not fit into model.num_layers = {self.num_layers}"
            mend = f"use a pattern of fewer, or num_layers={-(-self.num_layers // len(mixers)) * len(mixers)}"
            raise ConfigError("bad-layers", problem, key=key, value=said, mend=mend)
        return mixers * (self.num_layers // len(mixers))
