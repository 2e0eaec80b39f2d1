"""The parts of a layer: projections, attention, feed-forward.

Legend: B batch, T tokens, D embed, H query heads, G kv heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.models.config import (
    Attention,
    DenseMLP,
    LayerSpec,
    ModelConfig,
    MoEMLP,
    Pattention,
    PattentionMLP,
    Projection,
)
from growkit.models.experts import MixtureFeedForward
from growkit.models.norm import Normalize
from growkit.models.rope import inverse_frequencies
from growkit.ops.elementwise import rotate
from growkit.ops.pattention import Tokens, pattention


class LinearProjection(nn.Module):
    def __init__(self, inp: int, out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inp))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PattentionProjection(nn.Module):
    """Banks of parameter tokens, each its own pair of parameters: ``keys.g`` (n_g, in), ``values.g`` (n_g, out)."""

    def __init__(self, spec: Pattention, inp: int, out: int, backend: str) -> None:
        super().__init__()
        self.spec, self.op = spec, pattention(backend)
        self.keys = nn.ParameterList(nn.Parameter(torch.empty(n, inp)) for n in spec.banks)
        self.values = nn.ParameterList(nn.Parameter(torch.empty(n, out)) for n in spec.banks)

    def tokens(self) -> Tokens:
        spec = self.spec
        return Tokens(list(self.keys), list(self.values), list(spec.taus), spec.theta, spec.scope)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, [self.tokens()])[0]


def projection(spec: Projection, inp: int, out: int, backend: str) -> nn.Module:
    if isinstance(spec, Pattention):
        return PattentionProjection(spec, inp, out, backend)
    return LinearProjection(inp, out, spec.bias)


def project(projections: list[nn.Module], x: Tensor) -> list[Tensor]:
    """Each projection of one x; those made of parameter tokens go through their op together."""
    pattentions = [p for p in projections if isinstance(p, PattentionProjection)]
    together = iter(pattentions[0].op(x, [p.tokens() for p in pattentions]) if pattentions else [])
    return [next(together) if isinstance(p, PattentionProjection) else p(x) for p in projections]


class LayerCache:
    """Keys and values of one layer for decoding, in buffers that double when full."""

    def __init__(self) -> None:
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k_BGTd: Tensor, v_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T positions; returns all keys and values so far (B, G, length, d)."""
        new = self.length + k_BGTd.shape[2]
        if self._k is None or self._v is None or new > self._k.shape[2]:
            room = (*k_BGTd.shape[:2], max(64, 2 * new), k_BGTd.shape[3])
            k, v = k_BGTd.new_empty(room), v_BGTd.new_empty(room)
            if self._k is not None and self._v is not None:
                k[:, :, : self.length] = self._k[:, :, : self.length]
                v[:, :, : self.length] = self._v[:, :, : self.length]
            self._k, self._v = k, v
        self._k[:, :, self.length : new] = k_BGTd
        self._v[:, :, self.length : new] = v_BGTd
        self.length = new
        return self._k[:, :, :new], self._v[:, :, :new]


class CausalAttention(nn.Module):
    """softmax(q kᵀ / √d) v with rotary positions (RoFormer, arXiv 2104.09864; half-split pairs as in GPT-NeoX)."""

    def __init__(self, spec: Attention, embed_dim: int, backend: str) -> None:
        super().__init__()
        self.spec = spec
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q = projection(spec.q, embed_dim, heads, backend)
        self.k = projection(spec.k, embed_dim, kv, backend)
        self.v = projection(spec.v, embed_dim, kv, backend)
        self.o = projection(spec.o, heads, embed_dim, backend)
        if spec.qk_norm is not None:
            self.q_norm = Normalize(spec.qk_norm, spec.head_dim)
            self.k_norm = Normalize(spec.qk_norm, spec.head_dim)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``mask`` (B, 1, T, cached + T), bool: the keys that each query sees; None: all up to its own."""
        spec = self.spec
        B, T, _ = x_BTD.shape
        q, k, v = project([self.q, self.k, self.v], x_BTD)
        q = q.view(B, T, spec.num_heads, spec.head_dim)
        k = k.view(B, T, spec.num_kv_heads, spec.head_dim)
        v = v.view(B, T, spec.num_kv_heads, spec.head_dim).transpose(1, 2)
        if spec.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope).transpose(1, 2), rotate(k, *rope).transpose(1, 2)
        causal = mask is None
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
            if past and causal:
                causal = False
                ones = torch.ones(T, past + T, dtype=torch.bool, device=q.device)
                mask = ones.tril(past) if T > 1 else None
        groups = spec.num_heads != spec.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


def rope_table(
    spec: Attention, positions: Tensor, dtype: torch.dtype, *, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (1 or B, T, 1, rotated/2) of position · base^(−2i/rotated), or as ``spec.rope_scaling`` has it,
    positions (T,) or (B, T); angles in float32 at least. ``length``: of the whole sequence, cached positions included;
    None: up to the last of ``positions``, which have to be read for it where the angles are scaled."""
    base, rotated, scaling = spec.rope
    wide = torch.promote_types(dtype, torch.float32)
    if scaling is None:
        exponent = torch.arange(0, rotated, 2, device=positions.device, dtype=wide) / max(rotated, 1)
        frequencies = base**-exponent
    else:
        length = int(positions.max()) + 1 if length is None else length
        turns = inverse_frequencies(scaling, base, rotated, length)
        frequencies = torch.tensor(turns, device=positions.device, dtype=wide)
    positions = positions if positions.ndim == 2 else positions[None]
    angles = (positions.to(wide)[..., None] * frequencies)[:, :, None, :]
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos.to(dtype), sin.to(dtype)


class DenseFeedForward(nn.Module):
    def __init__(self, spec: DenseMLP, embed_dim: int) -> None:
        super().__init__()
        self.kind = spec.kind
        if spec.kind == "swiglu":
            self.gate_up = LinearProjection(embed_dim, 2 * spec.dim, spec.bias)
        else:
            self.up = LinearProjection(embed_dim, spec.dim, spec.bias)
        self.down = LinearProjection(spec.dim, embed_dim, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class TokenFeedForward(nn.Module):
    def __init__(self, spec: PattentionMLP, embed_dim: int, backend: str) -> None:
        super().__init__()
        self.tokens = PattentionProjection(spec.projection, embed_dim, embed_dim, backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x)


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), or both from one x: pre-norm residual block.

    Returns the residual stream and, of a mixture of experts in training, its balance loss: returned, and not left on
    the module, so that a layer that is computed again in backward does not count it twice.
    """

    def __init__(self, spec: LayerSpec, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.attention_norm = Normalize(config.norm, config.embed_dim)
        self.attention = CausalAttention(spec.mixer, config.embed_dim, backend)
        self.mlp_norm = Normalize(config.norm, config.embed_dim)
        if isinstance(spec.mlp, DenseMLP):
            self.mlp: nn.Module = DenseFeedForward(spec.mlp, config.embed_dim)
        elif isinstance(spec.mlp, MoEMLP):
            self.mlp = MixtureFeedForward(spec.mlp, config.embed_dim)
        else:
            self.mlp = TokenFeedForward(spec.mlp, config.embed_dim, backend)
        self.dropout, self.parallel = config.dropout, spec.parallel

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        mixed = x + self._drop(self.attention(self.attention_norm(x), rope, cache, mask))
        y, balance = self.mlp(self.mlp_norm(x if self.parallel else mixed)), None
        if isinstance(self.mlp, MixtureFeedForward):
            y, balance = y
        return mixed + self._drop(y), balance

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
