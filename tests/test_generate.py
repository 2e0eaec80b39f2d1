"""Sampling: what the cache gives is what the whole forward gives, chance is the generator's alone, the model is left as
it was."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from growkit.data.corpus import END
from growkit.eval.generate import sample_text, sample_tokens
from growkit.models.decoder import DecoderLM, build
from tests.support import model_config, trained_like

FAMILIES = {
    "tokenformer": {"preset": "tokenformer", "qk_norm": True},
    "transformer": {
        "preset": "transformer",
        "num_heads": 4,
        "num_kv_heads": 2,
        "norm": "layernorm",
        "rope_fraction": 0.5,
    },
}
PROMPT = torch.tensor([5, 17, 3, 17])


def model(family: str = "transformer", **fields: object) -> DecoderLM:
    config = model_config(**(FAMILIES[family] | {"head_dim": 8, "vocab_size": 256} | fields))
    return build(config, trained_like(config).params).eval()


def sampled(
    lm: DecoderLM, prompt: Tensor, count: int, *, seed: int = 0, temperature: float = 0.8, top_k: int = 50
) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return list(sample_tokens(lm, prompt, count, generator=generator, temperature=temperature, top_k=top_k))


def greedy(lm: DecoderLM, prompt: Tensor, count: int) -> list[int]:
    """Without a cache: the whole text again for every token."""
    tokens = prompt.tolist()
    for _ in range(count):
        best = int(lm(torch.tensor([tokens])).detach()[0, -1].argmax())
        if best == END[0]:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_without_a_cache(family: str) -> None:
    lm = model(family, tied_head=False)  # a tied one, untrained, says the same token again and again
    for start in range(2):
        prompt = (PROMPT + start) % 256
        wanted = greedy(lm, prompt, 75)  # beyond the cache's first 64 positions
        assert sampled(lm, prompt, 75, temperature=0) == wanted
        assert len(set(wanted)) > 2, "too dull a text to compare"
        for temperature in (0.3, 5.0):
            assert sampled(lm, prompt, 75, temperature=temperature, top_k=1, seed=start) == wanted


def test_chance_is_the_generators() -> None:
    lm = model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampled(lm, PROMPT, 40, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the global state was drawn from"
    torch.manual_seed(2)
    assert sampled(lm, PROMPT, 40, seed=3) == first
    assert sampled(lm, PROMPT, 40, seed=4) != first
    assert sampled(lm, PROMPT, 25, seed=3) == first[:25], "the count shapes the text"


def test_top_k_keeps_the_best() -> None:
    lm = model()
    for seed in range(5):
        tokens = PROMPT.tolist()
        for token in sampled(lm, PROMPT, 30, seed=seed, temperature=3.0, top_k=4):
            assert token in lm(torch.tensor([tokens])).detach()[0, -1].topk(4).indices.tolist()
            tokens.append(token)
    many = {token for seed in range(60) for token in sampled(lm, PROMPT, 1, seed=seed, temperature=50.0, top_k=0)}
    assert len(many) > 20, "top_k 0 keeps all"
    assert sampled(lm, PROMPT, 20, top_k=10_000) == sampled(lm, PROMPT, 20, top_k=0), "more than there are is all"


def test_frequencies_are_the_softmax_of_the_temperature() -> None:
    lm = model(vocab_size=6, num_layers=1)
    prompt, draws, temperature = torch.tensor([1, 2]), 600, 2.0
    generator = torch.Generator().manual_seed(0)
    found: Counter[int] = Counter()
    for _ in range(draws):
        token = list(sample_tokens(lm, prompt, 1, generator=generator, temperature=temperature, top_k=0))
        found[token[0] if token else END[0]] += 1
    wanted = torch.softmax(lm(prompt[None]).detach()[0, -1] / temperature, -1)
    for token, probability in enumerate(wanted.tolist()):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(found[token] - draws * probability) <= 4 * deviation, token


def test_a_document_ends() -> None:
    """At the first token that says so, which is not part of the text."""
    lm = model()
    texts = [sampled(lm, PROMPT, 60, seed=seed, temperature=3.0, top_k=0) for seed in range(30)]
    assert min(map(len, texts)) < 60 == max(map(len, texts)) and not any(END[0] in text for text in texts)
    assert sampled(lm, PROMPT, 0) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    """Sampled without dropout, put back into its mode, also when a prompt cannot be read."""
    lm = model(dropout=0.5).train(training)
    weights = {name: p.detach().clone() for name, p in lm.named_parameters()}
    text = sample_text(lm, "def ", 30, seed=1)
    assert lm.training == training and all(layer.training == training for layer in lm.layers.values())
    assert text == sample_text(lm.eval(), "def ", 30, seed=1)
    lm.train(training)
    small = model(vocab_size=50).train(training)
    with pytest.raises(IndexError):
        sample_text(small, "z", 5)
    assert small.training == training
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in lm.named_parameters())
    lm(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).total.backward()  # nothing was left in inference mode


def test_text() -> None:
    lm = model()
    text = sample_text(lm, "héllo", 20, seed=2)
    assert text.startswith("héllo") and len(text) > len("héllo")
    tokens = sampled(lm, torch.tensor(list("héllo".encode())), 20, seed=2)
    assert text == ("héllo".encode() + bytes(tokens)).decode(errors="replace")
    assert sample_text(lm, "", 10) == bytes(sampled(lm, torch.tensor([10]), 10)).decode(errors="replace")
    assert sample_text(lm, "\udcff", 0) == "\ufffd", "bytes of a command line that are not UTF-8"
    wide = model(vocab_size=400)
    assert any(token >= 256 for token in sampled(wide, PROMPT, 60, temperature=3.0, top_k=0))
    assert sample_text(wide, "a", 60, temperature=3.0, top_k=0).startswith("a")
