"""Fewer parameter tokens: banks laid together, and tokens dropped by what they write."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from growkit.errors import ConfigError
from growkit.growth.engine import grow
from growkit.growth.operator import EXACT_FLOAT64
from growkit.growth.operators import tokens_at_work
from growkit.growth.path import grown_config, path
from growkit.growth.state import TrainState
from growkit.models.config import ModelConfig, PattentionMLP
from tests.support import model_config, probe, trained_like

BANKS = {"attention_tokens": 15, "mlp_tokens": 20}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def with_banks(**fields: Any) -> ModelConfig:
    config = grown_config(model_config("tokenformer", **fields), BANKS, {})
    return grown_config(config, {"attention_tokens": 18, "mlp_tokens": 31}, {})


def moved(state: TrainState, target: ModelConfig, methods: dict[str, str]) -> float:
    tokens = probe(state.config, rows=8)
    _, report = grow(state, target, methods, generator(), tokens)
    assert report.certificate is not None and not report.certificate.exact
    return report.certificate.delta_logits_float64


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_banks_laid_together_are_nearer_than_unscaled(theta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_banks(theta=theta)
    state, target = trained_like(config), grown_config(config, {"token_banks": 1}, {})
    assert all(p.mlp.projection.banks == (31,) for p in target.layers if isinstance(p.mlp, PattentionMLP))
    fitted = moved(state, target, {})
    plain = tokens_at_work.scales_under_one_norm

    def unscaled(*given: Any) -> tuple[list[float], list[float]]:
        keys, values = plain(*given)
        return [1.0] * len(keys), [1.0] * len(values)

    monkeypatch.setattr("growkit.growth.operators.consolidate.scales_under_one_norm", unscaled)
    assert fitted < 0.95 * moved(state, target, {}), (fitted, moved(state, target, {}))


def test_banks_that_speak_of_the_same_are_laid_together_without_a_trace() -> None:
    """Where every bank's norm is in one proportion to the others at every position, one norm can say the same."""
    config = grown_config(model_config("tokenformer"), {"attention_tokens": 20, "mlp_tokens": 28}, {})
    state = trained_like(config)
    params = dict(state.params)
    for name in params:
        if name.endswith("keys.1"):  # the same tokens' keys, turned about and three times as long
            params[name] = -3 * params[name.replace("keys.1", "keys.0")]
    state = dataclasses.replace(state, params=params)
    assert moved(state, grown_config(config, {"token_banks": 1}, {}), {}) <= EXACT_FLOAT64


def test_a_bank_that_writes_nothing_yet_does_not_disturb_the_fit() -> None:
    config = model_config("tokenformer", theta="gelu_l2_norm")
    state, target = trained_like(config), grown_config(config, BANKS, {})
    grown, _ = grow(state, target, {}, generator())
    joined, _ = grow(grown, grown_config(target, {"token_banks": 1}, {}), {}, generator(), probe(config))
    assert all(t.isfinite().all() for t in joined.params.values())
    new = joined.params["layers.0.mlp.tokens.values.0"][14:]
    assert not new.any()


def test_a_bank_appended_in_the_same_stage_stays_a_bank() -> None:
    config = with_banks()
    target = grown_config(config, {"token_banks": 1, "mlp_tokens": 40}, {})
    assert [link.operator for link in path(config, target, {})] == ["consolidate", "param_tokens"]
    mlp = target.layers[0].mlp
    assert isinstance(mlp, PattentionMLP) and mlp.projection.banks == (31, 9)
    grown, _ = grow(trained_like(config), target, {}, generator(), probe(config))
    assert grown.config == target


@pytest.mark.parametrize("scope", ["bank", "shared"])
def test_banks_laid_together_shrink_in_the_same_stage(scope: str) -> None:
    config = with_banks(token_norm=scope)
    fields = {"token_banks": 1, "attention_tokens": 12, "mlp_tokens": 2}  # fewer than there are banks
    methods = {"param_tokens": "shrink"}
    target = grown_config(config, fields, methods)
    assert [link.operator for link in path(config, target, methods)] == ["consolidate", "param_tokens"]
    mlp = target.layers[0].mlp
    assert isinstance(mlp, PattentionMLP) and mlp.projection.banks == (2,)
    grown, _ = grow(trained_like(config), target, methods, generator(), probe(config))
    assert grown.params["layers.0.mlp.tokens.values.0"].shape[0] == 2 and grown.config == target
    moments = grown.moments["layers.0.mlp.tokens.values.0"]
    assert moments.exp_avg.shape == moments.exp_avg_sq.shape == grown.params["layers.0.mlp.tokens.values.0"].shape


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_what_is_dropped_matters_less_than_anything_else(theta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_banks(theta=theta)
    state = trained_like(config)
    fields = {"attention_tokens": 15, "mlp_tokens": 26}
    target = grown_config(config, fields, {"param_tokens": "shrink"})
    least = moved(state, target, {"param_tokens": "shrink"})

    def at_random(seen: Any, layer: Any, prefix: str, spec: Any, sizes: tuple[int, ...]) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(len(prefix))
        return [torch.randperm(n, generator=draw)[:k].sort().values for n, k in zip(spec.banks, sizes, strict=True)]

    monkeypatch.setattr("growkit.growth.operators.param_tokens.most_used", at_random)
    assert least < 0.8 * moved(state, target, {"param_tokens": "shrink"})


def test_tokens_that_write_nothing_go_first() -> None:
    config = model_config("tokenformer")
    state = trained_like(config)
    params = {name: t.clone() for name, t in state.params.items()}
    for name in params:
        if ".values." in name:
            params[name][3] = 0
    target = grown_config(config, {"attention_tokens": 9, "mlp_tokens": 13}, {"param_tokens": "shrink"})
    state = dataclasses.replace(state, params=params)
    grown, _ = grow(state, target, {"param_tokens": "shrink"}, generator(), probe(config))
    for name, tensor in grown.params.items():
        if ".values." in name:
            assert torch.equal(tensor, torch.cat((params[name][:3], params[name][4:])))
            assert torch.equal(
                grown.moments[name].exp_avg,
                torch.cat((state.moments[name].exp_avg[:3], state.moments[name].exp_avg[4:])),
            )


def test_banks_shrink_in_proportion_and_none_is_lost() -> None:
    config = with_banks()  # 14 + 6 + 11 tokens in the MLP, 10 + 5 + 3 in the attention
    target = grown_config(config, {"attention_tokens": 9, "mlp_tokens": 4}, {"param_tokens": "shrink"})
    mlp, mixer = target.layers[0].mlp, target.layers[0].mixer
    assert isinstance(mlp, PattentionMLP) and mlp.projection.banks == (2, 1, 1)
    assert mixer.q.kind == "pattention" and mixer.q.banks == (5, 2, 2)


@pytest.mark.parametrize(
    ("fields", "methods", "words"),
    [
        ({"token_banks": 2}, {}, ("grow.token_banks", "2", "use 1")),
        ({"token_banks": 1}, {"consolidate": "join"}, ("methods.consolidate", "use fit")),
        ({"mlp_tokens": 2}, {"param_tokens": "shrink"}, ("grow.mlp_tokens", "choose 3 to 31", "consolidate")),
        ({"mlp_tokens": 40}, {"param_tokens": "shrink"}, ("grow.mlp_tokens", "choose 3 to 31")),
        ({"mlp_tokens": 20}, {}, ("grow.mlp_tokens", "below the current 31", "the method shrink")),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], methods: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        grown_config(with_banks(), fields, methods)
    assert all(word in str(raised.value) for word in words), raised.value


def test_one_bank_is_nothing_to_lay_together() -> None:
    with pytest.raises(ConfigError, match=r"grow\.token_banks.*more than one bank"):
        grown_config(model_config("tokenformer"), {"token_banks": 1}, {})
