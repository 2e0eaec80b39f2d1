"""Pattention on a GPU: a torch op of its own, made of Triton's kernels and plain products.

Forward, for each chunk of rows: one launch multiplies x by the keys of all projections and leaves either scores with
the sums of squares of their rows, or finished weights; then each projection's values are multiplied. ``l2_norm_gelu``
has two ways to its norm:

(i)  sums of squares in the first product's epilogue; scale and GELU then wait for the second product's prologue, which
     computes them once for every block of E.
(ii) from the Gram matrix before the first product: ‖A_t‖² = x_tᵀ (KᵀK) x_t. The epilogue then writes finished weights
     and the second product is a plain one. The matrix enters as a sum of two in x's dtype, because one alone would be
     off by its unit roundoff times Σ|x_i M_ij x_j| / ‖A_t‖², which is large when keys have a direction in common that x
     has not; the two together leave the square of the roundoff.

(ii) costs 4 T D² + 2 n D² of 12 T n D operations and is taken in sixteen bits from n ≥ 4 D and T ≥ 4 D on.
``gelu_l2_norm`` always goes the first way: there GELU comes before the norm, and the prologue is one multiplication.

Backward makes the scores again. Kept are x, keys, values and the sums of squares (T, G); work space is three buffers
(C, N) of a chunk, and sums of weights' gradients in float32. Everything is added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from growkit.errors import ConfigError
from growkit.ops import tiling
from growkit.ops.dispatch import KEY, interpreted
from growkit.ops.pattention import compiled
from growkit.ops.pattention import triton_kernels as kernels
from growkit.ops.pattention import triton_launch as launch
from growkit.ops.pattention.compiled import joined
from growkit.ops.pattention.reference import Tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = interpreted()  # fixed, as it is for the kernels, when they are loaded
OTHERS = "or take auto, compiled or reference"


def pattention(x_TD: Tensor, projections: Sequence[Tokens]) -> list[Tensor]:
    """Same signature and meaning as ``reference.pattention``. x may lie in memory as it will.

    Softmax has no kernels, nor has float64 (in which growth is certified): they take the compiled path's formula.
    Raises ConfigError for dtypes or devices that do not go together, and for tensors on a CPU.
    """
    dtype = x_TD.dtype
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
    if x_TD.dtype == torch.float64:
        return compiled.pattention(x_TD, projections)
    outputs: list[Tensor | None] = [None] * len(projections)
    for theta in dict.fromkeys(tokens.theta for tokens in projections):
        here = [at for at, tokens in enumerate(projections) if tokens.theta == theta]
        run = compiled.pattention if theta == "softmax" else _together
        x = x_TD if theta == "softmax" else x_TD.to(dtype)
        for at, out in zip(here, run(x, [projections[at] for at in here]), strict=True):
            outputs[at] = out
    return [out for out in outputs if out is not None]


def _together(x: Tensor, projections: list[Tokens]) -> list[Tensor]:
    """Projections of one Θ; x in the dtype that is computed in."""
    cast = torch.is_autocast_enabled(x.device.type)
    keys, values, sizes, norms_of = [], [], [], []
    moving, fixed, wanted_keys, wanted_values = [], [], [], []
    for tokens in projections:
        banks = list(zip(tokens.keys, tokens.values, strict=True))
        groups = tokens.groups()
        sizes += [sum(map(len, group)) for group, _, _ in groups]
        norms_of.append(len(groups))
        for _, _, tau in groups:
            moving.append(tau)
            fixed.append(1.0 if isinstance(tau, Tensor) else float(tau))
        keys += [k.to(x.dtype) if cast else k for k, _ in banks]
        values.append([v.to(x.dtype) if cast else v for _, v in banks])
        wanted_keys += [k.requires_grad for k, _ in banks]
        wanted_values += [v.requires_grad for _, v in banks]
    _check(x, [*keys, *(v for each in values for v in each)])
    columns = [len(k) for k in keys]
    taus = None
    if any(isinstance(tau, Tensor) for tau in moving):
        taus = torch.stack([torch.as_tensor(tau, dtype=torch.float32, device=x.device) for tau in moving])
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        outputs, _ = _op(
            flat, joined(keys), [joined(each) for each in values], taus, fixed, sizes, norms_of, projections[0].theta,
            _ranges(columns, wanted_keys), _ranges(columns, wanted_values),
        )  # fmt: skip
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outputs]


def _check(x: Tensor, tensors: list[Tensor]) -> None:
    if not (x.is_cuda or INTERPRETED):
        problem = f"pattention's kernels were given tensors on {x.device}"
        raise ConfigError("no-triton", problem, key=KEY, value="triton", mend=f"move the model to a GPU, {OTHERS}")
    for tensor in tensors:
        if tensor.device != x.device:
            problem = f"pattention's x is on {x.device} and its tokens on {tensor.device}"
            raise ConfigError("mixed-devices", problem, key=KEY, value="triton", mend="move both to one device")
    for tensor in (x, *tensors):
        if tensor.dtype != x.dtype or tensor.dtype not in DTYPES:
            problem = f"pattention's x is {x.dtype} and its tokens {tensor.dtype}"
            mend = "use autocast or one of float32, bfloat16 and float16 for both, " + OTHERS
            raise ConfigError("mixed-dtypes", problem, key=KEY, value="triton", mend=mend)


def _ranges(sizes: list[int], wanted: list[bool]) -> list[int]:
    """[start, stop, start, stop, …] of the columns of banks that are wanted; neighbours are one range."""
    found: list[int] = []
    start = 0
    for size, want in zip(sizes, wanted, strict=True):
        if want and found and found[-1] == start:
            found[-1] = start + size
        elif want:
            found += [start, start + size]
        start += size
    return found


@torch.library.custom_op("growkit::pattention", mutates_args=())
def _op(
    x: Tensor, keys: Tensor, values: list[Tensor], moving: Tensor | None, taus: list[float], sizes: list[int],
    norms_of: list[int], theta: str, wanted_keys: list[int], wanted_values: list[int],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """x (T, D), keys (N, D), values of each projection (n, E) → the output of each (T, E), and ‖·‖² (T, G).

    ``sizes`` (G) and ``norms_of``: see ``triton_launch.plan``. τ is ``moving`` (G) if given, else ``taus`` (G).
    ``wanted_*``: ranges of columns whose gradients will be asked for.
    """
    x, keys, values = _by_rows(x), _by_rows(keys), [_by_rows(v) for v in values]
    plan = _plan(x, sizes, norms_of)
    tau = _taus(tuple(taus), x.device) if moving is None else moving
    outs = [x.new_empty(len(x), v.shape[1]) for v in values]
    squares = x.new_empty(len(x), plan.norms, dtype=torch.float32)
    with _device_of(x):
        ahead = theta == "l2_norm_gelu" and _norms_ahead(x, plan)
        if ahead:
            _gram_squares(x, keys, sizes, norms_of, squares)
        writes, prologue = kernels.SCORES, kernels.SCALE_AND_GELU
        if theta == "gelu_l2_norm":
            writes, prologue = kernels.RAISED, kernels.PLAIN_SCALE
        most = min(len(x), tiling.chunk_rows(plan.width))
        whole = launch.buffer(x, most, plan.width), x.new_empty(most, plan.slots, dtype=torch.float32)
        for rows in _chunks(len(x), plan.width):
            written, partials = (each[: rows.stop - rows.start] for each in whole)
            writes = kernels.FINISHED if ahead else writes
            launch.first_product(plan, x[rows], keys, tau, squares[rows], written, partials, writes.value)
            if not ahead:
                launch.row_sums(plan, partials, squares[rows])
            for at, v in enumerate(values):
                if ahead:
                    torch.mm(written[:, plan.columns[at]], v, out=outs[at][rows])
                else:
                    launch.second_product(plan, at, written, v, tau, squares[rows], outs[at][rows], prologue.value)
    return outs, squares


@torch.library.custom_op("growkit::pattention_backward", mutates_args=())
def _backward_op(
    grads: list[Tensor], x: Tensor, keys: Tensor, values: list[Tensor], squares: Tensor, moving: Tensor | None,
    taus: list[float], sizes: list[int], norms_of: list[int], theta: str, wanted_x: bool, wanted_keys: list[int],
    wanted_values: list[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x (empty if not wanted), keys and values. Rows of banks that are not wanted are 0."""
    x, keys = _by_rows(x), _by_rows(keys)
    grads, values = [_by_rows(grad) for grad in grads], [_by_rows(v) for v in values]
    plan = _plan(x, sizes, norms_of)
    tau = _taus(tuple(taus), x.device) if moving is None else moving
    dx = torch.empty_like(x) if wanted_x else x.new_empty(0)
    d_keys, *d_values = (torch.zeros_like(each, dtype=torch.float32) for each in (keys, *values))
    with _device_of(x):
        most = min(len(x), tiling.chunk_rows(plan.width))
        three = [launch.buffer(x, most, plan.width) for _ in range(3)]
        two = [x.new_empty(most, size, dtype=torch.float32) for size in (plan.slots, plan.norms)]
        for rows in _chunks(len(x), plan.width):
            found = launch.Rows(*(each[: rows.stop - rows.start] for each in (*three, *two)))
            writes = kernels.SCORES.value
            launch.first_product(plan, x[rows], keys, tau, squares[rows], found.scores, found.partials, writes)
            for at, v in enumerate(values):
                launch.score_gradients(plan, at, grads[at][rows], v, tau, squares[rows], found, theta)
                columns = plan.columns[at]
                for start, stop in _within(wanted_values, columns):
                    total = d_values[at][start - columns.start : stop - columns.start]
                    launch.weight_gradient(plan, found.weights[:, start:stop], grads[at][rows], total)
            if not (wanted_x or wanted_keys):
                continue
            launch.settle(plan, tau, squares[rows], found, theta)
            for start, stop in _within(wanted_keys, slice(0, plan.width)):
                launch.weight_gradient(plan, found.direct[:, start:stop], x[rows], d_keys[start:stop])
            if wanted_x:
                torch.mm(found.direct, keys, out=dx[rows])
    return [dx, *(each.to(x.dtype) for each in (d_keys, *d_values))]


def _plan(x: Tensor, sizes: list[int], norms_of: list[int], repeat: int = 1) -> launch.Plan:
    return launch.plan(tuple(sizes), tuple(norms_of), launch.kind(x), x.device, repeat)


def _norms_ahead(x: Tensor, plan: launch.Plan) -> bool:
    """Whether way (ii) is taken."""
    rows, depth = x.shape
    return plan.kind == "narrow" and tiling.norms_ahead(rows, depth, plan.width, plan.norms)


def _gram_squares(x: Tensor, keys: Tensor, sizes: list[int], norms_of: list[int], squares: Tensor) -> None:
    """squares (T, G) of all scores, from x (T, D) and the keys (N, D) alone."""
    depth = x.shape[1]
    plan = _plan(x, [depth] * len(sizes), [len(sizes)], repeat=2)
    parts = []
    for k in torch.split(keys, sizes):
        gram = x.new_zeros(depth, depth, dtype=torch.float32)
        launch.weight_gradient(plan, k, k, gram)
        upper = gram.to(x.dtype)
        parts += [upper, (gram - upper).to(x.dtype)]
    stacked = torch.cat(parts)
    for rows in _chunks(len(x), plan.width):
        partials = x.new_empty(rows.stop - rows.start, plan.slots, dtype=torch.float32)
        # Norms and τ are not read, and nothing is written but partial sums.
        launch.first_product(plan, x[rows], stacked, partials, partials, stacked, partials, kernels.SQUARES.value)
        launch.row_sums(plan, partials, squares[rows])


@cache
def _taus(taus: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: a copy to a GPU waits for all that runs there."""
    return torch.tensor(taus, dtype=torch.float32, device=device)


def _by_rows(tensor: Tensor) -> Tensor:
    """As kernels read it: an element of a row after the other, rows apart."""
    apart = tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[1]
    return tensor if apart else tensor.contiguous()


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = tiling.chunk_rows(width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _within(ranges: list[int], columns: slice) -> Iterator[tuple[int, int]]:
    for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
        start, stop = max(start, columns.start), min(stop, columns.stop)
        if start < stop:
            yield start, stop


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@_op.register_fake
def _(x: Tensor, keys: Tensor, values: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
    sizes = rest[2]
    outs = [x.new_empty(x.shape[0], v.shape[1]) for v in values]
    return outs, x.new_empty(x.shape[0], len(sizes), dtype=torch.float32)


@_backward_op.register_fake
def _(grads: list[Tensor], x: Tensor, keys: Tensor, values: list[Tensor], *rest: Any) -> list[Tensor]:
    wanted_x = rest[6]
    made = [each.new_empty(each.shape) for each in (keys, *values)]
    return [x.new_empty(x.shape) if wanted_x else x.new_empty(0), *made]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, keys, values, moving, *ctx.rest = inputs
    ctx.save_for_backward(x, keys, output[1], moving, *values)


def _differentiate(ctx: Any, grads: list[Tensor], _: Tensor) -> tuple[Any, ...]:
    x, keys, squares, moving, *values = ctx.saved_tensors
    *how, wanted_keys, wanted_values = ctx.rest
    given = (grads, x, keys, values, squares, moving, *how, ctx.needs_input_grad[0], wanted_keys, wanted_values)
    dx, d_keys, *d_values = _backward_op(*given)
    return dx if ctx.needs_input_grad[0] else None, d_keys, d_values, *[None] * 7


_op.register_autograd(_differentiate, setup_context=_keep)


def _under_autocast(x: Tensor, keys: Tensor, values: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return _op(x.to(dtype), keys.to(dtype), [v.to(dtype) for v in values], *rest)


_LIBRARY = torch.library.Library("growkit", "FRAGMENT")  # type: ignore[no-untyped-call]  # rules go when it goes
for _key in ("AutocastCUDA", "AutocastCPU"):
    _LIBRARY.impl("pattention", _under_autocast, _key)  # type: ignore[no-untyped-call]


@register_flop_formula(torch.ops.growkit.pattention)
def _flops(x: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    """Shapes are given for tensors."""
    return 2 * x[0] * (keys[0] * keys[1] + sum(n * width for n, width in values))


@register_flop_formula(torch.ops.growkit.pattention_backward)
def _backward_flops(grads: Any, x: Any, keys: Any, values: Any, *rest: Any, **_: Any) -> int:
    """Of what is asked for; the scores that are made again are not counted, as checkpointed layers are not."""
    wanted_x, wanted_keys, wanted_values = rest[-3:]
    total, start = 0, 0
    for n, width in values:
        columns = sum(stop - start for start, stop in _within(wanted_values, slice(start, start + n)))
        total += (n + columns) * width
        start += n
    columns = sum(stop - start for start, stop in _within(wanted_keys, slice(0, start)))
    return 2 * x[0] * (total + (wanted_x * keys[0] + columns) * keys[1])
