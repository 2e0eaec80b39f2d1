"""AltUp's streams: a token is K blocks between the layers, or a layer runs on every k-th token
(Alternating Updates, arXiv 2301.13310; hyper-connections, arXiv 2409.19606).

One form carries all variants. With R the blocks of a token (K × D), L a layer and y = L(z) what it makes of z:

    R = E e    z = aᵀR    R′ = N R + b yᵀ    logits = W norm(C R)

e are the embedding's parts (one, or one for each block), E is ``enter`` and C ``leave``. N and a follow from a layer's
parameters ``mix`` (P or M), ``write`` (g or b) and ``read`` (a), as the ``order`` has it; j is the layer's block:

| order | a | N | b | |
|---|---|---|---|---|
| paper | e_j | P − g P_j | g | AltUp, algorithm 1: x̂ = P R, R′ = x̂ + g (L(x_j) − x̂_j) |
| gemma | P_j | P − g P_j | g | Gemma 3n: the layer computes on the predicted block, x̂_j |
| free | a | M − b aᵀ | b | hyper-connections: R′ = M R + b (L(z) − z)ᵀ |
| round_robin | a | I − e_j aᵀ | e_j | each layer adds what it changed to its own block |

Writing y itself, not x̂ + g (y − x̂_j), is the same function, and to the bit the residual stream's where g_j = 1: then
row j of N is zero.

Legend: K blocks, P parts, B batch, T tokens, D embed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from growkit.models.config import AltUp, LayerSpec, ModelConfig
from growkit.models.norm import Normalize
from growkit.ops.blocks import add_to_block, pick_block, read_blocks, write_blocks

if TYPE_CHECKING:
    from growkit.models.layers import LayerCache

# z → what the layer makes of it, and the balance loss of its experts if it has any
Compute = Callable[[Tensor], tuple[Tensor, Tensor | None]]
ROUTED_CLIP = 120.0  # Gemma 3n's, of the routed coefficients' weights in training
Coefficients = tuple[Tensor, Tensor, Tensor]  # (a, N, b) of the table above


class Ends(nn.Module):
    """Where blocks come from and go to: ``enter`` (K, P) of the embedding's parts, ``leave`` (P, K)."""

    def __init__(self, stream: AltUp) -> None:
        super().__init__()
        self.parts = stream.parts
        self.enter = nn.Parameter(torch.empty(stream.blocks, stream.parts))
        self.leave = nn.Parameter(torch.empty(stream.parts, stream.blocks))

    def entered(self, x: Tensor) -> Tensor:
        """(B, T, P · D) → (K, B, T, D)."""
        parts = x.view(*x.shape[:-1], self.parts, -1).movedim(-2, 0)
        return _product(self.enter, parts)

    def left(self, R_KBTD: Tensor) -> Tensor:
        """(K, B, T, D) → (B, T, P · D)."""
        return _product(self.leave, R_KBTD).movedim(0, -2).flatten(-2)


def _product(weights: Tensor, blocks: Tensor) -> Tensor:
    with torch.autocast(blocks.device.type, enabled=False):
        return torch.mm(weights.to(blocks.dtype), blocks.flatten(1)).view(-1, *blocks.shape[1:])


class Blocks(nn.Module):
    """A layer between its blocks, with coefficients that all tokens share."""

    def __init__(self, spec: LayerSpec, stream: AltUp) -> None:
        super().__init__()
        K = stream.blocks
        self.order, self.block = stream.order, spec.block
        if self.order in ("free", "round_robin"):
            self.read = nn.Parameter(torch.empty(K))
        if self.order != "round_robin":
            self.mix = nn.Parameter(torch.empty(K, K))
            self.write = nn.Parameter(torch.empty(K))

    def coefficients(self) -> Coefficients:
        """(K,), (K, K), (K,)."""
        if self.order == "round_robin":
            own = _unit(self.read, self.block)
            return self.read, torch.ones_like(own).diag() - torch.outer(own, self.read), own
        row = self.read if self.order == "free" else self.mix[self.block]
        a = _unit(row, self.block) if self.order == "paper" else row
        return a, self.mix - torch.outer(self.write, row), self.write

    def forward(self, R_KBTD: Tensor, compute: Compute) -> tuple[Tensor, Tensor | None]:
        if self.order == "round_robin":
            z, R_KBTD = read_blocks(self.read, R_KBTD)
            y, balance = compute(z)
            return add_to_block(self.block, R_KBTD, y - z), balance
        a, N, b = self.coefficients()
        z, R_KBTD = pick_block(self.block, R_KBTD) if self.order == "paper" else read_blocks(a, R_KBTD)
        y, balance = compute(z)
        return write_blocks(N, b, R_KBTD, y), balance


class RoutedBlocks(nn.Module):
    """A layer between its blocks, with coefficients of each token's own (Gemma 3n): with m(x) = tanh(W norm(x) ·
    ``router_scale``), (K,), P = I + ``mix`` m(x_j) and g = 1 + ``write`` m(y), weights clipped in training."""

    def __init__(self, spec: LayerSpec, stream: AltUp, config: ModelConfig) -> None:
        super().__init__()
        K = stream.blocks
        self.order, self.block, self.scale = stream.order, spec.block, stream.router_scale
        self.router_norm = Normalize(config.norm, config.embed_dim)
        self.router = nn.Parameter(torch.empty(K, config.embed_dim))
        self.mix = nn.Parameter(torch.empty(K * K, K))
        self.write = nn.Parameter(torch.empty(K, K))

    def _routed(self, x: Tensor, weight: Tensor) -> Tensor:
        """``weight`` m(x), in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            normed = self.router_norm(x).to(wide) * self.scale
            routes = torch.tanh(normed @ self.router.to(wide).T)
            return routes @ weight.to(wide).T

    def predicting(self, x_BTD: Tensor) -> Tensor:
        """P (B, T, K, K) of the layer's block."""
        K, weight = len(self.write), self.mix.clamp(-ROUTED_CLIP, ROUTED_CLIP) if self.training else self.mix
        if self.training:  # Gemma 3n overwrites these weights with the clipped ones, whose gradient is not cut off
            weight = weight.detach() + (self.mix - self.mix.detach())
        P = self._routed(x_BTD, weight).view(*x_BTD.shape[:-1], K, K)
        return P + torch.eye(K, dtype=P.dtype, device=P.device)

    def coefficients(self, P_BTKK: Tensor, y_BTD: Tensor) -> Coefficients:
        """(B, T, K), (B, T, K, K), (B, T, K) of what the layer made of z. The paper's a, which all tokens share, is
        (K,)."""
        write = self.write.clamp(-ROUTED_CLIP, ROUTED_CLIP) if self.training else self.write
        row, g = P_BTKK[..., self.block, :], 1 + self._routed(y_BTD, write)
        a = _unit(row[0, 0], self.block) if self.order == "paper" else row
        return a, P_BTKK - g[..., :, None] * row[..., None, :], g

    def forward(self, R_KBTD: Tensor, compute: Compute) -> tuple[Tensor, Tensor | None]:
        active, R_KBTD = pick_block(self.block, R_KBTD)
        P = self.predicting(active)
        z, R_KBTD = (active, R_KBTD) if self.order == "paper" else read_blocks(P[..., self.block, :], R_KBTD)
        y, balance = compute(z)
        _, N, b = self.coefficients(P, y)
        return write_blocks(N, b, R_KBTD, y), balance


def _unit(like: Tensor, index: int) -> Tensor:
    """(K,), one at ``index``."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device)[index]


class Strided(nn.Module):
    """A layer that runs on every k-th token, the others get what it changed there (Sequence-AltUp, equation 1): with
    ŷ_i = a₁ x_i + a₂ x_⌊i/k⌋k, y_i = ŷ_i + b (L(x)_⌊i/k⌋k − ŷ_⌊i/k⌋k). Causal: ⌊i/k⌋k is never after i.

    ``mix`` (2,): a₁ and a₂; ``write`` (1,): b.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.stride = spec.stride
        self.mix = nn.Parameter(torch.empty(2))
        self.write = nn.Parameter(torch.empty(1))

    def forward(self, x_BTD: Tensor, compute: Compute, cache: LayerCache | None = None) -> tuple[Tensor, Tensor | None]:
        """With ``cache`` the tokens continue those before, whose last one at a multiple of the stride it holds."""
        k, past, T = self.stride, cache.seen if cache is not None else 0, x_BTD.shape[1]
        at = self.runs_on(cache)
        anchors, balance = x_BTD[:, at], None
        made = anchors
        if anchors.shape[1]:
            made, balance = compute(anchors)
        if cache is not None:
            if cache.anchor is not None and at.start:
                anchors, made = (torch.cat(pair, 1) for pair in zip(cache.anchor, (anchors, made), strict=True))
            cache.anchor, cache.seen = (anchors[:, -1:], made[:, -1:]), past + T
        a1, a2 = self.mix.to(x_BTD.dtype)
        change = a2 * anchors + self.write.to(x_BTD.dtype) * (made - (a1 + a2) * anchors)
        place = torch.arange(past, past + T, device=x_BTD.device) // k - past // k
        return a1 * x_BTD + change[:, place], balance

    def runs_on(self, cache: LayerCache | None) -> slice:
        """Which of the tokens after ``cache`` the layer computes on."""
        return slice(-(cache.seen if cache is not None else 0) % self.stride, None, self.stride)
