"""Every operator × family × method keeps the contract (tests/contract.py)."""

from __future__ import annotations

import pytest

from growkit.errors import ConfigError
from growkit.growth.operator import OPERATORS
from growkit.growth.path import grown_config
from tests.contract import Case, cases, check
from tests.support import model_config

CASES = list(cases())


def test_every_operator_and_method_is_covered() -> None:
    """A refused combination is left out; no method may be refused everywhere."""
    covered = {(case.operator, case.method) for case in CASES}
    assert covered == {(name, method) for name, operator in OPERATORS.items() for method in operator.methods}
    assert len(CASES) == 1003


@pytest.mark.parametrize(
    ("method", "before", "after", "stack"),
    [
        ("midas", 6, 8, [0, 1, 2, 3, 2, 3, 4, 5]),
        ("midas", 4, 6, [0, 1, 0, 1, 2, 3]),  # of two blocks in the middle the first
        ("solar", 8, 12, [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]),
        ("solar", 4, 8, [0, 1, 2, 3, 0, 1, 2, 3]),
        ("midas", 4, 4, [0, 1, 2, 3]),
        ("solar", 4, 4, [0, 1, 2, 3]),
    ],
)
def test_which_layers_act_twice(method: str, before: int, after: int, stack: list[int]) -> None:
    source = model_config("transformer", num_layers=before)
    target = grown_config(source, {"num_layers": after, "mlp_dim": 80}, {"depth": method})
    assert [layer.id if layer.id < before else layer.origin for layer in target.layers] == stack


@pytest.mark.parametrize(("method", "after"), [("midas", 10), ("midas", 13), ("solar", 7), ("solar", 13)])
def test_what_does_not_come_out_even_is_refused_with_what_does(method: str, after: int) -> None:
    with pytest.raises(ConfigError, match=r"use .*\b8\b.*\b12\b, or the method identity"):
        grown_config(model_config("transformer", num_layers=6), {"num_layers": after}, {"depth": method})


@pytest.mark.parametrize("case", CASES[::2], ids=str)  # the others: test_growth_contract_too.py
def test_contract(case: Case) -> None:
    check(case)
