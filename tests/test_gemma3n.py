"""Routed AltUp beside transformers' Gemma 3n: one layer's blocks with all gradients, and a stack of layers.

What coincides: predict, compute, correct with routed coefficients; the router (its norm, its scale 1/D, tanh); the clip
of the coefficients' weights in training; the entry, where Gemma's projections are ± multiples of the identity (it
rescales each to the embedding's size, which leaves the sign); mean, final norm.

What does not: Gemma's other entries and exits (whole matrices, rescaled to the size of the first block; growkit's ends
are a number for each block), so the exit is compared with our ends on blocks that are rescaled as Gemma does it.
Laurel, per-layer inputs, sparse activations and Gemma's own attention are not in growkit: both sides compute with one
function, a growkit layer's. Gemma rounds the coefficients to the stream's dtype, growkit keeps them in float32. Beyond
the clip Gemma overwrites the weights themselves in every forward pass; in growkit they are left to the optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp, Gemma3nTextDecoderLayer, Gemma3nTextModel

from growkit.models.config import AltUp, ModelConfig, Norm
from growkit.models.decoder import DecoderLM, build
from growkit.models.layers import rope_table
from growkit.models.spec import param_specs
from growkit.models.stream import ROUTED_CLIP, RoutedBlocks
from tests.support import model_config, probe

TOLERANCE = 1e-6  # float32: a few dozen roundings of 6e-8 each, relative to the largest entry
K, D = 4, 24
EPS = 1e-3  # large enough that a wrong one is seen


def config(active: int, layers: int = 1) -> ModelConfig:
    made = model_config("transformer", num_layers=layers)
    norm, stream = Norm("rmsnorm", EPS), AltUp(K, order="gemma", routed=True, router_scale=1 / D)
    specs = tuple(dataclasses.replace(layer, block=active) for layer in made.layers)
    return dataclasses.replace(made, norm=norm, final_norm=norm, layers=specs, stream=stream)


def gemma_config(active: int, layers: int = 1, **fields: Any) -> Gemma3nTextConfig:
    return Gemma3nTextConfig(
        vocab_size=48,
        vocab_size_per_layer_input=48,
        hidden_size=D,
        hidden_size_per_layer_input=2,
        intermediate_size=[8] * layers,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * layers,
        activation_sparsity_pattern=[0.0] * layers,
        num_kv_shared_layers=0,
        laurel_rank=2,
        altup_num_inputs=K,
        altup_active_idx=active,
        altup_coef_clip=ROUTED_CLIP,
        rms_norm_eps=EPS,
        pad_token_id=0,
        **fields,
    )


def moved(theirs: Gemma3nTextAltUp) -> dict[str, nn.Parameter]:
    """Their parameters under our names."""
    return {
        "router": theirs.modality_router.weight,
        "router_norm.gain": theirs.router_norm.weight,
        "mix": theirs.prediction_coefs.weight,
        "write": theirs.correction_coefs.weight,
    }


def randomize(module: nn.Module, generator: torch.Generator, spread: float) -> None:
    """``spread``: standard deviation of the weights that make the coefficients; the wider, the smaller the routes, so
    that coefficients are of the size of one: no float32 is left of 1e5 x − 1e5 x."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "router_norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif "modality_router" in name:
                parameter.copy_(1.2 / spread * noise)
            else:
                parameter.copy_(spread * noise)


def apart(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None and theirs is not None and ours.shape == theirs.shape and theirs.abs().max() > 0
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize("spread", [0.3, 100.0], ids=["inside", "beyond-the-clip"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("active", [0, 2])
def test_predict_and_correct_are_gemmas_with_their_gradients(active: int, training: bool, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = Gemma3nTextAltUp(gemma_config(active)).train(training)
    randomize(theirs, generator, spread)
    made = config(active)
    assert made.stream is not None
    ours = RoutedBlocks(made.layers[0], made.stream, made).train(training)
    ours.load_state_dict({name: weight.detach().clone() for name, weight in moved(theirs).items()})
    beyond = {name: (weight.detach().abs() > ROUTED_CLIP).any() for name, weight in moved(theirs).items()}
    assert bool(beyond["mix"]) == bool(beyond["write"]) == (spread > 1)
    R = torch.randn(K, 3, 7, D, generator=generator)
    W = torch.randn(D, D, generator=generator) / D**0.5
    cotangent = torch.randn(R.shape, generator=generator)

    def compute(z: Tensor, weight: Tensor) -> Tensor:
        return z + torch.tanh(z @ weight)

    R_theirs, W_theirs = R.clone().requires_grad_(), W.clone().requires_grad_()
    predicted = theirs.predict(R_theirs)
    corrected = theirs.correct(predicted, compute(predicted[active], W_theirs))
    (corrected * cotangent).sum().backward()
    R_ours, W_ours = R.clone().requires_grad_(), W.clone().requires_grad_()
    found, balance = ours(R_ours, lambda z: (compute(z, W_ours), None))
    (found * cotangent).sum().backward()
    assert balance is None and apart(found, corrected) <= TOLERANCE
    assert apart(R_ours.grad, R_theirs.grad) <= TOLERANCE
    assert apart(W_ours.grad, W_theirs.grad) <= TOLERANCE
    mine = dict(ours.named_parameters())
    for name, weight in moved(theirs).items():
        assert apart(mine[name].grad, weight.grad) <= TOLERANCE, name


Compute = Callable[[Tensor], Tensor]


class OfOneCompute(Gemma3nTextDecoderLayer):
    """Gemma's layer with its own AltUp, around another computation than its own."""

    def __init__(self, config: Gemma3nTextConfig, index: int, compute: Compute) -> None:
        super().__init__(config, index)
        self.compute = compute

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        predictions = self.altup.predict(hidden_states)
        return self.altup.correct(predictions, self.compute(predictions[self.config.altup_active_idx]))


def stack(active: int, layers: int) -> tuple[DecoderLM, Gemma3nTextModel]:
    """Ours, and theirs with the same weights and around the same computation."""
    generator = torch.Generator().manual_seed(2)
    made = config(active, layers)
    params = {name: 0.3 * torch.randn(spec.shape, generator=generator) for name, spec in param_specs(made).items()}
    ours = build(made, params)
    theirs = Gemma3nTextModel(gemma_config(active, layers))
    scales = [1.0, 2.0, -0.5, 3.0]
    rope = rope_table(made.layers[0].mixer, torch.arange(16), torch.float32)
    with torch.no_grad():
        theirs.embed_tokens.weight.copy_(ours.embedding.weight / D**0.5)
        theirs.norm.weight.copy_(ours.final_norm.gain)
        for index, spec in enumerate(made.layers):
            layer = ours.layers[str(spec.id)]

            def compute(z: Tensor, layer: Any = layer) -> Tensor:
                return layer._block(z, rope, None, None)[0]

            theirs.layers[index] = OfOneCompute(theirs.config, index, compute)
            layer.stream.router.mul_(8)  # routes of the size of one
            for name, weight in moved(theirs.layers[index].altup).items():
                weight.copy_(dict(layer.stream.named_parameters())[name])
        for block, scale in enumerate(scales[1:]):
            theirs.altup_projections[block].weight.copy_(scale * torch.eye(D))
            theirs.altup_unembed_projections[block].weight.copy_(scale * torch.eye(D))
        signs = torch.tensor(scales).sign()
        ours.stream.enter.copy_(signs[:, None])
        ours.stream.leave.copy_(signs[None] / K)
    return ours, theirs


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("active", [0, 1])
def test_a_stack_has_gemmas_hidden_streams_layer_by_layer(active: int, training: bool) -> None:
    ours, theirs = stack(active, layers=3)
    ours.train(training), theirs.train(training)
    tokens = probe(ours.config)[:, :-1]
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    for name, layers in (("ours", ours.layers.values()), ("theirs", theirs.layers)):
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    left: list[Tensor] = []
    last = list(ours.layers.values())[-1]
    last.register_forward_hook(lambda _, __, output: left.append(output[0]))
    theirs.layers[-1].register_forward_hook(lambda _, __, output: left.append(output))
    with torch.no_grad():
        ours.hidden(tokens)
        hidden = theirs(tokens).last_hidden_state
    assert len(seen["ours"]) == len(seen["theirs"]) == 3
    for mine, gemmas in zip([*seen["ours"], left[0]], [*seen["theirs"], left[1]], strict=True):
        assert mine.shape == (K, 3, 16, D) and apart(mine, gemmas) <= TOLERANCE
    size = left[0].square().mean(-1, keepdim=True).sqrt()
    assert (size / size[:1] - 1).abs().max() > 0.1, "rescaling would change nothing"
    assert apart(ours.final_norm(ours.stream.left(left[0] * size[:1] / size)), hidden) <= TOLERANCE
