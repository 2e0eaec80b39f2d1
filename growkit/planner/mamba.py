"""The dry run of the Mamba mixer: growkit/models/mamba.py and ops/selective_scan, booking bytes. No torch here.

Legend: N tokens of a micro-batch, E inner, S states, R dt_rank, W taps; e: bytes of (N, E) as products write it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from growkit.models.config import Mamba
from growkit.ops import tiling
from growkit.ops.chunks import CHUNK
from growkit.planner.activations import FLOAT, Pass, projections
from growkit.planner.ledger import Ledger

# What the loop, which runs where the kernel does not, holds at once in either pass, the chunk before included: tensors
# of (chunk, rows, E, S), and beside them of (chunk, rows, E), with casts of these under autocast. As measured.
LOOP_FORWARD, LOOP_BACKWARD = 5, 6
LOOP_NARROW, LOOP_CASTS = 13, 4


class MambaBlock:
    """``MambaMixer`` with the compiled scan, or Triton's. Reads float32."""

    def __init__(self, at: Pass, spec: Mamba, embed: int, *, lends_gradient: bool) -> None:
        inner, parts = spec.inner, spec.dt_rank + 2 * spec.state
        self.at, self.spec = at, spec
        (self.in_proj,) = projections(at, (spec.in_proj,), embed, (2 * inner,), is_wide=True)
        (self.x_proj,) = projections(at, (spec.x_proj,), inner, (parts,), is_wide=False)
        (self.dt_proj,) = projections(at, (spec.dt_proj,), spec.dt_rank, (inner,), is_wide=False)
        lent = {"is_wide": False, "lends_gradient": lends_gradient}
        (self.out_proj,) = projections(at, (spec.out_proj,), inner, (embed,), **lent)
        self.e, self.parts, self.rank = at.narrow(inner), at.narrow(parts), at.narrow(spec.dt_rank)
        self.before = at.rows * (spec.conv - 1) * inner * at.element  # zeros, in front of the first token
        self.padded = self.before + self.e
        self.biased = self.e if spec.conv_bias else 0.0
        self.A = inner * spec.state * FLOAT
        self.last = at.rows * self.A
        self.kept = -(-at.context // (tiling.KEPT if at.triton else CHUNK)) * self.last
        self.before_y, self.beside_y = 0.0, 0.0
        if at.triton:
            self.beside_y, self.beside_dx = kernel_forward(at, spec), kernel_backward(at, spec)
        else:
            self.before_y, self.beside_dx = (_loop(at, spec, count) for count in (LOOP_FORWARD, LOOP_BACKWARD))
        self.norms = list(_norms(at, spec))

    def forward(self, ledger: Ledger) -> None:
        e = self.e
        self.in_proj.forward(ledger)
        ledger.take(self.before, self.padded, e)
        for _ in range(self.spec.conv - 1):
            ledger.take(e)
            ledger.give(e)
        ledger.passing(self.biased)
        ledger.give(self.before)
        ledger.take(e)  # silu, which saves the sum of the taps
        self.x_proj.forward(ledger)
        for norm in self.norms:
            norm.forward(ledger)
        self.dt_proj.forward(ledger)
        ledger.take(self.A, self.A)  # exp(A_log), −exp(A_log)
        ledger.passing(self.before_y)
        ledger.take(e, self.last, self.kept)
        ledger.passing(self.beside_y)
        self.out_proj.forward(ledger)
        ledger.give(self.last)

    def backward(self, ledger: Ledger) -> None:
        e, states = self.e, self.parts - self.rank
        self.out_proj.backward(ledger)
        ledger.give(e)  # y
        ledger.take(self.last, self.kept)  # zeros: gradients of h_T and of the states kept
        ledger.take(e, e, self.A, states, e)  # of x, Δ, A, B and C, z
        ledger.passing(self.beside_dx)
        ledger.give(e, self.last, self.kept, self.kept, e)  # y's gradient; what the scan saved, and Δ
        ledger.passing(self.A, self.A)
        ledger.give(self.A, self.A, self.A)
        self.dt_proj.backward(ledger)
        for norm in reversed(self.norms):
            norm.backward(ledger)
        ledger.give(self.parts)  # Δ's rank | B | C
        ledger.take(self.parts)
        ledger.give(self.rank, states)
        self.x_proj.backward(ledger)
        ledger.give(e, e)  # the gradients of x add up; x
        ledger.take(e)
        ledger.give(e, e)  # x's gradient, the sum of the taps
        self._taps_back(ledger)
        ledger.give(2 * e)  # x | z
        ledger.take(2 * e)
        ledger.give(e, e)
        self.in_proj.backward(ledger)

    def _taps_back(self, ledger: Ledger) -> None:
        """From the gradient of the sum to that of x, each tap by way of a gradient of the whole padded copy."""
        e = self.e
        for tap in range(self.spec.conv - 1):
            ledger.take(e)
            ledger.passing(e, e)  # the weight's, before it is summed
            ledger.take(self.padded)
            ledger.give(e, self.padded if tap else 0.0)  # added to the others
        ledger.give(self.padded)
        ledger.take(e)
        ledger.passing(e)
        ledger.give(e)
        ledger.give(self.padded if self.spec.conv > 1 else 0.0)


def _loop(at: Pass, spec: Mamba, count: int) -> float:
    """Bytes of a chunk in the loop that holds ``count`` tensors of states; of the kernel none."""
    per_channel = count * spec.state + LOOP_NARROW + (LOOP_CASTS if at.bf16 else 0)
    return at.rows * min(CHUNK, at.context) * spec.inner * per_channel * FLOAT if at.cuda else 0.0


def kernel_forward(at: Pass, spec: Mamba) -> float:
    """Work space of ops/selective_scan/triton.py beside what ``forward`` returns: A, B and C as kernels read them, what
    is handed on between spans, the last state as it comes out of them."""
    over = _spans(at, spec, "forward")
    return _read(at, spec) + 2 * over.states + over.sums + at.rows * spec.inner * spec.state * FLOAT


def kernel_backward(at: Pass, spec: Mamba) -> float:
    """The same of ``backward``, with parts of dB and dC for each block of channels, of dA, dD and the bias's gradient
    for each span, and the states of a block of tokens."""
    over, programs = _spans(at, spec, "backward"), tiling.scan_programs("backward", spec.state, spec.inner, at.rows)
    of_tokens = 2 * programs * at.context * spec.state * FLOAT
    scratch = programs * over.spans * math.prod(tiling.scan_scratch(spec.state)) * FLOAT
    handed_on = 2 * over.states + over.sums if over.spans > 1 else at.rows * spec.inner * spec.state * FLOAT
    gradients = at.rows * over.spans * spec.inner * (spec.state + 2) * FLOAT
    rounded = at.wide(spec.state) if at.bf16 else 0.0  # a sum over blocks, before it is
    return _read(at, spec) + handed_on + of_tokens + gradients + scratch + rounded


class _Spans(NamedTuple):
    """Bytes of a state, and of a number, for each channel of each span; nothing where there is one only."""

    spans: int
    states: float
    sums: float


def _spans(at: Pass, spec: Mamba, name: str) -> _Spans:
    most = tiling.most_spans(name, spec.state, spec.inner, at.rows, at.processors)
    _, count = tiling.scan_spans(at.context, most)
    sums = at.rows * count * spec.inner * FLOAT if count > 1 else 0.0
    return _Spans(count, sums * spec.state, sums)


def _read(at: Pass, spec: Mamba) -> float:
    """A, turned; B and C in float32, where they are parts of wider rows or were narrow."""
    return spec.inner * spec.state * FLOAT + 2 * at.wide(spec.state)


class _InnerNorm:
    """``_normed``. Its output, its input and their gradients are booked by nobody else."""

    def __init__(self, at: Pass, width: int) -> None:
        self.narrow, self.wide, self.statistics = at.narrow(width), at.wide(width), at.wide(1)
        self.copy = self.wide if at.bf16 else 0.0

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.copy)
        ledger.passing(self.wide)  # squares
        ledger.take(self.statistics, self.narrow)
        ledger.passing(self.copy)

    def backward(self, ledger: Ledger) -> None:
        ledger.take(self.copy)
        ledger.passing(self.wide, self.wide, self.wide)
        ledger.give(self.copy, self.copy, self.statistics, self.narrow)


def _norms(at: Pass, spec: Mamba) -> Iterator[_InnerNorm]:
    if spec.inner_norm is not None:
        for width in (spec.dt_rank, spec.state, spec.state):
            yield _InnerNorm(at, width)


def scored(at: Pass, spec: Mamba) -> float:
    """Most bytes of a pass of which nothing is kept: x | z and either the padded copy and two sums of taps, or x, Δ, y
    and what else the scan reads and makes."""
    e = at.narrow(spec.inner)
    state = spec.inner * spec.state * FLOAT
    taps = at.rows * (spec.conv - 1) * spec.inner * at.element
    work = kernel_forward(at, spec) if at.triton else _loop(at, spec, LOOP_FORWARD)
    scan = at.narrow(spec.dt_rank + 2 * spec.state) + (2 + at.rows) * state + work
    return 5 * e + max(2 * taps, scan)
