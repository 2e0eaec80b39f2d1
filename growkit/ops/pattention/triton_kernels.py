"""Pattention's Triton kernels: products with everything elementwise fused into them (docs/kernels.md).

Legend: C rows of a chunk, D input width, E output width, N columns (the parameter tokens of all banks of all
projections, side by side), G norms, S tiles of columns. A tile lies under one norm: ``tiles`` (S, 3) int32 holds its
first column, how many are in it, and its norm, so that banks of any size stand side by side without padding.

Accumulators, statistics and elementwise work are float32, whatever is read. Nothing is summed by atomics: partial sums
of a row go to a place of their own, and one program adds them in order. Sums and floors are written so that a NaN
stays one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

SCORES = tl.constexpr(0)  # a, and partial sums of a²
RAISED = tl.constexpr(1)  # g = gelu(a), and partial sums of g²
FINISHED = tl.constexpr(2)  # gelu(τ a / ‖a‖), the norm known
SQUARES = tl.constexpr(3)  # partial sums of a ⊙ x and no more: xᵀ M x, with symmetric M (several, stacked) as keys

PLAIN_SCALE = tl.constexpr(0)  # τ / ‖g‖ on the way into the second product
SCALE_AND_GELU = tl.constexpr(1)

L2_NORM_GELU = tl.constexpr(0)
GELU_L2_NORM = tl.constexpr(1)


@triton.jit
def _gelu(s):
    """gelu(s) = s Φ(s), and its slope Φ(s) + s φ(s)."""
    e = tl.exp(-0.5 * s * s)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(s))
    tail = ((((0.530702715 * t - 0.726576013) * t + 0.710706870) * t - 0.142248368) * t + 0.127414796) * t * e
    below = tl.where(s < 0.0, tail, 1.0 - tail)
    return s * below, below + s * (0.3989422804014327 * e)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # which multiplies the bits of a bfloat16; in float32 the products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _inverse_norm(squares, FLOOR: tl.constexpr):
    """1 / max(‖·‖, floor) from the sum of squares; ``<`` lets a NaN through, a maximum might not."""
    return 1.0 / tl.sqrt(tl.where(squares < FLOOR * FLOOR, FLOOR * FLOOR, squares))


@triton.jit
def _swizzled(pid, across, down, GROUP: tl.constexpr):
    """(row block, column block) of a program: ``GROUP`` row blocks go together, so that what they read stays in L2."""
    width = GROUP * down
    first = pid // width * GROUP
    size = tl.minimum(across - first, GROUP)
    return first + pid % width % size, pid % width // size


@triton.jit
def _tile(tiles, slot, ALIGNED: tl.constexpr):
    """First column, columns, norm. ``ALIGNED``: all begin and end at multiples of 16, which wide loads need."""
    start, size, norm = tl.load(tiles + 3 * slot), tl.load(tiles + 3 * slot + 1), tl.load(tiles + 3 * slot + 2)
    if ALIGNED:
        start, size = tl.multiple_of(start, 16), tl.multiple_of(size, 16)
    return start, size, norm


@triton.jit
def _product(
    left, left_stride, rows, row_mask, right, right_stride, cols, col_mask, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left[rows] right[cols]ᵀ, both (·, depth) by rows; ``EVEN``: BK divides depth."""
    inner = tl.arange(0, BK)
    lefts = left + rows.to(tl.int64)[:, None] * left_stride + inner[None, :]
    rights = right + cols.to(tl.int64)[None, :] * right_stride + inner[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        if EVEN:
            a = tl.load(lefts, mask=row_mask[:, None], other=0.0)
            b = tl.load(rights, mask=col_mask[None, :], other=0.0)
        else:
            a = tl.load(lefts, mask=row_mask[:, None] & (inner < depth - k)[None, :], other=0.0)
            b = tl.load(rights, mask=col_mask[None, :] & (inner < depth - k)[:, None], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
        lefts += BK
        rights += BK
    return acc


@triton.jit
def first_product(
    x, keys, tiles, taus, squares, written, partials, count, depth, slots, norms, x_stride, keys_stride, written_stride,
    WRITES: tl.constexpr, FLOOR: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """a = x Kᵀ of one chunk, and what ``WRITES`` says of it: x (C, D), keys (N, D), written (C, N), partials (C, S)."""
    block, slot = _swizzled(tl.program_id(0), tl.cdiv(count, BM), slots, GROUP)
    rows = block * BM + tl.arange(0, BM)
    row_mask = rows < count
    start, size, norm = _tile(tiles, slot, ALIGNED)
    inside = tl.arange(0, BN)
    cols = start + inside
    col_mask = inside < size
    a = _product(
        x, x_stride, rows, row_mask, keys, keys_stride, cols, col_mask, depth, BM, BN, BK, EVEN, PRECISION
    )  # fmt: skip
    mask = row_mask[:, None] & col_mask[None, :]
    long_rows = rows.to(tl.int64)
    if WRITES == FINISHED:
        inverse = _inverse_norm(tl.load(squares + long_rows * norms + norm, mask=row_mask, other=1.0), FLOOR)
        a, _ = _gelu(a * (inverse * tl.load(taus + norm))[:, None])
    else:
        summed = a * a
        if WRITES == RAISED:
            a, _ = _gelu(a)
            summed = a * a
        elif WRITES == SQUARES:
            beside = tl.load(x + long_rows[:, None] * x_stride + (cols % depth)[None, :], mask=mask, other=0.0)
            summed = a * beside.to(tl.float32)
        tl.store(partials + long_rows * slots + slot, tl.sum(summed, 1), mask=row_mask)
    if WRITES != SQUARES:
        places = written + long_rows[:, None] * written_stride + cols[None, :]
        tl.store(places, a.to(written.dtype.element_ty), mask=mask)


@triton.jit
def row_sums(partials, tiles, sums, count, slots, norms, BM: tl.constexpr):
    """sums[:, g] = Σ partials over the tiles of norm g, in their order: partials (C, S) → sums (C, G)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < count
    long_rows = rows.to(tl.int64)
    wanted = tl.program_id(1)
    total = tl.zeros((BM,), tl.float32)
    for slot in range(slots):
        if tl.load(tiles + 3 * slot + 2) == wanted:
            total += tl.load(partials + long_rows * slots + slot, mask=row_mask, other=0.0)
    tl.store(sums + long_rows * norms + wanted, total, mask=row_mask)


@triton.jit
def second_product(
    written, values, tiles, taus, squares, out, count, width, first_slot, slots, first_col, norms,
    written_stride, values_stride, out_stride,
    PROLOGUE: tl.constexpr, FLOOR: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = Θ V of one projection, Θ finished on the way in: written (C, N), values (n, E) from column ``first_col`` of
    N on, out (C, E). ``TILE``: columns of a tile, a multiple of BK."""
    block, wide = _swizzled(tl.program_id(0), tl.cdiv(count, BM), tl.cdiv(width, BN), GROUP)
    rows = block * BM + tl.arange(0, BM)
    row_mask = rows < count
    long_rows = rows.to(tl.int64)
    outs = wide * BN + tl.arange(0, BN)
    out_mask = outs < width
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(slots * (TILE // BK)):
        slot = first_slot + step // (TILE // BK)
        skip = step % (TILE // BK) * BK
        start, size, norm = _tile(tiles, slot, ALIGNED)
        here = inner < size - skip
        cols = start + skip + inner
        inverse = _inverse_norm(tl.load(squares + long_rows * norms + norm, mask=row_mask, other=1.0), FLOOR)
        scale = (inverse * tl.load(taus + norm))[:, None]
        mask = row_mask[:, None] & here[None, :]
        w = tl.load(written + long_rows[:, None] * written_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        w = w * scale
        if PROLOGUE == SCALE_AND_GELU:
            w, _ = _gelu(w)
        below = (cols - first_col).to(tl.int64)
        v_mask = here[:, None] & out_mask[None, :]
        v = tl.load(values + below[:, None] * values_stride + outs[None, :], mask=v_mask, other=0.0)
        acc = _dot(w.to(v.dtype), v, acc, PRECISION)
    places = out + long_rows[:, None] * out_stride + outs[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


@triton.jit
def _half_gradients(dw, scores, weights, direct, places, cols, size, row_mask, inverse, tau, THETA: tl.constexpr):
    """What ``score_gradients`` writes of half a tile; what it sums, (BM,)."""
    places = places + cols[None, :]
    mask = row_mask[:, None] & (cols < size)[None, :]
    a = tl.load(scores + places, mask=mask, other=0.0).to(tl.float32)
    scale = (inverse * tau)[:, None]
    if THETA == L2_NORM_GELU:
        w, slope = _gelu(a * scale)
        turned = dw * slope
        summed = a * turned
    else:
        raised, slope = _gelu(a)
        w = raised * scale
        turned = dw * slope
        summed = raised * dw
    narrow = weights.dtype.element_ty
    tl.store(weights + places, w.to(narrow), mask=mask)
    tl.store(direct + places, (turned * scale).to(narrow), mask=mask)
    return tl.sum(summed, 1) * inverse


@triton.jit
def score_gradients(
    grad, values, scores, tiles, taus, squares, weights, direct, partials,
    count, width, first_slot, here_slots, slots, first_col, norms, grad_stride, values_stride, scores_stride,
    THETA: tl.constexpr, FLOOR: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dw = dout Vᵀ of one projection, and with it half of the way to da; ``settle`` goes the other half.

    Of scores a, (C, N) like all that is written. With u = a/‖a‖ (``gelu_l2_norm``: gelu(a) over its norm):
    ``l2_norm_gelu``: weights gelu(τu), direct τ/‖a‖ · ds, partials Σ u ds over a tile, ds = dw gelu'(τu);
    ``gelu_l2_norm``: weights τu, direct τ/‖gelu(a)‖ · dw gelu'(a), partials Σ u dw.
    """
    block, slot = _swizzled(tl.program_id(0), tl.cdiv(count, BM), here_slots, GROUP)
    slot += first_slot
    rows = block * BM + tl.arange(0, BM)
    row_mask = rows < count
    start, size, norm = _tile(tiles, slot, ALIGNED)
    inside = tl.arange(0, BN)
    cols = start + inside
    col_mask = inside < size
    dw = _product(
        grad, grad_stride, rows, row_mask, values, values_stride, cols - first_col, col_mask, width,
        BM, BN, BK, EVEN, PRECISION,
    )  # fmt: skip
    long_rows = rows.to(tl.int64)
    tau = tl.load(taus + norm)
    inverse = _inverse_norm(tl.load(squares + long_rows * norms + norm, mask=row_mask, other=1.0), FLOOR)
    # In halves: a whole tile of scores beside the accumulator would spill registers.
    left, right = tl.split(dw.reshape(BM, 2, BN // 2).permute(0, 2, 1))
    half = tl.arange(0, BN // 2)
    places = long_rows[:, None] * scores_stride + start
    total = _half_gradients(left, scores, weights, direct, places, half, size, row_mask, inverse, tau, THETA)
    tl.debug_barrier()
    half += BN // 2
    total += _half_gradients(right, scores, weights, direct, places, half, size, row_mask, inverse, tau, THETA)
    tl.store(partials + long_rows * slots + slot, total, mask=row_mask)


@triton.jit
def settle(
    scores, direct, tiles, taus, squares, sums, count, norms, scores_stride,
    THETA: tl.constexpr, FLOOR: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """da, in ``direct``'s place: less τ/‖·‖ · sums · u (``gelu_l2_norm``: · u gelu'(a)). At the floor the scale is a
    constant, so nothing is subtracted."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < count
    long_rows = rows.to(tl.int64)
    start, size, norm = _tile(tiles, tl.program_id(1), ALIGNED)
    inside = tl.arange(0, BN)
    mask = row_mask[:, None] & (inside < size)[None, :]
    at = tl.load(squares + long_rows * norms + norm, mask=row_mask, other=1.0)
    row_sum = tl.load(sums + long_rows * norms + norm, mask=row_mask, other=0.0)
    inverse = _inverse_norm(at, FLOOR)
    share = tl.where(at < FLOOR * FLOOR, 0.0, inverse * inverse * tl.load(taus + norm) * row_sum)[:, None]
    places = long_rows[:, None] * scores_stride + (start + inside)[None, :]
    along = tl.load(scores + places, mask=mask, other=0.0).to(tl.float32)
    if THETA == GELU_L2_NORM:
        raised, slope = _gelu(along)
        along = raised * slope
    plain = tl.load(direct + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(direct + places, (plain - share * along).to(direct.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    left, right, total, count, height, width, left_stride, right_stride, total_stride,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """total += leftᵀ right of one chunk: left (C, n), right (C, E), total (n, E) in float32, so that a sum over chunks
    is rounded once."""
    block, wide = _swizzled(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), GROUP)
    cols = block * BM + tl.arange(0, BM)
    outs = wide * BN + tl.arange(0, BN)
    col_mask, out_mask = cols < height, outs < width
    inner = tl.arange(0, BK).to(tl.int64)
    lefts = left + inner[None, :] * left_stride + cols[:, None]
    rights = right + inner[:, None] * right_stride + outs[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, count, BK):
        here = inner < count - k
        a = tl.load(lefts, mask=col_mask[:, None] & here[None, :], other=0.0)
        b = tl.load(rights, mask=here[:, None] & out_mask[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
        lefts += BK * left_stride
        rights += BK * right_stride
    places = total + cols.to(tl.int64)[:, None] * total_stride + outs[None, :]
    mask = col_mask[:, None] & out_mask[None, :]
    tl.store(places, tl.load(places, mask=mask, other=0.0) + acc, mask=mask)
