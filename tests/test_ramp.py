"""Masks and their ramp: the model side. What they promise of growth is the contract's (contract.py), what of training
the schedule's and the run's tests below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from growkit.errors import ConfigError
from growkit.growth.logits import stream_logits
from growkit.models.config import DenseMLP, ModelConfig, Pattention, PattentionMLP, from_json, to_json, unmasked
from growkit.models.decoder import build
from growkit.models.ramp import Ramp
from tests.support import model_config, probe, trained_like

ROUNDING = 1e-12  # relative, of one sum taken in two orders in float64


def with_layers(config: ModelConfig, change: Callable[..., Any]) -> ModelConfig:
    return replace(config, ramp=0.0, layers=tuple(change(layer) for layer in config.layers))


def masked_stream(config: ModelConfig) -> ModelConfig:
    return replace(config, steady_dim=16, ramp=0.0)


def masked_last_layer(config: ModelConfig) -> ModelConfig:
    return with_layers(config, lambda layer: replace(layer, ramped=layer.id == 1))


def masked_heads(config: ModelConfig) -> ModelConfig:
    return with_layers(config, lambda layer: replace(layer, mixer=replace(layer.mixer, steady_heads=(2, 2))))


def masked_units(config: ModelConfig) -> ModelConfig:
    return with_layers(config, lambda layer: replace(layer, mlp=replace(layer.mlp, steady_dim=40)))


def _tokens(config: ModelConfig, change: Callable[[Pattention], Pattention]) -> ModelConfig:
    def changed(layer):  # type: ignore[no-untyped-def]
        mixer = replace(layer.mixer, **{name: change(getattr(layer.mixer, name)) for name in "qkvo"})
        return replace(layer, mixer=mixer, mlp=PattentionMLP(change(layer.mlp.projection)))

    return with_layers(config, changed)


def masked_banks(config: ModelConfig) -> ModelConfig:
    return _tokens(config, lambda p: replace(p, banks=(p.tokens - 4, 4), taus=(2.0, 2.0), steady_banks=1))


def moving_tau(config: ModelConfig) -> ModelConfig:
    return _tokens(config, lambda p: replace(p, tau_from=(p.taus[0] / 2,)))


FAMILIES: dict[str, dict[str, Any]] = {
    "transformer": {"preset": "transformer", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "gelu": {
        "preset": "transformer",
        "mlp": "gelu",
        "bias": True,
        "parallel": True,
        "num_heads": 4,
        "tied_head": False,
    },
    "tokens": {"preset": "tokenformer", "num_heads": 4, "num_kv_heads": 2},
    "gelu_l2": {"preset": "tokenformer", "theta": "gelu_l2_norm"},
    "shared": {"preset": "tokenformer", "token_norm": "shared"},
    "shared-gelu_l2": {"preset": "tokenformer", "token_norm": "shared", "theta": "gelu_l2_norm"},
    "shared-softmax": {"preset": "tokenformer", "token_norm": "shared", "theta": "softmax"},
}
Mask = Callable[[ModelConfig], ModelConfig]
CASES: list[tuple[Mask, str]] = [
    (masked_stream, "transformer"),
    (masked_stream, "gelu"),
    (masked_stream, "tokens"),
    (masked_last_layer, "transformer"),
    (masked_last_layer, "gelu"),
    (masked_last_layer, "tokens"),
    (masked_heads, "transformer"),
    (masked_heads, "tokens"),
    (masked_units, "transformer"),
    (masked_units, "gelu"),
    (masked_banks, "tokens"),
    (masked_banks, "gelu_l2"),
    (moving_tau, "shared"),
    (moving_tau, "shared-gelu_l2"),
    (moving_tau, "shared-softmax"),
]
every_mask = pytest.mark.parametrize(("mask", "family"), CASES, ids=lambda value: getattr(value, "__name__", value))


def logits(config: ModelConfig, params: Any, *, backend: str = "auto") -> torch.Tensor:
    found = build(config, params, backend=backend).eval()(probe(config)[:, :-1])
    assert isinstance(found, torch.Tensor)
    return found.detach()


def poisoned(config: ModelConfig, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other numbers wherever a mask hides what reads or writes: at 0 they must not be seen."""
    changed = {name: tensor.clone() for name, tensor in params.items()}
    heads = [1, 3]  # of 2 groups with 2 heads the second ones
    for name, tensor in changed.items():
        layer = config.layers[int(name.split(".")[1])] if name.startswith("layers.") else None
        if config.steady_dim is not None and (
            name == "embedding.weight" or name.endswith(("o.values.0", "s.values.0"))
        ):
            tensor[:, 16:] += 1
        elif config.steady_dim is not None and name.endswith(("o.weight", "down.weight", "o.bias", "down.bias")):
            tensor[16:] += 1
        if layer is None:
            continue
        if layer.ramped or ".values.1" in name or ".keys.1" in name:
            tensor += 1
        if layer.mixer.steady_heads is not None and name.endswith(("o.weight", "o.keys.0")):
            tensor.view(tensor.shape[0], 4, -1)[:, heads] += 1
        if isinstance(layer.mlp, DenseMLP) and layer.mlp.steady_dim is not None and name.endswith("down.weight"):
            tensor[:, 40:] += 1
    return changed


@every_mask
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_at_zero_nothing_under_the_mask_is_seen_and_at_one_there_is_no_mask(
    mask: Mask, family: str, backend: str
) -> None:
    config = mask(model_config(**FAMILIES[family]))
    params = dict(trained_like(replace(config, ramp=1.0)).params)
    whole, end = (
        logits(c, params, backend=backend) for c in (unmasked(replace(config, ramp=1.0)), replace(config, ramp=1.0))
    )
    assert torch.equal(whole, end), "at 1 a mask is not there, bitwise"
    start, half = (logits(replace(config, ramp=r), params, backend=backend) for r in (0.0, 0.5))
    assert float((start - end).norm() / end.norm()) > 1e-2 < float((half - end).norm() / end.norm())
    if mask is moving_tau:
        held = _tokens(config, lambda p: replace(p, taus=p.tau_from or (), tau_from=None))
        assert torch.equal(start, logits(held, params, backend=backend)), "τ does not start where it was"
    else:
        other = poisoned(config, params)
        assert any(not torch.equal(other[name], params[name]) for name in params)
        assert torch.equal(start, logits(config, other, backend=backend)), "what is under the mask is seen"
        assert not torch.equal(half, logits(replace(config, ramp=0.5), other, backend=backend))


@every_mask
def test_the_ways_to_compute_a_model_agree_halfway(mask: Mask, family: str) -> None:
    """The whole model, layer by layer, the reference path, and one whose ramp was moved there in place."""
    config = replace(mask(model_config(**FAMILIES[family])), ramp=0.375)
    params = dict(trained_like(config).params)
    tokens = probe(config)[:, :-1]
    wanted = logits(config, params)
    moved = build(replace(config, ramp=0.0), params).eval()
    with torch.no_grad():
        assert not torch.equal(moved(tokens), wanted)
        moved.set_ramp(0.375)
        assert moved.config == config
        plain = moved(tokens)
    assert torch.equal(stream_logits(config, params, tokens, torch.float64), plain)
    for other in (plain, logits(config, params, backend="reference")):
        assert float((other - wanted).norm() / wanted.norm()) <= ROUNDING
    assert not any("mask" in name or "tau" in name for name in moved.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_masks_has_no_modules_for_them(family: str) -> None:
    config = model_config(**FAMILIES[family])
    assert not any(isinstance(module, Ramp) for module in build(config, trained_like(config).params).modules())
    assert unmasked(config) == config


@every_mask
def test_gradients_under_a_mask(mask: Mask, family: str) -> None:
    """The same by the path with a backward pass of its own and by autograd through the reference; none at 0."""
    config = mask(model_config(**FAMILIES[family]))
    params = trained_like(config).params
    tokens = probe(config)
    for ramp in (0.0, 0.5):
        found = []
        for backend in ("compiled", "reference"):
            model = build(replace(config, ramp=ramp), params, backend=backend)
            model(tokens[:, :-1], tokens[:, 1:]).total.backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        for name, gradient in found[0].items():
            assert float((gradient - found[1][name]).norm()) <= 1e-9 * (float(found[1][name].norm()) + 1e-9), name
        if mask is masked_last_layer:
            hidden = [gradient for name, gradient in found[0].items() if name.startswith("layers.1.")]
            assert all(bool(gradient.any()) == (ramp > 0) for gradient in hidden)


@every_mask
def test_a_compiled_model_is_compiled_once(mask: Mask, family: str) -> None:
    """The ramp moves at every step: a graph that held it would be compiled at every step."""
    if family not in ("transformer", "tokens", "shared"):
        return
    config = mask(model_config(**FAMILIES[family]))
    params = {name: tensor.float() for name, tensor in trained_like(config).params.items()}
    plain, model = build(config, params), build(config, params)
    torch._dynamo.reset()
    frames: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        frames.append(1)
        return graph.forward

    model.compile(backend=count)
    tokens = probe(config)[:, :-1]
    for step in range(5):
        plain.set_ramp(step / 4)
        model.set_ramp(step / 4)
        assert torch.allclose(model(tokens), plain(tokens), atol=1e-4, rtol=1e-4), step
        if step == 0:
            first = len(frames)
    assert len(frames) == first


def test_a_configuration_without_masks_still_loads() -> None:
    """A manifest from before there were masks lacks their fields; one that has them comes back as it was."""
    for mask, family in CASES:
        config = mask(model_config(**FAMILIES[family]))
        assert from_json(to_json(config)) == config
        old = to_json(unmasked(replace(config, ramp=1.0)))
        new = {"ramp", "steady_dim", "steady_heads", "steady_banks", "tau_from", "ramped"}
        assert from_json(_without(old, new)) == from_json(old)


def _without(data: Any, names: set[str]) -> Any:
    if isinstance(data, dict):
        return {key: _without(value, names) for key, value in data.items() if key not in names}
    return [_without(item, names) for item in data] if isinstance(data, list | tuple) else data


def test_a_model_on_its_ramp_is_not_taken_for_a_settled_one() -> None:
    config = replace(masked_units(model_config("transformer")), ramp=0.25)
    with pytest.raises(ConfigError, match=r"ramp is at 0.25; train on .*\[still-ramping\]"):
        unmasked(config)
    assert dataclasses.asdict(unmasked(replace(config, ramp=1.0))) == to_json(model_config("transformer"))
