"""AltUp's streams themselves: the written-out algorithms, causality, decoding, precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from growkit.models.config import AltUp, LayerSpec, ModelConfig
from growkit.models.decoder import Cache, DecoderLM, build
from growkit.models.stream import Blocks, Strided
from tests.support import model_config, probe, trained_like

EXACT = 1e-10  # relative, float64: algebra in another order
K, D = 3, 24
ORDERS = ("gemma", "paper", "free", "round_robin")
STREAMS: dict[str, AltUp | int] = {
    **{
        f"{order}-{variant}": AltUp(K, variant == "full", order) for order in ORDERS for variant in ("full", "recycled")
    },
    **{
        f"routed-{order}-{variant}": AltUp(K, variant == "full", order, True, 1 / D)
        for order in ("gemma", "paper")
        for variant in ("full", "recycled")
    },
    "stride-2": 2,
    "stride-3": 3,
}


def config(name: str) -> ModelConfig:
    """Two layers on blocks 1 and 2, of a strided stream between two that run on every token."""
    stream = STREAMS[name]
    if isinstance(stream, int):
        made = model_config("transformer", num_layers=4)
        strides = (1, stream, stream, 1)
        layers = [dataclasses.replace(layer, stride=k) for layer, k in zip(made.layers, strides, strict=True)]
        return dataclasses.replace(made, layers=tuple(layers))
    made = model_config("transformer")
    layers = [dataclasses.replace(layer, block=i + 1) for i, layer in enumerate(made.layers)]
    return dataclasses.replace(made, layers=tuple(layers), stream=stream)


def model(name: str) -> DecoderLM:
    return build(config(name), trained_like(config(name)).params).eval()


def apart(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("name", STREAMS)
def test_no_logit_depends_on_a_later_token(name: str) -> None:
    """And all that can do depend on an earlier one; a stride passes over some of the tokens in between."""
    lm = model(name)
    tokens = probe(lm.config, rows=1)[:, :-1]
    with torch.no_grad():
        logits = lm(tokens)
        for at in range(tokens.shape[1]):
            other = tokens.clone()
            other[:, at] = (other[:, at] + 1) % lm.config.vocab_size
            moved = (lm(other) - logits).abs().amax((0, 2))
            assert not moved[:at].any(), f"token {at} is seen before it"
            assert (moved[at:] > 0).all(), f"token {at} is not seen after it"


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("name", STREAMS)
def test_decoding_with_a_cache_is_the_whole_pass(name: str, chunk: int) -> None:
    lm = model(name)
    tokens = probe(lm.config)[:, :-1]
    with torch.no_grad():
        whole, cache = lm(tokens), Cache(lm.config)
        parts = [lm(part, cache=cache) for part in tokens.split(chunk, dim=1)]
    assert apart(torch.cat(parts, 1), whole) <= EXACT


@contextmanager
def streams_after_layers(lm: DecoderLM) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: found.append(out[0])) for layer in lm.layers.values()]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_is_the_algorithm_written_out(order: str) -> None:
    """AltUp's algorithm 1 (predict, compute, correct) and its kin as their papers have them, block by block."""
    generator = torch.Generator().manual_seed(3)
    spec: LayerSpec = dataclasses.replace(model_config("transformer").layers[0], block=1)
    blocks = Blocks(spec, AltUp(K, order=order)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    R = torch.randn(K, 2, 5, D, generator=generator, dtype=torch.float64)
    W = torch.randn(D, D, generator=generator, dtype=torch.float64) / D**0.5

    def compute(z: Tensor) -> Tensor:
        return z + torch.tanh(z @ W)

    p = {name: parameter.tolist() for name, parameter in blocks.named_parameters()}
    x, j = list(R), 1
    zero = torch.zeros_like(x[0])
    if order in ("gemma", "paper"):
        predicted = [sum((p["mix"][i][k] * x[k] for k in range(K)), zero) for i in range(K)]
        made = compute(predicted[j] if order == "gemma" else x[j])
        wanted = [predicted[i] + p["write"][i] * (made - predicted[j]) for i in range(K)]
    else:
        z = sum((p["read"][k] * x[k] for k in range(K)), zero)
        change = compute(z) - z
        if order == "free":
            wanted = [sum((p["mix"][i][k] * x[k] for k in range(K)), p["write"][i] * change) for i in range(K)]
        else:
            wanted = [x[i] + change if i == j else x[i] for i in range(K)]
    found, _ = blocks(R, lambda z: (compute(z), None))
    assert apart(found, torch.stack(wanted)) <= EXACT
    a, N, b = blocks.coefficients()  # the one form: z = aᵀR, R′ = N R + b L(z)ᵀ
    z = torch.einsum("k,kbtd->btd", a, R)
    closed = torch.einsum("ik,kbtd->ibtd", N, R) + torch.einsum("k,btd->kbtd", b, compute(z))
    assert apart(found, closed) <= EXACT


def test_a_strided_layer_is_sequence_altup_written_out() -> None:
    generator = torch.Generator().manual_seed(4)
    k = 3
    strided = Strided(dataclasses.replace(model_config("transformer").layers[0], stride=k)).double()
    a1, a2, b = 0.75, 0.375, 1.25
    with torch.no_grad():
        strided.mix.copy_(torch.tensor([a1, a2]))
        strided.write.fill_(b)
    x = torch.randn(2, 8, D, generator=generator, dtype=torch.float64)
    run_on: list[Tensor] = []

    def compute(z: Tensor) -> tuple[Tensor, None]:
        run_on.append(z)
        return z.cumsum(1).tanh(), None  # a token's result depends on those before it

    found, _ = strided(x, compute)
    (z,) = run_on
    assert torch.equal(z, x[:, [0, 3, 6]])
    made = z.cumsum(1).tanh()
    for i in range(8):
        at = i // k * k
        predicted, of_anchor = a1 * x[:, i] + a2 * x[:, at], a1 * x[:, at] + a2 * x[:, at]
        assert apart(found[:, i], predicted + b * (made[:, i // k] - of_anchor)) <= EXACT


@pytest.mark.parametrize("full", [False, True])
def test_blocks_enter_and_leave_by_the_ends(full: bool) -> None:
    """Of a full stream every part of embedding and head is in its place, and normalised on its own."""
    lm = model("gemma-full" if full else "gemma-recycled")
    tokens = probe(lm.config)[:, :-1]
    entered: list[Tensor] = []
    first = next(iter(lm.layers.values()))
    first.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with streams_after_layers(lm) as after, torch.no_grad():
        logits = lm(tokens)
    P = K if full else 1
    parts = lm.embedding.weight[tokens].view(*tokens.shape, P, D)
    plain = torch.stack([sum((lm.stream.enter[i, p] * parts[:, :, p] for p in range(P)), torch.tensor(0.0).double())
                         for i in range(K)])  # fmt: skip
    assert apart(entered[0], plain.detach()) <= EXACT
    gains = lm.final_norm.gain.view(P, D)
    wanted = torch.zeros_like(logits)
    for p in range(P):
        h = sum((lm.stream.leave[p, i] * after[-1][i] for i in range(K)), torch.tensor(0.0).double())
        h = h * (h.square().mean(-1, keepdim=True) + lm.config.final_norm.eps) ** -0.5 * gains[p]
        wanted = wanted + h @ lm.head_weight.view(-1, P, D)[:, p].T
    assert apart(logits, wanted) <= EXACT


@pytest.mark.parametrize("name", STREAMS)
def test_under_autocast_the_stream_stays_float32(name: str) -> None:
    lm = build(config(name), {n: p.float() for n, p in trained_like(config(name)).params.items()})
    tokens = probe(lm.config)[:, :-1]
    inner: list[torch.dtype] = []
    read: list[torch.dtype] = []
    for layer in lm.layers.values():
        layer.attention.o.register_forward_hook(lambda _, __, out: inner.append(out.dtype))
        layer.attention_norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].dtype))
    with streams_after_layers(lm) as after, torch.autocast("cpu", torch.bfloat16):
        lm(tokens)
    assert set(inner) == {torch.bfloat16}, "autocast is on"
    assert {R.dtype for R in after} == set(read) == {torch.float32}
    assert all(not torch.equal(R, R.bfloat16().float()) for R in after), "rounded on the way"
