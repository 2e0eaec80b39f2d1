"""The Mamba mixer in the one decoder: the published block, states that go in and come out, patterns of layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from growkit.growth.engine import lazy_states
from growkit.growth.path import grown_config, path
from growkit.growth.state import TrainState
from growkit.models.config import Attention, Mamba, ModelConfig
from growkit.models.decoder import Cache, build, init_params
from growkit.models.layers import Layer
from growkit.models.mamba import MambaMixer
from growkit.models.spec import param_specs
from growkit.optim.groups import param_groups
from tests.support import model_config, probe, trained_like

SAME = 1e-11  # relative, float64, sums in another order
SAME_FLOAT32 = 1e-5  # relative, of logits: the bound for recurrent and parallel forms

FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 5},
    "tokens": {"projection": "pattention", "mamba_tokens": 12},
    "hybrid": {"pattern": "mamba*2+attention", "num_layers": 3, "bias": True},
    "altup": {"altup_blocks": 2, "altup_variant": "full"},
    "stride": {"num_layers": 3, "altup_stride": 3},
}
families = pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)


def mixer_of(config: ModelConfig, **options: Any) -> MambaMixer:
    layer = build(config, trained_like(config, **options).params).layers["0"]
    assert isinstance(layer, Layer)
    return layer.mamba


def plain(mixer: MambaMixer, u: torch.Tensor) -> torch.Tensor:
    """The block as it is published, token by token."""
    spec, out = mixer.spec, []
    weight = {name: p.detach() for name, p in mixer.named_parameters()}
    xz = u @ weight["in_proj.weight"].T
    x, z = xz[..., : spec.inner], xz[..., spec.inner :]
    h = u.new_zeros(u.shape[0], spec.inner, spec.state)
    for t in range(u.shape[1]):
        taps = [(k, t - spec.conv + 1 + k) for k in range(spec.conv) if t - spec.conv + 1 + k >= 0]
        convolved = sum((x[:, at] * weight["conv_weight"][:, k] for k, at in taps), weight["conv_bias"])
        xt = F.silu(torch.as_tensor(convolved))
        read = xt @ weight["x_proj.weight"].T
        r, B, C = read.split([spec.dt_rank, spec.state, spec.state], -1)
        dt = F.softplus(r @ weight["dt_proj.weight"].T + weight["dt_bias"])
        A = -torch.exp(weight["A_log"])
        h = torch.exp(dt[..., None] * A) * h + (dt * xt)[..., None] * B[:, None]
        y = (h * C[:, None]).sum(-1) + weight["D"] * xt
        out.append((y * F.silu(z[:, t])) @ weight["out_proj.weight"].T)
    return torch.stack(out, 1)


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_the_block_is_the_published_one(length: int) -> None:
    """Sequences shorter than the convolution among them: before the first token there is nothing."""
    config = model_config("mamba", d_state=5)
    mixer = mixer_of(config)
    u = torch.randn(2, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = plain(mixer, u)
    assert (mixer(u) - expected).abs().max() <= SAME * expected.abs().max()


@families
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, SAME), (torch.float32, SAME_FLOAT32)])
def test_decoding_is_the_parallel_form(fields: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    config = model_config("mamba", **fields)
    model = build(config, trained_like(config, dtype=dtype).params).eval()
    tokens = probe(config, context=29)
    whole, cache, parts, at = model(tokens), Cache(config), [], 0
    for size in (4, 1, 1, 9, 1, 2, 12):
        parts.append(model(tokens[:, at : at + size], cache=cache))
        at += size
    assert at == tokens.shape[1]
    assert (torch.cat(parts, 1) - whole).abs().max() <= tolerance * whole.abs().max()


def test_the_cache_does_not_grow() -> None:
    config = model_config("mamba", num_layers=2, d_state=5)
    model, cache = build(config, trained_like(config).params).eval(), Cache(config)
    sizes = []
    with torch.no_grad():
        for token in probe(config, rows=1, context=40)[0]:
            model(token.view(1, 1), cache=cache)
            held = [(layer.inputs, layer.state) for layer in cache.layers.values()]
            sizes.append(sum(t.untyped_storage().nbytes() for pair in held for t in pair if t is not None))
    assert len(set(sizes)) == 1 and sizes[0] > 0


def test_states_go_in_and_come_out_with_gradients() -> None:
    """Of the second half, with respect to what the first half read: as of the whole."""
    config = model_config("mamba", num_layers=2, d_state=5)
    model = build(config, trained_like(config).params).eval()
    tokens = probe(config, rows=2, context=19)
    model(tokens)[:, 10:].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = Cache(config)
    model(tokens[:, :10], cache=cache)
    model(tokens[:, 10:], cache=cache).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad - expected[name]).norm() <= SAME * expected[name].norm(), name


def test_the_start_is_the_published_one() -> None:
    """A_n = −(n + 1), D = 1, Δ log-uniform in 1e-3..0.1, W_dt uniform; what writes is smaller by the root of layers."""
    config = model_config("mamba", embed_dim=256, num_layers=4, d_state=6)
    params = init_params(config, torch.Generator().manual_seed(0))
    mixer = config.layers[0].mixer
    assert isinstance(mixer, Mamba) and (mixer.inner, mixer.dt_rank, mixer.conv) == (512, 16, 4)
    prefix = "layers.0.mamba."
    assert torch.allclose(params[prefix + "A_log"].exp(), torch.arange(1.0, 7).expand(512, 6))
    assert torch.equal(params[prefix + "D"], torch.ones(512))
    dt = F.softplus(params[prefix + "dt_bias"])
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1 * 1.001
    assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), abs=0.2)
    bounds = {"dt_proj.weight": 16**-0.5, "conv_weight": 0.5, "conv_bias": 0.5, "in_proj.weight": 256**-0.5}
    bounds |= {"x_proj.weight": 512**-0.5, "out_proj.weight": 512**-0.5 / 2}
    for name, bound in bounds.items():
        assert 0.9 * bound < params[prefix + name].abs().max() <= bound * 1.0001, name


def test_a_start_that_remembers_longer() -> None:
    """Fresh channels of a recipe's own range, those that growth adds to them as well."""
    config = model_config("mamba", embed_dim=64, dt_min=1e-6, dt_max=1e-4)
    name = "layers.0.mamba.dt_bias"
    params = init_params(config, torch.Generator().manual_seed(0))
    target = grown_config(config, {"expand": 4}, {})
    chain = lazy_states(TrainState(config, params, {}), path(config, target, {}), torch.Generator().manual_seed(1))
    for start in (params[name], chain[-1].materialized().params[name][128:]):
        dt = F.softplus(start.double())
        assert 1e-6 * 0.999 <= dt.min() < 3e-6 and 4e-5 < dt.max() <= 1e-4 * 1.001


def test_what_decays() -> None:
    specs = param_specs(model_config("mamba"))
    groups = param_groups(specs, {}, 0, weight_decay=0.1, decay_embedding=False, lr_scale={})
    decayed = {name.rpartition(".mamba.")[2] for group in groups if group.weight_decay for name in group.names}
    assert decayed == {f"{part}_proj.weight" for part in ("in", "x", "dt", "out")} | {"conv_weight"}


def test_patterns_are_written_out() -> None:
    config = model_config("mamba", pattern="mamba*3 + attention", num_layers=8)
    kinds = [layer.mixer.kind for layer in config.layers]
    assert kinds == ["mamba", "mamba", "mamba", "attention"] * 2
    assert [layer.mlp is None for layer in config.layers] == [True, True, True, False] * 2
    attention = config.layers[3].mixer
    assert isinstance(attention, Attention) and attention.num_heads == 2
    assert model_config("mamba", num_layers=3).layers[2].mixer.kind == "mamba"


def test_bf16_keeps_the_state_wide() -> None:
    config = model_config("mamba", d_state=5)
    mixer = mixer_of(config, dtype=torch.float32)
    cache = Cache(config).layers[0]
    u = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(u, cache)
    assert cache.state is not None and cache.state.dtype == torch.float32
    expected = mixer(u)
    assert (out.float() - expected).norm() <= 0.02 * expected.norm()  # bf16 products round by 4e-3 each


def test_what_is_not_a_number_stays_one() -> None:
    """It spreads to what comes later and to nothing before."""
    config = model_config("mamba")
    model = build(config, trained_like(config).params).eval()
    hidden = model.embedding.weight.detach().clone()
    hidden[7] = math.nan
    model.embedding.weight.data = hidden
    tokens = torch.tensor([[1, 2, 3, 7, 4, 5]])
    with torch.no_grad():
        x = model.hidden(tokens)
    assert not x[0, :3].isnan().any() and x[0, 3:].isnan().all()
