"""What a model is: an explicit list of layers, every size written down. No torch here.

Recipes use short presets (presets.py); they expand to a ``ModelConfig`` at once, and nothing later derives a layer's
meaning from its index or from a global number. ``LayerSpec.id`` never changes while a model grows, so parameters keep
their names and optimizer state its keys whatever is inserted between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from growkit.errors import ConfigError
from growkit.models.rope import RopeScaling
from growkit.ops import flops

Theta = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
NormKind = Literal["rmsnorm", "layernorm", "layernorm_gainless"]
MLPKind = Literal["swiglu", "gelu", "gelu_tanh"]
StreamOrder = Literal["gemma", "paper", "free", "round_robin"]
THETAS: tuple[str, ...] = get_args(Theta)
NORM_KINDS: tuple[str, ...] = get_args(NormKind)
MLP_KINDS: tuple[str, ...] = get_args(MLPKind)
STREAM_ORDERS: tuple[str, ...] = get_args(StreamOrder)
MOST_LAYERS = 10_000  # every layer is written out, so a slip of the keyboard could fill the memory


@dataclass(frozen=True)
class Norm:
    """A normalisation over the embed axis (or head_dim for QK-norm). ``eps`` travels with the width."""

    kind: NormKind = "rmsnorm"
    eps: float = 1e-5


@dataclass(frozen=True)
class Linear:
    """A dense map X Wᵀ, plus b if there is a ``bias``."""

    bias: bool = False
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True)
class Pattention:
    """A dense map Σ_g Θ_g(X K_gᵀ) V_g (TokenFormer, arXiv 2410.23168, eq. 5).

    ``banks``: parameter tokens of each bank, in order of growth. ``scope``: ``bank`` normalises each bank on its own
    (``taus``: one τ per bank), ``shared`` normalises over all tokens as published (``taus``: one τ). ``steady_banks``:
    how many banks, from the first, are not under the mask; None: all. ``tau_from``: where the ramp takes ``taus`` from.
    """

    banks: tuple[int, ...]
    taus: tuple[float, ...]
    theta: Theta = "l2_norm_gelu"
    scope: Literal["bank", "shared"] = "bank"
    steady_banks: int | None = None
    tau_from: tuple[float, ...] | None = None
    kind: Literal["pattention"] = "pattention"

    @property
    def tokens(self) -> int:
        return sum(self.banks)


Projection = Union[Linear, Pattention]


@dataclass(frozen=True)
class Attention:
    """Causal attention with rotary positions; query heads are grouped evenly over ``num_kv_heads``. ``steady_heads``:
    the query heads and kv heads that are not under the mask, the first of their groups; None: all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    qk_norm: Norm | None = None
    rope_scaling: RopeScaling | None = None
    steady_heads: tuple[int, int] | None = None
    kind: Literal["attention"] = "attention"

    @property
    def rotated(self) -> int:
        """Dimensions of a head that rotary positions turn."""
        return round(self.head_dim * self.rope_fraction)

    @property
    def rope(self) -> tuple[float, int, RopeScaling | None]:
        """What the angles of rotary positions depend on: layers in which it is the same share a table of them."""
        return self.rope_base, self.rotated, self.rope_scaling


@dataclass(frozen=True)
class Mamba:
    """A selective state space over ``inner`` channels of ``state`` states each (Mamba, arXiv 2312.00752, section 3.4):
    ``in_proj`` to x | z, a causal convolution of ``conv`` taps, ``x_proj`` to the ``dt_rank`` of Δ | B | C, ``dt_proj``
    to Δ, the scan, ``out_proj``. ``inner_norm``: eps of a norm without gain on each of Δ's rank, B and C
    (FalconMamba). ``dt_start``: least and most Δ of a fresh channel; what a token moves a state by goes with Δ, and so
    does what a state loses."""

    inner: int
    state: int
    dt_rank: int
    conv: int
    in_proj: Projection
    x_proj: Projection
    dt_proj: Projection
    out_proj: Projection
    conv_bias: bool = True
    inner_norm: float | None = None
    dt_start: tuple[float, float] = (1e-3, 0.1)
    kind: Literal["mamba"] = "mamba"


Mixer = Union[Attention, Mamba]


@dataclass(frozen=True)
class DenseMLP:
    """``swiglu``: down(silu(gate x) ⊙ up x); ``gelu``: down(gelu(up x)), by erf, ``gelu_tanh`` by its tanh form.
    ``steady_dim``: how many hidden units, from the first, are not under the mask; None: all."""

    dim: int
    kind: MLPKind = "swiglu"
    bias: bool = False
    steady_dim: int | None = None

    @property
    def gated(self) -> bool:
        return self.kind == "swiglu"


@dataclass(frozen=True)
class MoEMLP:
    """A mixture of ``num_experts`` dense blocks, of hidden width ``dim`` each: a token goes through the
    ``experts_per_token`` that a linear router scores highest, weighted by the softmax over those (models/experts.py).
    ``balance_loss``: the weight of the load-balancing loss in training."""

    dim: int
    num_experts: int
    experts_per_token: int
    balance_loss: float = 0.01
    kind: Literal["moe_swiglu", "moe_gelu"] = "moe_swiglu"

    @property
    def gated(self) -> bool:
        return self.kind == "moe_swiglu"


@dataclass(frozen=True)
class PattentionMLP:
    """The whole feed-forward block as one Pattention (TokenFormer)."""

    projection: Pattention
    kind: Literal["pattention"] = "pattention"


@dataclass(frozen=True)
class AltUp:
    """A token is ``blocks`` vectors of embed_dim between layers, of which a layer computes on one combination
    (AltUp, arXiv 2301.13310; models/stream.py has the equations and what ``order`` names).

    ``full``: embedding and head have a part for every block; else (recycled) one part that all blocks share.
    ``routed``: the coefficients of each token come from a router (Gemma 3n), which multiplies what it reads by
    ``router_scale``: 1/√embed_dim at the model's start (1/embed_dim in Gemma 3n), and kept when it is widened.
    """

    blocks: int
    full: bool = False
    order: StreamOrder = "gemma"
    routed: bool = False
    router_scale: float = 1.0

    @property
    def parts(self) -> int:
        """Of the embedding and of the head, embed_dim each."""
        return self.blocks if self.full else 1


@dataclass(frozen=True)
class LayerSpec:
    """One layer. ``origin``: the layer it was copied from, if it was inserted by growth. ``parallel``: attention and
    MLP read the same residual stream, x + attention(norm x) + mlp(norm′ x) (GPT-NeoX), not one after the other.
    ``ramped``: all it writes is under the mask. ``block``: of an AltUp stream, the one the layer works on.
    ``stride``: the layer runs on every so many tokens (Sequence-AltUp, section 4.2 of the paper). ``mlp``: None where
    the mixer is all there is, as in Mamba."""

    id: int
    mixer: Mixer
    mlp: DenseMLP | MoEMLP | PattentionMLP | None
    origin: int | None = None
    parallel: bool = False
    ramped: bool = False
    block: int = 0
    stride: int = 1


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding → layers (residual stream, or AltUp's) → final norm → head × ``logit_scale``.

    ``ramp``: 0..1, what everything under a mask is multiplied by (models/ramp.py). ``steady_dim``: how many dimensions
    of the residual stream, from the first, are not under the mask; None: all.
    """

    vocab_size: int
    embed_dim: int
    layers: tuple[LayerSpec, ...]
    norm: Norm = Norm()
    final_norm: Norm = Norm()
    tied_head: bool = True
    logit_scale: float = 1.0
    dropout: float = 0.0
    ramp: float = 1.0
    steady_dim: int | None = None
    stream: AltUp | None = None

    @property
    def parts(self) -> int:
        """Of embedding, final norm and head, of embed_dim each: one, but for a full AltUp stream."""
        return 1 if self.stream is None else self.stream.parts

    def layer(self, layer_id: int) -> LayerSpec:
        return next(layer for layer in self.layers if layer.id == layer_id)

    def num_params(self) -> int:
        """Parameters of the whole model, a tied head counted once."""
        from growkit.models.spec import param_specs

        return sum(spec.numel for spec in param_specs(self).values())

    def flops_per_token(self, context_length: int) -> float:
        """Training FLOPs (forward + backward) per token; see docs/flops.md, convention 1."""
        return 3 * self.forward_flops_per_token(context_length)

    def forward_flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs per token: 2 per weight of every matrix product (logits included, embedding look-up not; of
        the experts those that a token goes through), and 4·context·heads·head_dim per attention layer (all pairs, as
        PyTorch's counter has it). A layer of stride k costs 1/k of that, its pairs 1/k². AltUp's blocks: 2 per
        coefficient and embed_dim. Mamba: 7 (ops/flops.py, SCAN) per state and channel, 2 per tap."""
        from growkit.models.spec import param_specs

        strides = {layer.id: layer.stride for layer in self.layers}
        weights = 0.0
        for spec in param_specs(self).values():
            if spec.is_matmul:
                weights += spec.numel_per_token / (strides[spec.layer] if spec.layer is not None else 1)
        if self.tied_head:
            weights += self.vocab_size * self.parts * self.embed_dim
        attention = [(layer.mixer, layer.stride) for layer in self.layers if isinstance(layer.mixer, Attention)]
        pairs = sum(mixer.num_heads * mixer.head_dim / stride**2 for mixer, stride in attention)
        products = 2.0 * (weights + self.mixed_per_token()) + 4.0 * context_length * pairs
        return products + self.scan_flops_per_token()

    def scan_flops_per_token(self) -> float:
        """Forward FLOPs of Mamba's scans and convolutions, which are no matrix products."""
        mamba = [(layer.mixer, layer.stride) for layer in self.layers if isinstance(layer.mixer, Mamba)]
        return sum(m.inner * (flops.SCAN * m.state + 2 * m.conv) / stride for m, stride in mamba)

    def mixed_per_token(self) -> int:
        """Multiply-adds that a token's blocks take to be read, mixed and written: K² + 2K of embed_dim in each layer
        (the paper's order picks what it reads, a round robin mixes nothing; a router reads what the layer made as
        well), and K for every part they come from and go to."""
        if self.stream is None:
            return 0
        K = self.stream.blocks
        of_layer = {"paper": K * K + K, "round_robin": K}.get(self.stream.order, K * K + 2 * K)
        of_layer += K if self.stream.routed else 0
        return self.embed_dim * (len(self.layers) * of_layer + 2 * K * self.stream.parts)


FLOPS_CONVENTION = 1


def unmasked(config: ModelConfig, key: str = "grow") -> ModelConfig:
    """``config`` without masks, which compute nothing once their ramp is at 1. Raises ConfigError below that."""
    if config.ramp < 1:
        problem = f"is in the middle of its last growth, whose ramp is at {config.ramp:g}"
        mend = "train on until the ramp is at 1 (the stage's grow_time), or use a checkpoint from after that"
        raise ConfigError("still-ramping", problem, key=key, mend=mend)
    layers = tuple(_unmasked_layer(layer) for layer in config.layers)
    return dataclasses.replace(config, steady_dim=None, layers=layers)


def is_masked(config: ModelConfig) -> bool:
    """Whether anything is under a mask, wherever its ramp is."""
    return unmasked(dataclasses.replace(config, ramp=1.0)) != dataclasses.replace(config, ramp=1.0)


def _unmasked_layer(layer: LayerSpec) -> LayerSpec:
    mixer, mlp = with_projections(layer.mixer, _unmasked_tokens), layer.mlp
    if isinstance(mixer, Attention):
        mixer = dataclasses.replace(mixer, steady_heads=None)
    if isinstance(mlp, DenseMLP):
        mlp = dataclasses.replace(mlp, steady_dim=None)
    elif isinstance(mlp, PattentionMLP):
        mlp = PattentionMLP(_unmasked_tokens(mlp.projection))
    return dataclasses.replace(layer, mixer=mixer, mlp=mlp, ramped=False)


P = TypeVar("P", bound=Projection)
PROJECTIONS = {"attention": ("q", "k", "v", "o"), "mamba": ("in_proj", "x_proj", "dt_proj", "out_proj")}


def projections(mixer: Mixer) -> dict[str, Projection]:
    """The dense maps of a mixer by their names, which are those of its fields and of its parameters."""
    return {name: getattr(mixer, name) for name in PROJECTIONS[mixer.kind]}


def with_projections(mixer: Mixer, change: Callable[[Projection], Projection]) -> Mixer:
    """``mixer`` with each of its dense maps changed."""
    made: dict[str, Any] = {name: change(projection) for name, projection in projections(mixer).items()}
    return dataclasses.replace(mixer, **made)


def _unmasked_tokens(projection: P) -> P:
    if isinstance(projection, Pattention):
        return dataclasses.replace(projection, steady_banks=None, tau_from=None)
    return projection


def to_json(config: Any) -> Any:
    """A configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(data: Any, kind: Any = ModelConfig, *, key: str = "model") -> Any:
    """Rebuilds a configuration from ``to_json``; an unknown or missing field raises ConfigError naming it."""
    if get_origin(kind) is tuple:
        if not isinstance(data, list | tuple):
            raise ConfigError("bad-model", "must be a list", key=key, value=data)
        if Ellipsis not in get_args(kind) and len(data) != len(get_args(kind)):
            raise ConfigError("bad-model", f"must have {len(get_args(kind))} entries", key=key, value=data)
        return tuple(from_json(item, get_args(kind)[0], key=f"{key}.{i}") for i, item in enumerate(data))
    members = get_args(kind)
    if members and type(None) in members:
        if data is None:
            return None
        members = tuple(member for member in members if member is not type(None))
        if len(members) == 1:
            return from_json(data, members[0], key=key)
    if members and all(dataclasses.is_dataclass(member) for member in members):
        kind = _member(data, members, key)
    if not dataclasses.is_dataclass(kind):
        return _plain(data, kind, members, key)
    if not isinstance(data, dict):
        raise ConfigError("bad-model", "must be a mapping", key=key, value=data)
    hints = get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise ConfigError("bad-model", f"has no field {name!r}", key=key, mend=f"allowed: {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        if field.name not in data and field.default is dataclasses.MISSING:
            raise ConfigError("bad-model", f"lacks the field {field.name!r}", key=key)
    build: Any = kind
    return build(**{name: from_json(value, hints[name], key=f"{key}.{name}") for name, value in data.items()})


def _member(data: Any, members: tuple[Any, ...], key: str) -> Any:
    """The member of a union that ``data['kind']`` names."""
    tag = data.get("kind") if isinstance(data, dict) else None
    for member in members:
        if tag in get_args(get_type_hints(member)["kind"]):
            return member
    raise ConfigError("bad-model", "has no known kind", key=key, value=tag)


def _plain(data: Any, kind: Any, members: tuple[Any, ...], key: str) -> Any:
    if get_origin(kind) is Literal:
        ok = data in members
    elif kind is float or float in members:
        ok = isinstance(data, int | float) and not isinstance(data, bool)
    else:
        wanted = members or (kind,)
        ok = isinstance(data, wanted) and not (isinstance(data, bool) and bool not in wanted)
    if not ok:
        raise ConfigError("bad-model", "has the wrong type or value", key=key, value=data)
    return data
