"""Mixture of experts: a token goes through the best few of several feed-forward blocks.

Legend: N tokens, D embed, F hidden units of an expert, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.models.config import MoEMLP
from growkit.models.unset import Linear


class _Rows(torch.autograd.Function):
    """Rows of x in another order, each ``times`` over. Backward is a gather as well: the additions of an indexed
    backward pass would come in any order on several threads, and a resumed run would not be bitwise the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, times: int) -> Tensor:
        """``order``: which of the x.shape[0] · times rows each row of the output is; ``place``: its inverse."""
        ctx.save_for_backward(place)
        ctx.times = times
        return x.index_select(0, order if times == 1 else order // times)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        rows = gradient.index_select(0, place)
        return rows if ctx.times == 1 else rows.view(-1, ctx.times, rows.shape[1]).sum(1), None, None, None


def _rows(x: Tensor, order: Tensor, place: Tensor, times: int = 1) -> Tensor:
    rows: Tensor = _Rows.apply(x, order, place, times)  # type: ignore[no-untyped-call]
    return rows


class ExpertWeights(nn.Module):
    """A weight (out, in) for each expert."""

    def __init__(self, experts: int, inp: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out, inp))


class MixtureFeedForward(nn.Module):
    """Σ over the k best experts of g_i · f_i(x), g the softmax of their router logits (Mixtral, arXiv 2401.04088,
    section 2.1: the gates add up to 1). No expert has a capacity, so no token is dropped.

    The router computes in float32 at least: rounding there changes who is chosen, not by how much.
    """

    def __init__(self, spec: MoEMLP, embed_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.router = Linear(embed_dim, spec.num_experts, bias=False)
        if spec.gated:
            self.gate_up = ExpertWeights(spec.num_experts, embed_dim, 2 * spec.dim)
        else:
            self.up = ExpertWeights(spec.num_experts, embed_dim, spec.dim)
        self.down = ExpertWeights(spec.num_experts, spec.dim, embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (…, D) → (…, D), and in training the weighted balance loss."""
        k, experts = self.spec.experts_per_token, self.spec.num_experts
        x_ND = x.flatten(0, -2)
        logits_NE = self._logits(x_ND)
        gates_Nk, chosen_Nk = self._gates(logits_NE)
        slots = chosen_Nk.flatten()
        order = slots.argsort(stable=True)
        place = order.argsort()
        counts_E = slots.new_zeros(experts).scatter_add_(0, slots, torch.ones_like(slots))
        y = _rows(self._experts(_rows(x_ND, order, place, k), counts_E.tolist()), place, order)
        y = (y.view(-1, k, x.shape[-1]) * gates_Nk[:, :, None].to(y.dtype)).sum(1).view(x.shape)
        if not (self.training and self.spec.balance_loss):
            return y, None
        return y, self.spec.balance_loss * balance_loss(logits_NE, counts_E)

    def _logits(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.router.weight.to(wide))

    def _gates(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token's k best experts: the gates, and which they are."""
        top_Nk, chosen_Nk = logits_NE.topk(self.spec.experts_per_token)
        return top_Nk.softmax(-1), chosen_Nk

    def _experts(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows that lie expert by expert, ``counts`` of them each, through their experts."""
        read = self.gate_up if self.spec.gated else self.up
        inputs = torch.split(rows, counts)
        parts = []
        # unbind, not indexing: its backward writes one gradient (E, out, in), indexing one for every expert.
        for x, inward, outward in zip(inputs, read.weight.unbind(), self.down.weight.unbind(), strict=True):
            h = F.linear(x, inward)
            if self.spec.gated:
                gate, up = h.chunk(2, dim=-1)
                h = F.silu(gate) * up
            else:
                h = F.gelu(h)
            parts.append(F.linear(h, outward))
        return torch.cat(parts)


def balance_loss(logits_NE: Tensor, counts_E: Tensor) -> Tensor:
    """E · Σ_i f_i P_i (Switch Transformer, arXiv 2101.03961, eq. 4–6): f_i the share of the choices that fell on expert
    i, which has no gradient, P_i its mean probability under the softmax over all experts. 1 where both are uniform.

    With k choices a token, f counts all of them as shares of N·k, so that it adds up to 1 whatever k is; Hugging Face's
    Mixtral counts shares of N, which is k times as much.
    """
    share_E = counts_E.to(logits_NE.dtype) / counts_E.sum()
    return len(counts_E) * (share_E * logits_NE.softmax(-1).mean(0)).sum()
