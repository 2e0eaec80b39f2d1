"""Loss of a model on held-out text."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from growkit import faults
from growkit.data.stream import validation_windows, windows
from growkit.data.tokenizer import Ends

ROWS = 32  # windows per forward pass


def unscored(context_length: int) -> int:
    """How many first targets of a window are only context to the others: an eighth. A window starts in the middle of
    a text, so they measure the cut, not the model; an n-gram model on the same targets has its whole context too."""
    return context_length // 8


def position_losses(
    model: nn.Module,
    tokens: NDArray[np.integer],
    context_length: int,
    wanted_tokens: int,
    *,
    autocast: AbstractContextManager[object] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, int]:
    """(sum of nats at each position of a window, float64 (context_length,); number of windows), of this process's
    share; the caller adds up processes. Every window starts afresh; there are as many as score ``wanted_tokens`` when
    the first eighth of each is left out (``unscored``)."""
    starts, _ = validation_windows(tokens, context_length, wanted_tokens, unscored(context_length))
    mine = starts[rank::world_size]
    count = len(mine)
    if -(-len(starts) // world_size) > count:  # sharded models must run the same number of passes everywhere
        mine = np.append(mine, starts[0])
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros(context_length, dtype=torch.float64)
    with torch.no_grad(), autocast or nullcontext():
        for index in range(0, len(mine), ROWS):
            x, y = windows(tokens, mine[index : index + ROWS], context_length)
            logits = model(x.to(device))
            losses = F.cross_entropy(logits.flatten(0, 1).float(), y.to(device).flatten(), reduction="none")
            sums += losses.view(y.shape)[: count - index].double().sum(0).cpu()
            if index == 0:
                faults.point("mid_validation")
    model.train(training)
    return sums, count


def mean_loss(
    model: nn.Module, tokens: NDArray[np.integer], context_length: int, wanted_tokens: int, **options: Any
) -> tuple[float, int]:
    """(sum of nats, tokens) over the scored positions of this process's windows; ``options`` as of
    ``position_losses``."""
    skip = unscored(context_length)
    sums, count = position_losses(model, tokens, context_length, wanted_tokens, **options)
    return float(sums[skip:].sum()), count * (context_length - skip)


def target_positions(tokens: NDArray[np.integer], context_length: int, wanted_tokens: int) -> NDArray[np.int64]:
    """The positions that ``mean_loss`` scores, for another model to be scored on."""
    skip = unscored(context_length)
    starts, _ = validation_windows(tokens, context_length, wanted_tokens, skip)
    return (starts[:, None] + np.arange(skip, context_length) + 1).ravel()


def target_sizes(ends: Ends | None, targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of the text that each of the tokens at ``targets`` (from 1 on) stands for; ``ends`` as of a Corpus."""
    return np.ones_like(targets) if ends is None else ends[targets] - ends[targets - 1]


def target_bytes(ends: Ends | None, targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions in the text of the bytes that the tokens at ``targets`` stand for."""
    if ends is None:
        return targets
    sizes = target_sizes(ends, targets)
    inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(ends[targets - 1], sizes) + inside
