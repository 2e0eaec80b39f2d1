"""Sampling from a model, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from growkit.data.tokenizer import END, Tokenizer
from growkit.models.decoder import Cache, DecoderLM


@torch.inference_mode()
def sample_tokens(
    model: DecoderLM,
    prompt: Tensor,
    count: int,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int = 50,
    end: int = END[0],
) -> Iterator[int]:
    """Up to ``count`` tokens after ``prompt`` (1-D, at least one token), one at a time; ends at a document's ``end``.

    ``temperature`` 0 takes the most likely token; ``top_k`` 0 keeps all.
    """
    cache = Cache(model.config)
    tokens = prompt[None]
    for _ in range(count):
        logits = model(tokens, cache=cache)[0, -1]
        assert isinstance(logits, Tensor)
        token = _draw(logits.float(), generator, temperature, top_k)
        if token == end:
            return
        yield token
        tokens = torch.tensor([[token]], device=prompt.device)


def _draw(logits: Tensor, generator: torch.Generator, temperature: float, top_k: int) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return int(torch.multinomial(torch.softmax(logits / temperature, -1).cpu(), 1, generator=generator))


def sample_text(
    model: DecoderLM,
    prompt: str,
    count: int,
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 50,
) -> str:
    """``prompt`` and what the model writes after it, as text; the model's training mode is left as it was.
    ``tokenizer``: what the model's ids are of (default: bytes)."""
    tokenizer = tokenizer or Tokenizer()
    start = torch.tensor(tokenizer.prompt(prompt), device=model.embedding.weight.device)
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    try:
        new = list(
            sample_tokens(
                model, start, count, generator=generator, temperature=temperature, top_k=top_k, end=tokenizer.end
            )
        )
    finally:
        model.train(training)
    return tokenizer.decode(tokenizer.encode(prompt) + new)
