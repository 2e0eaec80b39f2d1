"""The scan's kernels compiled for GPUs that are not there: nothing spills, shared memory fits, and the instructions a
state takes are known."""

from __future__ import annotations

import pytest
import torch

from growkit.ops.selective_scan import triton
from growkit.ops.variants import Variant
from tests.kernels.ahead import MOST_SHARED, TARGETS, build, of_a_state

# Instructions of the innermost loop for each state of each token at N = 16, bfloat16, with all but documents, sm_90:
# those of today and a tenth at most, so that it is seen if a compiler or a change makes it worse.
MOST_FORWARD = 10.0  # 9.3; five are the recurrence itself
MOST_BACKWARD = 42.6  # 38.8: some eight for the states made again first, the others for the way back
EVERY = list(triton.variants())
WHOLE = [v for v in EVERY if v.constants["N"] == 16 and v.types.get("x", v.types.get("dt", "*bf16")) == "*bf16"]
SAMPLE = [(v, "sm_90") for v in WHOLE if None not in v.constants.values()]
SAMPLE += [(v, target) for v in WHOLE[:2] for target in TARGETS if (v, target) not in SAMPLE]


def label(case: object) -> str:
    if not isinstance(case, Variant):
        return str(case)
    narrow = case.types.get("x", case.types.get("dt", ""))[1:]
    return f"{case.name}-{narrow}-N{case.constants['N']}{'-least' if None in case.constants.values() else ''}"


def check(variant: Variant, target: str) -> None:
    built = build(variant, target)
    assert built.spilled == 0, f"{built.spilled} spilled, {built.registers} registers"
    assert built.shared <= MOST_SHARED[target]


@pytest.mark.parametrize(("variant", "target"), SAMPLE, ids=label)
def test_a_sample_does_not_spill(variant: Variant, target: str) -> None:
    check(variant, target)


@pytest.mark.kernels
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", EVERY, ids=label)
def test_nothing_spills(variant: Variant, target: str) -> None:
    check(variant, target)


@pytest.mark.parametrize(("name", "most"), [("forward", MOST_FORWARD), ("backward", MOST_BACKWARD)])
def test_instructions_of_a_state(name: str, most: float) -> None:
    found = of_a_state(name, 16, torch.bfloat16, "sm_90", ("starts",))
    assert found is not None, "the loops over tokens were not recognised"
    assert most / 2 < found <= most


def test_a_kernel_that_spills_is_seen() -> None:
    """What is not offered: the states of four tokens in registers."""
    variant = triton.variant("backward", 16, torch.bfloat16)
    built = build(variant._replace(constants=variant.constants | {"U": 4}), "sm_90")
    assert built.spilled > 0
