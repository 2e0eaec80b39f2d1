"""Every operator × family × method keeps the contract (tests/contract.py)."""

from __future__ import annotations

import pytest

from growkit.growth.operator import OPERATORS
from tests.contract import CLAUSES, Case, cases

CASES = cases()


def test_every_operator_and_method_is_covered() -> None:
    """A refused combination is left out; no method may be refused everywhere."""
    covered = {(case.operator, case.method) for case in CASES}
    assert covered == {(name, method) for name, operator in OPERATORS.items() for method in operator.methods}
    assert len(CASES) == 185


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    for clause in CLAUSES:
        clause(case)
