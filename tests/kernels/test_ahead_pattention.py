"""Every variant of Pattention's kernels, compiled for GPUs that are not here: nothing spills, shared memory fits, and
products are matrix instructions. ``make test`` takes those of sixteen bits for one GPU."""

from __future__ import annotations

from typing import Any

import pytest

from growkit.ops.pattention import triton_launch as launch
from growkit.ops.variants import Variant
from tests.kernels.ahead import MOST_SHARED, TARGETS, build

VARIANTS = launch.variants()
PRODUCTS = ("first_product", "second_product", "score_gradients", "weight_gradient")
# Asynchronous ones on sm_90 and sm_100; elsewhere those of a warp.
MATRIX = {"sm_80": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTC\w*MMA", "gfx942": r"\bv_mfma_"}
REGISTERS = 65536  # of an SM
PROGRAMS = {0: 2, 1: 1, 2: 2, 3: 2}  # of the first product that an SM holds: the epilogue of one hides behind another
# Of one element that the epilogue with GELU writes on sm_90, instructions of all kinds, the product's included: so that
# a GELU gone dear is seen. 36 when this was written, of which GELU takes 25.
MOST_INSTRUCTIONS = 40


def kind(variant: Variant) -> str:
    if "BK" not in variant.constants:
        return "none"
    if "*bf16" in variant.types.values():
        return "narrow"
    return str(variant.constants["PRECISION"])


def label(variant: Variant) -> str:
    flags = {name: variant.constants[name] for name in ("WRITES", "PROLOGUE", "THETA") if name in variant.constants}
    return "-".join([variant.name, kind(variant), *(f"{name.lower()}{value}" for name, value in flags.items())])


def cases() -> list[Any]:
    return [
        pytest.param(variant, target, id=f"{target}-{label(variant)}", marks=() if sample else pytest.mark.kernels)
        for target in TARGETS
        for variant in VARIANTS
        for sample in [target == "sm_90" and kind(variant) == "narrow"]
    ]


@pytest.mark.parametrize(("variant", "target"), cases())
def test_compiles_without_spills(variant: Variant, target: str) -> None:
    built = build(variant, target)
    assert built.spilled == 0 and built.registers > 0
    assert built.shared <= MOST_SHARED[target]
    if variant.name in PRODUCTS and (kind(variant) == "narrow" or target == "gfx942"):
        assert built.instructions(MATRIX[target]) > 0
    if variant.name in PRODUCTS and kind(variant) == "tf32":
        assert built.instructions(r"MMA|mfma") > 0
    if variant.name == "first_product" and target == "sm_90" and kind(variant) == "narrow":
        threads = 32 * variant.num_warps
        assert built.registers * threads * PROGRAMS[variant.constants["WRITES"]] <= REGISTERS
        blocks = launch.BLOCKS["narrow"]
        assert len(built.lines) <= MOST_INSTRUCTIONS * blocks.rows * blocks.cols / threads


def test_all_kernels_and_kinds_are_there() -> None:
    assert {variant.name for variant in VARIANTS} == {*PRODUCTS, "row_sums", "settle"}
    assert {kind(variant) for variant in VARIANTS} == {"none", "narrow", "ieee", "tf32"}
    assert len({label(variant) + str(variant.types) for variant in VARIANTS}) == len(VARIANTS)
