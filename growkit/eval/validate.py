"""Loss of a model on held-out text."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from growkit import faults
from growkit.data.stream import validation_windows, windows
from growkit.models.loss import IGNORED

ROWS = 32  # windows per forward pass


def unscored(context_length: int) -> int:
    """How many first targets of a window are only context to the others: an eighth. A window starts in the middle of
    a text, so they measure the cut, not the model; an n-gram model on the same targets has its whole context too."""
    return context_length // 8


def mean_loss(
    model: nn.Module,
    tokens: NDArray[np.integer],
    context_length: int,
    wanted_tokens: int,
    *,
    autocast: AbstractContextManager[object] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[float, int]:
    """(sum of nats, tokens) over this process's share of the windows; the caller adds up processes.

    A window starts afresh; its first eighth is context and not scored (``unscored``).
    """
    skip = unscored(context_length)
    starts, _ = validation_windows(tokens, context_length, wanted_tokens, skip)
    mine = starts[rank::world_size]
    idle = -(-len(starts) // world_size) > len(mine)
    if idle:  # sharded models must run the same number of passes everywhere: one window more, which does not count
        mine = np.append(mine, starts[0])
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), autocast or nullcontext():
        for index in range(0, len(mine), ROWS):
            x, y = windows(tokens, mine[index : index + ROWS], context_length)
            y[:, :skip] = IGNORED
            if idle and index + ROWS >= len(mine):
                y[-1] = IGNORED
            loss = model(x.to(device), y.to(device)).cross_entropy
            total += loss.double().cpu() * y.numel()
            if index == 0:
                faults.point("mid_validation")
    model.train(training)
    return float(total), (len(mine) - idle) * (context_length - skip)


def target_positions(tokens: NDArray[np.integer], context_length: int, wanted_tokens: int) -> NDArray[np.int64]:
    """The positions that ``mean_loss`` scores, for another model to be scored on."""
    skip = unscored(context_length)
    starts, _ = validation_windows(tokens, context_length, wanted_tokens, skip)
    return (starts[:, None] + np.arange(skip, context_length) + 1).ravel()
