"""What a forward and a backward pass hold, without running them: the model's code, booking bytes. No torch here.

Each block follows its namesake in growkit/models and growkit/ops line by line: ``forward`` takes what it makes and
gives what nobody keeps; ``backward`` takes gradients and gives what ``forward`` left saved. A block's input is booked
by who made it. When ``backward`` begins, the gradient of the block's output is alive; when it ends, that is gone and
the gradient of its input is there. tests/test_planner_memory.py holds all of this to measured allocations.

Legend: N tokens of a micro-batch, D embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from growkit.models.config import DenseMLP, Norm, Pattention, Projection
from growkit.ops import tiling
from growkit.ops.chunks import chunk_rows
from growkit.planner.ledger import Ledger

FLOAT = 4  # bytes of a float32: weights, gradients, moments, the residual stream, statistics, logits in the loss
BFLOAT = 2
INDEX = 8  # bytes of a token


@dataclass(frozen=True)
class Pass:
    """One micro-batch: ``rows`` sequences of ``context`` tokens. ``bf16``: matrix products under autocast.

    ``cuda``: a GPU, which draws narrower dropout masks and takes softmax in float32 under autocast.
    ``adds_gradients``: to those of earlier micro-batches, in place, so that a new one lives only until it is added.
    ``triton``: with Triton's kernels, on so many ``processors`` of a GPU, which the scan's spans fill.
    """

    rows: int
    context: int
    bf16: bool = False
    checkpoint_layers: bool = False
    chunk_tokens: int = 0
    z_loss: bool = False
    cuda: bool = False
    adds_gradients: bool = False
    triton: bool = False
    processors: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    @property
    def element(self) -> int:
        """Bytes of an entry that a matrix product reads or writes."""
        return BFLOAT if self.bf16 else FLOAT

    def narrow(self, width: float) -> float:
        """Bytes of (N, width) as matrix products write it."""
        return self.tokens * width * self.element

    def wide(self, width: float) -> float:
        """Bytes of (N, width) in float32."""
        return self.tokens * width * FLOAT


class Block(Protocol):
    def forward(self, ledger: Ledger) -> None: ...
    def backward(self, ledger: Ledger) -> None: ...


class Weights:
    """``entries`` of weights that products read. Autocast's copies of them are saved until backward."""

    def __init__(self, at: Pass, entries: float) -> None:
        self.cast = entries * BFLOAT if at.bf16 else 0.0
        self.gradient = entries * FLOAT
        self.added = self.gradient if at.adds_gradients else 0.0

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.cast)

    def product(self, ledger: Ledger) -> None:
        """The gradient as a product writes it."""
        ledger.take(self.cast or self.gradient)

    def backward(self, ledger: Ledger) -> None:
        """Under autocast, cast to the weights' float32; then kept, or added to what is there."""
        if self.cast:
            ledger.take(self.gradient)
            ledger.give(self.cast, self.cast)
        ledger.give(self.added)


class Input:
    """What products read. In float32 that is what its maker saved; a float32 input under autocast is cast first."""

    def __init__(self, at: Pass, width: int, *, is_wide: bool) -> None:
        self.size, self.wide = at.narrow(width), at.wide(width)
        self.cast = self.size if at.bf16 and is_wide else 0.0

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.cast)

    def backward(self, ledger: Ledger) -> None:
        """The cast is gone, and its gradient is cast back."""
        if self.cast:
            ledger.give(self.cast)
            ledger.take(self.wide)
            ledger.give(self.size)


class NormBlock:
    """models/norm.py over ``count`` vectors of ``dim`` for every token, in float32. The caller gives the output."""

    def __init__(self, at: Pass, norm: Norm, dim: int, count: int = 1) -> None:
        self.whole = at.wide(dim * count)
        self.holds_input = norm.kind != "rmsnorm"  # ours saves the normed input, PyTorch's LayerNorm the input itself
        self.statistics = at.wide(count) * (2 if self.holds_input else 1)

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.statistics, self.whole)
        if not self.holds_input:
            ledger.take(self.whole)

    def backward(self, ledger: Ledger) -> None:
        if not self.holds_input:
            ledger.take(self.whole)  # gradient ⊙ normed
        ledger.take(self.whole)
        if not self.holds_input:
            ledger.give(self.whole)
        ledger.give(self.whole, self.whole, self.statistics)  # the output's gradient, what was saved


class LinearBlock:
    """F.linear. ``lends_gradient``: that of its output belongs to the residual stream, which goes on holding it."""

    def __init__(self, at: Pass, inp: int, out: int, *, is_wide: bool, lends_gradient: bool = False) -> None:
        self.input, self.weights = Input(at, inp, is_wide=is_wide), Weights(at, inp * out)
        self.out = at.narrow(out)
        self.out_gradient = 0.0 if lends_gradient else self.out

    def forward(self, ledger: Ledger) -> None:
        self.input.forward(ledger)
        self.weights.forward(ledger)
        ledger.take(self.out)

    def backward(self, ledger: Ledger) -> None:
        ledger.take(self.input.size)
        self.weights.product(ledger)
        ledger.give(self.out_gradient)
        self.weights.backward(ledger)
        self.input.backward(ledger)


class Together:
    """The tokens of all projections of one x as one product."""

    def __init__(
        self,
        at: Pass,
        specs: Sequence[Pattention],
        inp: int,
        outs: Sequence[int],
        *,
        is_wide: bool,
        lends_gradient: bool,
    ) -> None:
        self.input = Input(at, inp, is_wide=is_wide)
        self.outs = [at.narrow(out) for out in outs]
        self.out_gradients = [] if lends_gradient else self.outs
        self.width = sum(spec.tokens for spec in specs)
        self.norms = [size for spec in specs for size in (spec.banks if spec.scope == "bank" else (spec.tokens,))]
        self.keys = Weights(at, inp * self.width)
        self.values = [Weights(at, out * spec.tokens) for spec, out in zip(specs, outs, strict=True)]


class FusedTokens(Together):
    """ops/pattention/compiled.py, ``_NormGelu``."""

    def __init__(self, at: Pass, specs: Sequence[Pattention], inp: int, outs: Sequence[int], **how: bool) -> None:
        super().__init__(at, specs, inp, outs, **how)
        width, norms = self.width, self.norms
        self.scores = at.narrow(width)
        rows = chunk_rows(at.tokens, at.element * width, at.cuda)
        share = rows / at.tokens  # what is not kept is there for these rows only
        self.work, self.several, self.many = share * self.scores, rows < at.tokens, 2 * rows < at.tokens
        moving = any(spec.tau_from is not None for spec in specs)  # a τ that moves is each projection's own
        alike = len(set(norms)) == 1 and len({tau for spec in specs for tau in spec.taus}) == 1
        alike = alike and (len(norms) == 1 or not moving)
        together = sum(norms) if alike else max(norms)  # columns that are normed at once
        # The kernel for CPUs makes gelu's slope with its value, and needs no copies for the norms.
        self.slope = 0.0 if at.cuda else self.work
        self.normed = share * at.narrow(together) if at.cuda else 0.0
        self.norm_copy = share * at.wide(together) if at.cuda and at.bf16 else 0.0
        self.scales = at.narrow(len(norms)) if at.cuda else at.wide(len(norms))
        element = at.element
        several = sum(len(spec.banks) for spec in specs) > 1
        self.joined_keys = element * inp * width if several else 0.0
        self.joined_values = [
            element * out * spec.tokens if len(spec.banks) > 1 else 0.0 for spec, out in zip(specs, outs, strict=True)
        ]

    def forward(self, ledger: Ledger) -> None:
        for weights in (self.keys, *self.values):
            weights.forward(ledger)
        self.input.forward(ledger)
        ledger.take(*self.joined_values, *self.outs, self.joined_keys, self.scores, self.scales, self.work)
        ledger.passing(self.norm_copy)
        ledger.give(self.work, *self.joined_values, self.joined_keys)

    def backward(self, ledger: Ledger) -> None:
        ledger.take(self.joined_keys, *self.joined_values, self.input.size, self.work, self.slope)
        for values in self.values:
            values.product(ledger)
        ledger.passing(self.normed)
        self.keys.product(ledger)
        every = (*self.values, self.keys)
        summed = [weights for weights in every if self.many and weights.cast]
        for weights in summed:  # in float32 where there are more than two chunks
            ledger.take(weights.gradient, weights.cast)
            ledger.give(2 * weights.cast)
        if self.several:
            ledger.passing(self.normed)
        ledger.give(self.work, self.slope)
        ledger.take(*(weights.cast for weights in summed))
        ledger.give(*(weights.gradient for weights in summed))
        ledger.give(self.joined_keys, *self.joined_values, self.scores, self.scales, *self.out_gradients)
        for weights in every:
            weights.backward(ledger)
        self.input.backward(ledger)


class KernelTokens(Together):
    """ops/pattention/triton.py: of projections that have one Θ, joined before the op."""

    def __init__(self, at: Pass, specs: Sequence[Pattention], inp: int, outs: Sequence[int], **how: bool) -> None:
        super().__init__(at, specs, inp, outs, **how)
        width, norms = self.width, self.norms
        self.squares = at.wide(len(norms))
        self.rows = min(at.tokens, tiling.chunk_rows(width))
        self.columns = tiling.COLUMNS["narrow" if at.bf16 else "ieee"]
        self.buffer = self.rows * tiling.padded(width) * at.element
        self.partials = self._partials(self.rows, norms)
        self.sums = self.rows * len(norms) * FLOAT
        ahead = at.bf16 and specs[0].theta == "l2_norm_gelu" and tiling.norms_ahead(at.tokens, inp, width, len(norms))
        self.gram = self._gram(at, inp, len(norms)) if ahead else 0.0
        self.every = [*self.values, self.keys]
        several = [len(spec.banks) > 1 for spec in specs] + [sum(len(spec.banks) for spec in specs) > 1]
        entries = [out * spec.tokens for spec, out in zip(specs, outs, strict=True)] + [inp * width]
        self.joined = sum(at.element * size for size, joins in zip(entries, several, strict=True) if joins)
        self.kept = 0.0 if at.bf16 else self.joined  # in the place of the casts that they are made of

    def _partials(self, rows: int, sizes: Sequence[int]) -> float:
        """A number of each row for each tile of scores."""
        return rows * sum(-(-size // self.columns) for size in sizes) * FLOAT

    def _gram(self, at: Pass, depth: int, norms: int) -> float:
        """Two matrices for each norm, one after the other and as one; the last in float32; partial sums of a chunk."""
        rows = min(at.tokens, tiling.chunk_rows(2 * norms * depth))
        matrices = 2 * 2 * norms * depth**2 * at.element + depth**2 * FLOAT
        return matrices + self._partials(rows, [depth] * 2 * norms)

    def forward(self, ledger: Ledger) -> None:
        self.input.forward(ledger)
        for weights in self.every:
            weights.forward(ledger)
        ledger.take(self.joined, *self.outs, self.squares)
        ledger.passing(self.gram)
        ledger.passing(self.buffer, self.partials)
        ledger.give(self.joined - self.kept)

    def backward(self, ledger: Ledger) -> None:
        sums = [weights.gradient for weights in self.every]
        casts = [weights.cast for weights in self.every]
        ledger.take(self.squares, self.input.size, *sums)  # zeros, the gradient of the norms
        ledger.take(3 * self.buffer, self.partials, self.sums)
        ledger.take(*casts)
        ledger.give(3 * self.buffer, self.partials, self.sums, *(sums if any(casts) else ()))
        ledger.give(self.squares, self.squares, self.kept, *self.out_gradients)
        for weights in self.every:
            weights.backward(ledger)
        self.input.backward(ledger)


class PlainTokens:
    """ops/pattention/compiled.py, ``_formula``, of one projection: for the Θ without a backward pass of their own."""

    def __init__(self, at: Pass, spec: Pattention, inp: int, out: int, *, is_wide: bool, lends_gradient: bool) -> None:
        banks = spec.banks if spec.scope == "bank" else (spec.tokens,)
        self.inputs = [Input(at, inp, is_wide=is_wide) for _ in banks]
        self.keys = [Weights(at, size * inp) for size in banks]
        self.values = [Weights(at, size * out) for size in banks]
        joined = spec.scope == "shared" and len(spec.banks) > 1
        self.joined = spec.tokens * (inp + out) * FLOAT if joined else 0.0
        self.out = at.narrow(out)
        self.out_gradient = 0.0 if lends_gradient else self.out
        self.parts = []
        for size in banks:
            narrow = at.narrow(size)
            if spec.theta == "softmax":  # saved: the softmax and τ times it; the scores pass
                softmax = at.wide(size) if at.cuda else narrow
                self.parts.append((softmax + narrow, narrow, softmax, softmax))
            else:  # saved: the scores, their gelu, and that times τ / norm
                self.parts.append((3 * narrow, 0.0, narrow, 2 * narrow))

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.joined)
        for index, (part, keys, values) in enumerate(zip(self.parts, self.keys, self.values, strict=True)):
            self.inputs[index].forward(ledger)
            for weights in (keys, values):
                weights.forward(ledger)
            saved, passing, _, _ = part
            ledger.take(passing, saved, self.out)
            ledger.give(passing)
            if index:
                ledger.take(self.out)
                ledger.give(self.out, self.out)

    def backward(self, ledger: Ledger) -> None:
        for index in reversed(range(len(self.parts))):
            saved, _, gradient, working = self.parts[index]
            ledger.take(gradient)
            self.values[index].product(ledger)
            self.values[index].backward(ledger)
            ledger.passing(working)
            ledger.take(self.inputs[index].size)
            self.keys[index].product(ledger)
            self.keys[index].backward(ledger)
            ledger.give(saved, gradient)
            self.inputs[index].backward(ledger)
            if index < len(self.parts) - 1:  # the gradients of one input add up
                ledger.give(self.inputs[index].wide if self.inputs[index].cast else self.inputs[index].size)
        ledger.give(self.out_gradient, self.joined)


def projections(
    at: Pass, specs: Sequence[Projection], inp: int, outs: Sequence[int], *, is_wide: bool, lends_gradient: bool = False
) -> list[Block]:
    """models/layers.py, ``project``: the blocks that read one x, in the order in which they run."""
    tokens = [(spec, out) for spec, out in zip(specs, outs, strict=True) if isinstance(spec, Pattention)]
    how = {"is_wide": is_wide, "lends_gradient": lends_gradient}
    blocks: list[Block] = []
    thetas = list(dict.fromkeys(spec.theta for spec, _ in tokens))
    for theta in thetas:
        these, widths = zip(*((spec, out) for spec, out in tokens if spec.theta == theta), strict=True)
        if at.triton and theta != "softmax":
            blocks.append(KernelTokens(at, these, inp, widths, **how))
        elif thetas == ["l2_norm_gelu"]:
            blocks.append(FusedTokens(at, these, inp, widths, **how))
        else:
            blocks += [PlainTokens(at, spec, inp, out, **how) for spec, out in zip(these, widths, strict=True)]
    dense = [out for spec, out in zip(specs, outs, strict=True) if not isinstance(spec, Pattention)]
    return blocks + [LinearBlock(at, inp, out, **how) for out in dense]


class DenseFeedForward:
    """models/layers.py: SwiGLU or GELU of either form. Reads float32."""

    def __init__(self, at: Pass, spec: DenseMLP, embed: int, *, lends_gradient: bool) -> None:
        self.swiglu, self.inner = spec.kind == "swiglu", at.narrow(spec.dim)
        self.up = LinearBlock(at, embed, spec.dim * (2 if self.swiglu else 1), is_wide=True)
        self.down = LinearBlock(at, spec.dim, embed, is_wide=False, lends_gradient=lends_gradient)

    def forward(self, ledger: Ledger) -> None:
        self.up.forward(ledger)
        ledger.take(self.inner)  # silu(gate) or gelu(up)
        if self.swiglu:
            ledger.take(self.inner)
        self.down.forward(ledger)

    def backward(self, ledger: Ledger) -> None:
        m = self.inner
        self.down.backward(ledger)
        ledger.give(m)  # what down read
        if self.swiglu:
            ledger.take(m, m)  # of silu(gate), of up
            ledger.give(m, m)  # the product's, and silu(gate)
            ledger.take(m)
            ledger.give(m, m, m)  # silu(gate)'s, and gate | up
            ledger.take(2 * m)
            ledger.give(m, m)
        else:
            ledger.take(m)
            ledger.give(m, m)
        self.up.backward(ledger)
