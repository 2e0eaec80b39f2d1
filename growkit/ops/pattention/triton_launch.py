"""How Pattention's kernels are launched: blocks, tiles of columns, chunks of rows, and a function for each kernel.

Legend: T tokens, C rows of a chunk, D input width, E output width, N columns, n columns of a projection, G norms,
S tiles.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from growkit.ops import tiling
from growkit.ops.pattention import triton_kernels as kernels
from growkit.ops.pattention.reference import NORM_FLOOR
from growkit.ops.variants import Variant

GROUP = 8  # row blocks that go together, see triton_kernels._swizzled
SUM_ROWS, SETTLE_ROWS = 128, 32
THETAS = {"l2_norm_gelu": kernels.L2_NORM_GELU.value, "gelu_l2_norm": kernels.GELU_L2_NORM.value}
FLOAT32 = ("taus", "squares", "partials", "sums", "total")  # arguments that are so whatever is computed in


class Blocks(NamedTuple):
    """What a program of a product works on, and how it is compiled."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# By what is multiplied, and how. Sixteen bits go through matrix instructions: with eight warps 128 × 128 takes 64
# registers of a thread for the accumulator; 128 × 256 spills. Float32 as float32 is bound by arithmetic.
BLOCKS = {
    "narrow": Blocks(128, tiling.COLUMNS["narrow"], 64, 8, 3),
    "ieee": Blocks(64, tiling.COLUMNS["ieee"], 16, 4, 2),
    "tf32": Blocks(64, tiling.COLUMNS["tf32"], 32, 4, 2),
}


class Plan(NamedTuple):
    """Where things lie among the N columns of a call, and how its kernels are made."""

    kind: str  # of BLOCKS
    aligned: bool  # every norm's columns begin and end at a multiple of tiling.ALIGN
    tiles: Tensor  # (S, 3), see triton_kernels
    norms: int  # G
    columns: tuple[slice, ...]  # of each projection
    slots_of: tuple[slice, ...]  # the same among the tiles

    @property
    def blocks(self) -> Blocks:
        return BLOCKS[self.kind]

    @property
    def slots(self) -> int:
        return len(self.tiles)

    @property
    def width(self) -> int:
        return int(self.columns[-1].stop)


@cache
def plan(sizes: tuple[int, ...], norms_of: tuple[int, ...], kind: str, device: torch.device, repeat: int = 1) -> Plan:
    """``sizes``: columns under each norm. ``norms_of``: how many norms each projection has. ``repeat``: each norm's
    columns stand there as often, one after the other."""
    cols = BLOCKS[kind].cols
    table: list[tuple[int, int, int]] = []
    columns, slots_of = [], []
    start = norm = 0
    for norms in norms_of:
        first, first_slot = start, len(table)
        for size in sizes[norm : norm + norms]:
            for _ in range(repeat):
                table += [(start + at, min(cols, size - at), norm) for at in range(0, size, cols)]
                start += size
            norm += 1
        columns.append(slice(first, start))
        slots_of.append(slice(first_slot, len(table)))
    tiles = torch.tensor(table, dtype=torch.int32, device=device)
    aligned = all(size % tiling.ALIGN == 0 for size in sizes)
    return Plan(kind, aligned, tiles, norm, tuple(columns), tuple(slots_of))


def kind(x: Tensor) -> str:
    """Float32 is multiplied as torch multiplies it."""
    if x.dtype != torch.float32:
        return "narrow"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def buffer(like: Tensor, rows: int, width: int) -> Tensor:
    return like.new_empty(rows, tiling.padded(width))[:, :width]


def variant(name: str, kind: str, **flags: Any) -> Variant:
    """A kernel as it is launched. ``flags``: its constants that are not sizes of blocks."""
    kernel = getattr(kernels, name)
    blocks, element = BLOCKS[kind], "bf16" if kind == "narrow" else "fp32"
    flags["PRECISION"] = "tf32" if kind == "tf32" else "ieee"  # of no meaning in sixteen bits
    sizes = {"BM": blocks.rows, "BN": blocks.cols, "BK": blocks.depth, "TILE": blocks.cols, "GROUP": GROUP}
    warps, stages = blocks.warps, blocks.stages
    if name in ("row_sums", "settle"):
        sizes["BM"], warps, stages = (SUM_ROWS if name == "row_sums" else SETTLE_ROWS), 4, 1
    given = {**sizes, "FLOOR": NORM_FLOOR, **flags}
    constants = {each: value for each, value in given.items() if each in kernel.arg_names}
    types = {each: _type(each, element) for each in kernel.arg_names if each not in constants}
    divisible = tuple(each for each, kind in types.items() if kind[0] == "*" or each.endswith(("_stride", "depth")))
    return Variant(name, kernel, types, constants, divisible, num_warps=warps, num_stages=stages)


def _type(name: str, element: str) -> str:
    if name == "tiles":
        return "*i32"
    if name in FLOAT32:
        return "*fp32"
    tensors = ("x", "keys", "values", "grad", "scores", "written", "weights", "direct", "out", "left", "right")
    return f"*{element}" if name in tensors else "i32"


def variants() -> list[Variant]:
    """All that is ever launched for sizes that are multiples of 16; others differ in masks."""
    found = []
    for kind in BLOCKS:
        writes = (kernels.SCORES, kernels.RAISED, *((kernels.FINISHED, kernels.SQUARES) if kind == "narrow" else ()))
        found += [variant("first_product", kind, ALIGNED=True, EVEN=True, WRITES=each.value) for each in writes]
        for prologue in (kernels.PLAIN_SCALE, kernels.SCALE_AND_GELU):
            found.append(variant("second_product", kind, ALIGNED=True, PROLOGUE=prologue.value))
        for theta in THETAS.values():
            found.append(variant("score_gradients", kind, ALIGNED=True, EVEN=True, THETA=theta))
            if kind != "tf32":  # no product: as in float32
                found.append(variant("settle", kind, ALIGNED=True, THETA=theta))
        found.append(variant("weight_gradient", kind))
    found.append(variant("row_sums", "narrow"))
    return found


def _launch(grid: tuple[int, ...], plan: Plan, name: str, arguments: tuple[Any, ...], **flags: Any) -> None:
    found = variant(name, plan.kind, ALIGNED=plan.aligned, **flags)
    warps = found.num_warps if torch.version.hip is None else max(1, found.num_warps // 2)  # AMD's have 64 threads
    how = {"num_warps": warps, "num_stages": found.num_stages, "enable_fp_fusion": found.fp_fusion}
    found.kernel[grid](*arguments, **found.constants, **how)


def _even(plan: Plan, size: int) -> bool:
    return size % plan.blocks.depth == 0


def first_product(
    plan: Plan, x: Tensor, keys: Tensor, taus: Tensor, squares: Tensor, written: Tensor, partials: Tensor, writes: Any
) -> None:
    """x (C, D), keys (N, D), squares (C, G); written (C, N), partials (C, S): see triton_kernels."""
    blocks = plan.blocks
    grid = (triton.cdiv(len(x), blocks.rows) * plan.slots,)
    sizes = (len(x), x.shape[1], plan.slots, plan.norms, x.stride(0), keys.stride(0), written.stride(0))
    tensors = (x, keys, plan.tiles, taus, squares, written, partials)
    _launch(grid, plan, "first_product", (*tensors, *sizes), WRITES=writes, EVEN=_even(plan, x.shape[1]))


def row_sums(plan: Plan, partials: Tensor, sums: Tensor) -> None:
    """partials (C, S) → sums (C, G)."""
    grid = (triton.cdiv(len(sums), SUM_ROWS), plan.norms)
    _launch(grid, plan, "row_sums", (partials, plan.tiles, sums, len(sums), plan.slots, plan.norms))


def second_product(
    plan: Plan, at: int, written: Tensor, values: Tensor, taus: Tensor, squares: Tensor, out: Tensor, prologue: Any
) -> None:
    """Of projection ``at``: written (C, N), values (n, E), squares (C, G) → out (C, E)."""
    blocks, slots = plan.blocks, plan.slots_of[at]
    grid = (triton.cdiv(len(out), blocks.rows) * triton.cdiv(out.shape[1], blocks.cols),)
    here = (slots.start, slots.stop - slots.start, plan.columns[at].start, plan.norms)
    sizes = (len(out), out.shape[1], *here, written.stride(0), values.stride(0), out.stride(0))
    tensors = (written, values, plan.tiles, taus, squares, out)
    _launch(grid, plan, "second_product", (*tensors, *sizes), PROLOGUE=prologue)


class Rows(NamedTuple):
    """Buffers of backward for a chunk, see ``triton_kernels.score_gradients``."""

    scores: Tensor  # (C, N)
    weights: Tensor
    direct: Tensor  # in the end da
    partials: Tensor  # (C, S)
    sums: Tensor  # (C, G)


def score_gradients(
    plan: Plan, at: int, grad: Tensor, values: Tensor, taus: Tensor, squares: Tensor, buffers: Rows, theta: str
) -> None:
    """Of projection ``at``: grad (C, E), values (n, E), squares (C, G)."""
    blocks, slots = plan.blocks, plan.slots_of[at]
    here_slots = slots.stop - slots.start
    grid = (triton.cdiv(len(grad), blocks.rows) * here_slots,)
    here = (slots.start, here_slots, plan.slots, plan.columns[at].start, plan.norms)
    sizes = (len(grad), grad.shape[1], *here, grad.stride(0), values.stride(0), buffers.scores.stride(0))
    written = (buffers.weights, buffers.direct, buffers.partials)
    tensors = (grad, values, buffers.scores, plan.tiles, taus, squares, *written)
    _launch(grid, plan, "score_gradients", (*tensors, *sizes), THETA=THETAS[theta], EVEN=_even(plan, grad.shape[1]))


def settle(plan: Plan, taus: Tensor, squares: Tensor, buffers: Rows, theta: str) -> None:
    """``buffers.direct`` becomes da; squares (C, G)."""
    row_sums(plan, buffers.partials, buffers.sums)
    grid = (triton.cdiv(len(squares), SETTLE_ROWS), plan.slots)
    tensors = (buffers.scores, buffers.direct, plan.tiles, taus, squares, buffers.sums)
    sizes = (len(squares), plan.norms, buffers.scores.stride(0))
    _launch(grid, plan, "settle", (*tensors, *sizes), THETA=THETAS[theta])


def weight_gradient(plan: Plan, left: Tensor, right: Tensor, total: Tensor) -> None:
    """total (n, E), float32, += leftᵀ right: left (C, n), right (C, E)."""
    blocks = plan.blocks
    grid = (triton.cdiv(left.shape[1], blocks.rows) * triton.cdiv(right.shape[1], blocks.cols),)
    strides = (left.stride(0), right.stride(0), total.stride(0))
    _launch(grid, plan, "weight_gradient", (left, right, total, len(left), *total.shape, *strides))
