"""What a trained model is worth and costs to use: loss by position, reading and writing speed, memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from growkit.data.stream import validation_windows
from growkit.data.tokenizer import Ends
from growkit.eval.validate import position_losses, target_sizes, unscored
from growkit.models.config import Attention, ModelConfig
from growkit.models.decoder import Cache, DecoderLM

WARM_UP = 3  # passes and tokens before the clock starts


@dataclass(frozen=True)
class Score:
    """``loss``: nats per token over the scored positions, as a run's validation has it. ``by_position``: mean nats at
    each position of a window, the unscored first eighth included. ``tokens``: scored. ``bytes_per_token``: of the text
    behind the scored ones; ``bytes_by_position``: their mean at each position."""

    loss: float
    by_position: tuple[float, ...]
    tokens: int
    bytes_per_token: float = 1.0
    bytes_by_position: tuple[float, ...] = ()

    def buckets(self, values: Sequence[float] | None = None) -> list[tuple[int, int, float]]:
        """(first position, last position, mean of ``values``, which are the nats if not given) in doubling ranges: 0,
        1, 2–3, 4–7, …"""
        rows, first, size = [], 0, 1
        values = self.by_position if values is None else values
        while first < len(values):
            part = values[first : first + size]
            rows.append((first, first + len(part) - 1, sum(part) / len(part)))
            first, size = first + len(part), max(1, first + len(part))
        return rows


def score(
    model: DecoderLM,
    tokens: NDArray[np.integer],
    context_length: int,
    wanted_tokens: int,
    ends: Ends | None = None,
) -> Score:
    """The model's loss on windows spread evenly over ``tokens``; ``ends``: where each ends in the text, as a Corpus has
    it."""
    sums, count = position_losses(model, tokens, context_length, wanted_tokens)
    skip = unscored(context_length)
    scored = count * (context_length - skip)
    starts, _ = validation_windows(tokens, context_length, wanted_tokens, skip)
    sizes = target_sizes(ends, starts[:, None] + np.arange(context_length) + 1)
    return Score(
        float(sums[skip:].sum()) / scored,
        tuple((sums / count).tolist()),
        scored,
        float(sizes[:, skip:].mean()),
        tuple(sizes.mean(0).tolist()),
    )


@dataclass(frozen=True)
class Speed:
    """Tokens a second, one sequence at a time. ``read``: a window in one forward pass. ``write``: token after token,
    always the likeliest, with the cache, until it holds ``written``."""

    read: float
    write: float
    written: int


@torch.inference_mode()
def speed(model: DecoderLM, context_length: int, count: int) -> Speed:
    """Times a window's forward pass (the best of three) and the writing of ``count`` tokens."""
    device = model.embedding.weight.device
    window = torch.zeros(1, context_length, dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    passes = []
    for _ in range(WARM_UP + 3):
        began = _now(device)
        model(window)
        passes.append(_now(device) - began)
    cache, token = Cache(model.config), window[:, :1]
    for index in range(WARM_UP + count):
        if index == WARM_UP:
            began = _now(device)
        token = model(token, cache=cache)[0, -1].argmax().view(1, 1)
    spent = _now(device) - began
    model.train(training)
    return Speed(context_length / min(passes[WARM_UP:]), count / spent, WARM_UP + count)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cache_bytes_per_token(config: ModelConfig, element_size: int = 4) -> float:
    """Keys and values that one token of one sequence keeps, on average: a layer with a stride has them of every
    so many tokens. AltUp's blocks keep none of their own; Mamba's state is of the sequence, whatever its length."""
    attention = ((layer.mixer, layer.stride) for layer in config.layers if isinstance(layer.mixer, Attention))
    return sum(2 * mixer.num_kv_heads * mixer.head_dim / stride for mixer, stride in attention) * element_size
