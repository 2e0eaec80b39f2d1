"""What growing AltUp's blocks promises beyond the contract (tests/contract.py): to the bit in float32, blocks that
training can tell apart, and layers that stay on their block."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from growkit.errors import ConfigError
from growkit.growth.engine import grow
from growkit.growth.path import grown_config
from growkit.growth.state import TrainState
from growkit.models.config import AltUp, ModelConfig
from growkit.models.decoder import build, init_tensor
from growkit.models.spec import param_specs
from tests.support import model_config, probe, trained_like

DEEP = {"num_layers": 4, "mlp_dim": 20}
# What is written directly: nothing is divided or added up anew.
TO_THE_BIT = ("pull", "push", "same")


def grown(source: ModelConfig, fields: dict[str, Any], method: str, dtype: torch.dtype = torch.float32) -> Any:
    """(state before, state after, its certificate)."""
    target = grown_config(source, fields, {"altup": method})
    state = trained_like(source, dtype=dtype)
    result, report = grow(state, target, {"altup": method}, torch.Generator().manual_seed(3), probe(source), stage=1)
    return state, result.materialized(), report.certificate


def logits(state: TrainState, tokens: torch.Tensor) -> torch.Tensor:
    return build(state.config, state.params).eval()(tokens[:, :-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("preset", ["transformer", "tokenformer"])
@pytest.mark.parametrize("variant", ["recycled", "full"])
@pytest.mark.parametrize("method", TO_THE_BIT)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_directly_is_to_the_bit(preset: str, variant: str, method: str, tied: bool) -> None:
    source = model_config(preset, num_layers=4, tied_head=tied)
    state, result, certificate = grown(source, {"altup_blocks": 4, "altup_variant": variant}, method)
    assert torch.equal(logits(state, probe(source)), logits(result, probe(source)))
    assert certificate.exact and certificate.delta_logits_training == 0 and not certificate.dead


@pytest.mark.parametrize("order", ["gemma", "paper", "free"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_recycled_stream_becomes_full_to_the_bit(order: str, tied: bool) -> None:
    source = model_config("transformer", altup_blocks=3, altup_order=order, tied_head=tied, **DEEP)
    state, result, certificate = grown(source, {"altup_variant": "full"}, "clone")
    assert torch.equal(logits(state, probe(source)), logits(result, probe(source)))
    assert result.params["embedding.weight"].shape == (48, 72) and certificate.exact
    with pytest.raises(ConfigError, match=r"grow.altup_variant: got 'recycled'; would drop all parts"):
        grown_config(result.config, {"altup_variant": "recycled"}, {})


BEFORE_AND_METHOD = [
    ({}, "pull", {}),
    ({}, "push", {}),
    ({}, "same", {}),
    ({}, "same", {"altup_coefficients": "routed"}),
    ({}, "copies", {}),
    ({}, "copies", {"altup_order": "free"}),
    ({}, "copies", {"altup_coefficients": "routed"}),
    ({}, "round_robin", {}),
    ({"altup_blocks": 2}, "passive", {}),
    ({"altup_blocks": 2}, "clone", {}),
    ({"altup_blocks": 2, "altup_active": "same"}, "clone", {}),
    ({"altup_blocks": 2, "altup_order": "round_robin"}, "clone", {}),
]


@pytest.mark.parametrize(("before", "method", "more"), BEFORE_AND_METHOD)
@pytest.mark.parametrize("variant", ["recycled", "full"])
def test_no_start_ties_blocks(before: dict[str, Any], method: str, more: dict[str, Any], variant: str) -> None:
    """Nor has it rows that cannot be told apart, or anything dead."""
    source = model_config("transformer", **DEEP, **before)
    *_, certificate = grown(source, {"altup_blocks": 4, "altup_variant": variant} | more, method, torch.float64)
    assert certificate.tied_blocks == () and certificate.locked_rows == 0 and certificate.dead == ()


@pytest.mark.parametrize("content", [1.0, 0.0])
def test_blocks_that_start_alike_beside_one_are_seen_to_be_tied(
    content: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same block, copies (or zeros) that are mixed alike: K = 4 would be K = 2 for ever."""
    from growkit.growth.operators import altup

    start = altup._start

    def alike(growth: Any) -> torch.Tensor:
        value = start(growth)
        if growth.spec.role == "mix":
            value = torch.eye(4, dtype=value.dtype)
        if growth.spec.role == "enter":
            value[1:] = content
        return value

    monkeypatch.setattr(altup, "_start", alike)
    *_, certificate = grown(model_config("transformer", **DEEP), {"altup_blocks": 4}, "same", torch.float64)
    assert certificate.exact and certificate.tied_blocks == ((1, 2), (1, 3), (2, 3))


@pytest.mark.parametrize("order", ["gemma", "paper", "free", "round_robin"])
def test_an_insert_leaves_every_layer_on_its_block(order: str) -> None:
    """And the stack exact: the inserted layer hands all blocks on."""
    source = model_config("transformer", altup_blocks=3, altup_order=order, **DEEP)
    target = grown_config(source, {"num_layers": 6, "insert_at": [0, 1]}, {})
    assert [(layer.id, layer.block) for layer in target.layers] == [(0, 0), (4, 0), (1, 1), (5, 1), (2, 2), (3, 0)]
    state = trained_like(source)
    result, report = grow(state, target, {}, torch.Generator().manual_seed(3), probe(source), stage=1)
    assert report.certificate is not None and report.certificate.exact and not report.certificate.dead
    change = logits(result.materialized(), probe(source)) - logits(state, probe(source))
    assert float(change.norm()) <= 1e-10 * float(logits(state, probe(source)).norm())


def test_a_later_start_takes_turns_over_all_layers() -> None:
    target = grown_config(model_config("transformer", **DEEP), {"num_layers": 6, "altup_blocks": 2}, {})
    assert [layer.block for layer in target.layers] == [0, 1, 0, 1, 0, 1]
    assert target.stream == AltUp(2)


def test_new_coefficients_do_not_decay() -> None:
    from growkit.optim.groups import param_groups

    for fields in ({"altup_blocks": 2}, {"altup_blocks": 2, "altup_order": "free"}, {"altup_stride": 2}):
        specs = param_specs(model_config("transformer", num_layers=3, **fields))
        groups = param_groups(specs, {}, 0, weight_decay=0.1, decay_embedding=True, lr_scale={})
        decayed = {name for group in groups if group.weight_decay for name in group.names}
        mine = {name for name, spec in specs.items() if spec.component == "stream"}
        assert mine and not mine & decayed


def test_a_fresh_stream_is_the_residual_stream_at_first() -> None:
    """Every block holds what the residual stream would, but for the little that mixing is drawn with."""
    source = model_config("transformer", **DEEP)
    for order in ("gemma", "paper", "free", "round_robin"):
        config = model_config("transformer", altup_blocks=3, altup_order=order, **DEEP)
        state = trained_like(source)
        params = dict(state.params)
        for name, spec in param_specs(config).items():
            if spec.component == "stream":
                still = dataclasses.replace(spec, init_std=None)
                params[name] = init_tensor(still, torch.Generator(), torch.float64)
        change = logits(TrainState(config, params), probe(source)) - logits(state, probe(source))
        assert float(change.abs().max()) <= 1e-12
