"""The other half of the contract's cases: a file is run by one worker, and all of them would keep it longest."""

from __future__ import annotations

import pytest

from tests.contract import Case, check
from tests.test_growth_contract import CASES


@pytest.mark.parametrize("case", CASES[1::2], ids=str)
def test_contract(case: Case) -> None:
    check(case)
