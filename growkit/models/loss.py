"""Cross-entropy of next tokens, the (tokens × vocabulary) logits never held whole.

Legend: N tokens, D embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from growkit.ops.targets import UNSCORED


class TokenLoss(NamedTuple):
    """``total``: what is minimised. ``cross_entropy``: mean nats per token, without the z-loss and the balance loss."""

    total: Tensor
    cross_entropy: Tensor


class EachLoss(NamedTuple):
    """Of each target, (N,), 0 where it is UNSCORED. ``total``: what is minimised. ``cross_entropy``: nats, without the
    z-loss. ``balance``: of the mixtures of experts, over all tokens; None where there is none."""

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor | None = None


def each_cross_entropy(
    h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, logit_scale: float, z_loss: float, chunk_tokens: int
) -> EachLoss:
    """CE + z_loss · log² Z of each target, (N,); chunks as of ``chunked_cross_entropy``."""
    parts = _in_chunks(_each, h_ND, head_VD, targets_N, logit_scale, z_loss > 0, chunk_tokens)
    ce, z = (torch.cat(of) for of in zip(*parts, strict=True))
    return EachLoss(ce + z_loss * z if z_loss else ce, ce)


def chunked_cross_entropy(
    h_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    *,
    logit_scale: float,
    z_loss: float,
    chunk_tokens: int,
    unscored: bool = False,
) -> TokenLoss:
    """mean(CE) + z_loss · mean(log² Z) (PaLM, section 5), over all targets, or with ``unscored`` over those that are
    not UNSCORED. Chunks of ``chunk_tokens`` are recomputed in backward; 0 means one chunk, kept. Logits and sums in
    float32 at least."""
    # A share of a step without any: its sums are zero, and so is its mean.
    count = (targets_N != UNSCORED).sum().clamp(min=1) if unscored else targets_N.numel()
    parts = _in_chunks(_sums, h_ND, head_VD, targets_N, logit_scale, z_loss > 0, chunk_tokens)
    ce, z = (torch.stack(of).sum() for of in zip(*parts, strict=True))
    ce, z = ce / count, z / count
    return TokenLoss(ce + z_loss * z if z_loss else ce, ce)


def _sums(h: Tensor, head: Tensor, targets: Tensor, logit_scale: float, with_z: bool) -> tuple[Tensor, Tensor]:
    logits = _logits(h, head, logit_scale)
    ce = F.cross_entropy(logits, targets, ignore_index=UNSCORED, reduction="sum")
    if not with_z:
        return ce, ce.new_zeros(())
    return ce, logits.logsumexp(-1).square().mul(targets != UNSCORED).sum()


def _in_chunks(
    part: Callable[..., tuple[Tensor, Tensor]],
    h: Tensor,
    head: Tensor,
    targets: Tensor,
    logit_scale: float,
    with_z: bool,
    tokens: int,
) -> list[tuple[Tensor, Tensor]]:
    """``part`` of each chunk of ``tokens``, recomputed in backward; of all at once, and kept, for 0."""
    if tokens <= 0 or tokens >= targets.numel():
        return [part(h, head, targets, logit_scale, with_z)]
    return [
        checkpoint(part, some, head, of, logit_scale, with_z, use_reentrant=False)
        for some, of in zip(torch.split(h, tokens), torch.split(targets, tokens), strict=True)
    ]


def _each(h: Tensor, head: Tensor, targets: Tensor, logit_scale: float, with_z: bool) -> tuple[Tensor, Tensor]:
    logits = _logits(h, head, logit_scale)
    ce = F.cross_entropy(logits, targets, ignore_index=UNSCORED, reduction="none")
    return ce, logits.logsumexp(-1).square().mul(targets != UNSCORED) if with_z else torch.zeros_like(ce)


def _logits(h: Tensor, head: Tensor, logit_scale: float) -> Tensor:
    logits = F.linear(h, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if logit_scale == 1 else logits * logit_scale
