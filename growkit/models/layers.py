"""The parts of a layer: attention, feed-forward, and the layer itself.

Legend: B batch, T tokens, D embed, H query heads, G kv heads, d head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.errors import ConfigError
from growkit.models.config import (
    Attention,
    DenseMLP,
    LayerSpec,
    Mamba,
    Mixer,
    ModelConfig,
    MoEMLP,
    PattentionMLP,
)
from growkit.models.experts import MixtureFeedForward
from growkit.models.mamba import MambaMixer
from growkit.models.norm import Normalize
from growkit.models.projections import LinearProjection, PattentionProjection, project, projection
from growkit.models.ramp import head_mask, mask, stream_mask
from growkit.models.rope import inverse_frequencies
from growkit.models.stream import Blocks, RoutedBlocks, Strided
from growkit.models.visible import Visible, attention
from growkit.ops.elementwise import rotate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class LayerCache:
    """Keys and values of one layer for decoding, in buffers that double when full; of a Mamba mixer the last ``inputs``
    of its convolution (B, taps − 1, inner) and its ``state`` (B, inner, states), which do not grow.

    Of a layer with a stride also how many tokens it has ``seen``, and ``anchor``: of the last of them that it ran on,
    what it read and what it made of it, (B, 1, D) each."""

    def __init__(self) -> None:
        self.length = self.seen = 0
        self.anchor: tuple[Tensor, Tensor] | None = None
        self.inputs: Tensor | None = None
        self.state: Tensor | None = None
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

    def __init__(self, spec: Attention, embed_dim: int, backend: str, ramp: float) -> None:
        super().__init__()
        self.spec = spec
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q = projection(spec.q, embed_dim, heads, backend, ramp)
        self.k = projection(spec.k, embed_dim, kv, backend, ramp)
        self.v = projection(spec.v, embed_dim, kv, backend, ramp)
        self.o = projection(spec.o, heads, embed_dim, backend, ramp)
        self.head_mask = head_mask(spec, ramp)
        if spec.qk_norm is not None:
            self.q_norm = Normalize(spec.qk_norm, spec.head_dim)
            self.k_norm = Normalize(spec.qk_norm, spec.head_dim)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """``mask`` (B, 1, T, cached + T), bool, or blocks of it (models/visible.py): the keys that each query sees;
        None: all up to its own."""
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
        y = attention(q, k, v, mask, causal=causal)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o(y if self.head_mask is None else self.head_mask(y))


def rope_table(
    spec: Mixer, positions: Tensor, dtype: torch.dtype, *, length: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """cos and sin (1 or B, T, 1, rotated/2) of position · base^(−2i/rotated), or as ``spec.rope_scaling`` has it,
    positions (T,) or (B, T); angles in float32 at least. ``length``: of the whole sequence, cached positions included;
    None: up to the last of ``positions``, which have to be read for it where the angles are scaled. Mamba has none."""
    if isinstance(spec, Mamba):
        return None
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
    def __init__(self, spec: DenseMLP, embed_dim: int, ramp: float) -> None:
        super().__init__()
        self.kind, steady = spec.kind, spec.steady_dim
        self.unit_mask = mask([i < steady for i in range(spec.dim)], ramp) if steady is not None else None
        if spec.kind == "swiglu":
            self.gate_up = LinearProjection(embed_dim, 2 * spec.dim, spec.bias)
        else:
            self.up = LinearProjection(embed_dim, spec.dim, spec.bias)
        self.down = LinearProjection(spec.dim, embed_dim, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.down(h if self.unit_mask is None else self.unit_mask(h))


class TokenFeedForward(nn.Module):
    def __init__(self, spec: PattentionMLP, embed_dim: int, backend: str, ramp: float) -> None:
        super().__init__()
        self.tokens = PattentionProjection(spec.projection, embed_dim, embed_dim, backend, ramp)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x)


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), or both from one x: pre-norm residual block, on the residual stream or
    on what models/stream.py has it read.

    Returns the stream and, of a mixture of experts in training, its balance loss: returned, and not left on
    the module, so that a layer that is computed again in backward does not count it twice.
    """

    def __init__(self, spec: LayerSpec, config: ModelConfig, backend: str) -> None:
        super().__init__()
        if isinstance(spec.mixer, Mamba):
            self.mamba_norm = Normalize(config.norm, config.embed_dim)
            self.mamba = MambaMixer(spec.mixer, config.embed_dim, backend, config.ramp)
        else:
            self.attention_norm = Normalize(config.norm, config.embed_dim)
            self.attention = CausalAttention(spec.mixer, config.embed_dim, backend, config.ramp)
        self.kind = spec.mixer.kind
        self.mlp: nn.Module | None = None
        if spec.mlp is not None:
            self.mlp_norm = Normalize(config.norm, config.embed_dim)
        if isinstance(spec.mlp, DenseMLP):
            self.mlp = DenseFeedForward(spec.mlp, config.embed_dim, config.ramp)
        elif isinstance(spec.mlp, MoEMLP):
            self.mlp = MixtureFeedForward(spec.mlp, config.embed_dim)
        elif spec.mlp is not None:
            self.mlp = TokenFeedForward(spec.mlp, config.embed_dim, backend, config.ramp)
        self.write_mask = stream_mask(config, ramped=spec.ramped)
        self.dropout, self.parallel = config.dropout, spec.parallel
        self.stream: Blocks | RoutedBlocks | Strided | None = None
        if spec.stride > 1:
            self.stream = Strided(spec)
        elif config.stream is not None:
            routed = config.stream.routed
            self.stream = RoutedBlocks(spec, config.stream, config) if routed else Blocks(spec, config.stream)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
        mask: Visible | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), with an AltUp stream (K, B, T, D). ``rope``: as of ``rope_table``."""
        if self.stream is None:
            return self._block(x, rope, cache, mask)
        if not isinstance(self.stream, Strided):
            return self.stream(x, lambda z: self._block(z, rope, cache, mask))
        at = self.stream.runs_on(cache)
        turned = None if rope is None else (rope[0][:, at], rope[1][:, at])
        if mask is not None:
            problem, mend = "hides tokens that layers of a stride carry on", "pass whole rows, without padding"
            raise ConfigError("streams-exclude", problem, key="attention_mask", mend=mend)
        return self.stream(x, lambda z: self._block(z, turned, cache, None), cache)

    def _block(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None, mask: Visible | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.kind == "mamba":
            segments, real = (mask.segments, mask.real) if mask is not None else (None, None)
            made = self.mamba(self.mamba_norm(x), cache, segments, real)
        else:
            assert rope is not None
            made = self.attention(self.attention_norm(x), rope, cache, mask.mask if mask is not None else None)
        mixed = x + self._written(made)
        if self.mlp is None:
            return mixed, None
        y, balance = self.mlp(self.mlp_norm(x if self.parallel else mixed)), None
        if isinstance(self.mlp, MixtureFeedForward):
            y, balance = y
        return mixed + self._written(y), balance

    def _written(self, y: Tensor) -> Tensor:
        y = y if self.write_mask is None else self.write_mask(y)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y
