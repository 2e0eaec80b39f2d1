"""Several axes grown in one stage: one chain in canonical order, certified as a whole and link by link."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch

from growkit.errors import ConfigError, PreservationError
from growkit.growth.engine import GrowthReport, grow, lazy_states
from growkit.growth.operator import EXACT_FLOAT64, OPERATORS, Exactness
from growkit.growth.path import grown_config, operator, order, path
from growkit.models.config import ModelConfig
from growkit.train.display import growth_table
from tests import contract
from tests.support import model_config, probe, trained_like

EVERYTHING: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "transformer": (
        {"num_layers": 4, "embed_dim": 48, "mlp_dim": 96, "num_heads": 4, "head_dim": 24, "vocab_size": 57},
        {"width": "clone_noise"},
    ),
    "tokenformer": (
        {"num_layers": 3, "embed_dim": 32, "num_heads": 4, "head_dim": 24, "attention_tokens": 15, "mlp_tokens": 20}
        | {"vocab_size": 57},
        {},
    ),
}


def grown(
    preset: str, fields: dict[str, Any], methods: dict[str, str], dtype: torch.dtype, *, tied: bool = True
) -> GrowthReport:
    source = model_config(preset, tied_head=tied)
    target = grown_config(source, fields, methods)
    state = trained_like(source, dtype=dtype)
    _, report = grow(state, target, methods, torch.Generator().manual_seed(1), probe(source))
    return report


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", EVERYTHING)
def test_every_axis_at_once_is_exact_as_a_whole_and_link_by_link(preset: str, tied: bool) -> None:
    fields, methods = EVERYTHING[preset]
    report = grown(preset, fields, methods, torch.float64, tied=tied)
    names = [link.operator for link in report.links]
    assert names == [name for name in order() if name in names] and len(names) >= 5
    assert len(report.deltas) == len(names) and all(delta <= EXACT_FLOAT64 for delta in report.deltas)
    certificate = report.certificate
    assert certificate is not None and certificate.exact and certificate.delta_logits_float64 <= EXACT_FLOAT64
    assert not certificate.dead and certificate.locked_rows == 0
    assert [link["delta_logits_float64"] for link in report.record()["links"]] == list(report.deltas)


def test_a_chain_that_is_not_exact_says_which_link_is_not() -> None:
    report = grown("transformer", {"num_layers": 4, "mlp_dim": 96}, {"depth": "stack"}, torch.float32)
    assert report.certificate is not None and not report.certificate.exact
    stacked, widened = report.deltas
    assert stacked > 0.1 and widened <= EXACT_FLOAT64
    event = {"name": "next"} | report.record()
    column = list(growth_table(event).columns[0].cells)
    assert column == ["depth (stack)", "mlp (zero_down)", "together"]


def test_a_false_claim_is_found_beside_links_that_claim_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain's own certificate is not exact already, and would let it pass."""
    fields, methods = {"num_layers": 4, "embed_dim": 32}, {"depth": "stack"}
    source = model_config("transformer", norm="layernorm")
    target = grown_config(source, fields, methods)
    claims = [link.exactness.kind for link in path(source, target, methods)]
    assert claims == ["not", "not"]
    kind = type(OPERATORS.get("width", key=""))
    monkeypatch.setattr(kind, "exactness", lambda *_: Exactness("exact", "it is not"))
    with pytest.raises(PreservationError, match=r"width \(pad\): it is not"):
        grow(trained_like(source), target, methods, torch.Generator(), probe(source))


def test_one_link_has_the_certificates_own_number() -> None:
    report = grown("transformer", {"num_layers": 3}, {}, torch.float64)
    assert report.certificate is not None and report.deltas == (report.certificate.delta_logits_float64,)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_at_the_mean_take_no_more_than_their_number(tied: bool) -> None:
    """e to a mean of logits is at most the mean of their e's: the loss rises by log(all / old) at most, and a hair for
    the noise. Tokens of an untrained model can take far more."""
    report = {
        method: grown("transformer", {"vocab_size": 96}, {"vocab": method}, torch.float64, tied=tied)
        for method in ("mean", "fresh")
    }
    rise = {method: one.certificate.delta_loss for method, one in report.items() if one.certificate is not None}
    assert 0 < rise["mean"] <= math.log(96 / 48) * 1.01
    assert all(one.deltas[0] <= EXACT_FLOAT64 for one in report.values())


Single = tuple[str, str, dict[str, Any]]  # operator, method, sizes


@cache
def singles(family: str) -> tuple[ModelConfig, list[Single]]:
    """A model of a family, with several banks where it has any, and what can be done to it."""
    source = model_config(**contract.FAMILIES[family])
    try:
        source = grown_config(source, contract.BEFORE["consolidate"], {})
    except ConfigError:
        assert "attention_tokens" not in contract.FAMILIES[family]
    found = []
    for name in OPERATORS:
        for method, fields in itertools.product(operator(name).methods, contract.TARGETS[name]):
            with suppress(ConfigError):
                grown_config(source, fields, {name: method})
                found.append((name, method, fields))
    return source, found


def pairs() -> dict[str, tuple[ModelConfig, Single, Single]]:
    """Two operators, each by any of its methods, of which one looks before it grows or comes in under a mask: each
    pair in the first family that can be grown so."""

    def special(one: Single) -> bool:
        return one[1] in ("masked", "annealed") or one[1] in operator(one[0]).looks

    found: dict[str, tuple[ModelConfig, Single, Single]] = {}
    for family in contract.FAMILIES:
        source, ways = singles(family)
        for one, other in itertools.combinations(ways, 2):
            name = f"{one[0]}:{one[1]}+{other[0]}:{other[1]}"
            if name not in found and one[0] != other[0] and (special(one) or special(other)):
                with suppress(ConfigError):
                    grown_config(source, one[2] | other[2], dict([one[:2], other[:2]]))
                    found[name] = source, one, other
    return found


PAIRS = pairs()


@pytest.mark.parametrize("pair", PAIRS)
def test_two_at_once_grow_as_they_claim(pair: str) -> None:
    """What claims to be exact is; nothing else is looked at of these, there are many."""
    source, one, other = PAIRS[pair]
    methods = dict([one[:2], other[:2]])
    target = grown_config(source, one[2] | other[2], methods)
    links, tokens = path(source, target, methods), probe(source)
    states = lazy_states(trained_like(source), links, torch.Generator().manual_seed(1), stage=1, probe=tokens)
    result = states[-1].materialized()
    moved = contract.relative_change(contract.logits_before(source, torch.float64), result, tokens)
    assert result.config == target
    assert moved <= EXACT_FLOAT64 or {link.exactness.kind for link in links} != {"exact"}, moved
    for name, tensor in result.params.items():
        assert tensor.isfinite().all(), name
    for name, moments in result.moments.items():
        assert moments.exp_avg.shape == moments.exp_avg_sq.shape == result.params[name].shape
        assert moments.exp_avg.isfinite().all() and (moments.exp_avg_sq >= 0).all(), name
