"""What AltUp's streams hold in both passes, and what they move through memory: models/stream.py and ops/blocks.py,
booking bytes. No torch here.

``LayerPass`` is what a layer computes; around it a stream books its blocks. The block that a layer reads may be a view
of what is booked as the stream: then what ``LayerPass`` books of its input is set right (``_View``).

Legend: K blocks, P parts, N tokens of a micro-batch, D embed; x: bytes of (N, D) in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from growkit.models.config import AltUp, LayerSpec, ModelConfig
from growkit.planner.activations import FLOAT, NormBlock, Pass
from growkit.planner.ledger import Ledger


class LayerBlock(Protocol):
    """``out``: bytes of what it makes. ``keeps_input``: until its backward pass, which then gives it. ``unsaved``: the
    most of a forward pass of which nothing is kept, which is that of a layer that will be computed again."""

    out: float
    unsaved: float
    keeps_input: bool

    def forward(self, ledger: Ledger) -> None: ...
    def backward(self, ledger: Ledger) -> None: ...


class _View:
    """A layer that reads a view of what somebody else holds."""

    def __init__(self, layer: LayerBlock) -> None:
        self.layer = layer

    def forward(self, ledger: Ledger) -> None:
        self.layer.forward(ledger)
        ledger.take(0.0 if self.layer.keeps_input else self.layer.out)

    def backward(self, ledger: Ledger) -> None:
        self.layer.backward(ledger)
        ledger.take(self.layer.out if self.layer.keeps_input else 0.0)


class BlocksPass:
    """``Blocks``: R and what the layer made of z are saved for the gradients of the coefficients."""

    def __init__(self, at: Pass, stream: AltUp, layer: LayerBlock, embed: int) -> None:
        self.x, self.out, self.keeps_input = at.wide(embed), at.wide(stream.blocks * embed), True
        self.picks, self.adds = stream.order == "paper", stream.order == "round_robin"
        self.layer, self.view = layer, _View(layer)
        z = 0.0 if self.picks else self.x
        self.unsaved = z + max(layer.unsaved, self.x * (2 if self.adds else 1) + self.out)

    def forward(self, ledger: Ledger) -> None:
        self._compute(ledger)
        z = 0.0 if self.picks or self.layer.keeps_input else self.x
        ledger.take(z, self.x if self.adds else 0.0, self.out)  # z is there to the end
        ledger.give(z, 2 * self.x if self.adds else 0.0)  # y − z, and y

    def _compute(self, ledger: Ledger) -> None:
        if self.picks:
            self.view.forward(ledger)
            return
        ledger.take(self.x)
        self.layer.forward(ledger)

    def backward(self, ledger: Ledger) -> None:
        x = self.x
        ledger.take(self.out, x)  # R's gradient, y's
        ledger.give(self.out)
        if self.adds:
            ledger.take(x)  # of −z
        else:
            ledger.give(x)  # y
        if self.picks:
            self.view.backward(ledger)
        else:
            self.layer.backward(ledger)
        ledger.give(x if self.adds else 0.0)
        ledger.give(x, self.out)  # z's gradient, R


class RoutedPass(BlocksPass):
    """``RoutedBlocks``: also what two runs of the router read, and the coefficients of every token."""

    def __init__(self, at: Pass, stream: AltUp, layer: LayerBlock, config: ModelConfig) -> None:
        super().__init__(at, stream, layer, config.embed_dim)
        K = stream.blocks
        self.norm = NormBlock(at, config.norm, config.embed_dim)
        self.of_P, self.of_g = at.wide(K + K * K), at.wide(2 * K + K * K)  # routes, P; routes, g, N
        self.square = at.wide(K * K)
        self.unsaved += self.of_P + self.of_g + self.square

    def forward(self, ledger: Ledger) -> None:
        self._route(ledger)
        ledger.take(self.of_P)
        ledger.passing(self.square)
        self._compute(ledger)
        self._route(ledger)
        ledger.take(self.of_g)
        ledger.passing(self.square)
        z = 0.0 if self.picks or self.layer.keeps_input else self.x
        ledger.take(z, self.out)
        ledger.give(z)

    def _route(self, ledger: Ledger) -> None:
        self.norm.forward(ledger)
        ledger.take(self.x)  # times the scale
        ledger.give(self.x)
        if self.norm.holds_input:  # a block of R, or y, which the write saves
            ledger.passing(0.0)

    def _route_back(self, ledger: Ledger) -> None:
        x = self.x
        ledger.take(x)  # the scaled one's gradient
        ledger.give(x)
        ledger.take(x)
        ledger.give(x)
        self.norm.backward(ledger)
        ledger.take(x if self.norm.holds_input else 0.0)
        ledger.give(x)  # added to the others

    def backward(self, ledger: Ledger) -> None:
        x = self.x
        ledger.take(self.square, self.out, x)  # the gradients of N, R and y
        ledger.give(self.out, x)
        self._route_back(ledger)
        ledger.give(self.of_g)
        if self.picks:
            self.view.backward(ledger)
        else:
            self.layer.backward(ledger)
        ledger.give(x)
        ledger.take(x)  # of the block that the router reads
        self._route_back(ledger)
        ledger.give(x, self.of_P, self.square, self.out)


class StridedPass:
    """``Strided``: of x, the layer reads every k-th token, a view; x is saved for the gradients of the taps."""

    def __init__(self, at: Pass, layer: LayerBlock, embed: int) -> None:
        self.out, self.keeps_input = at.wide(embed), True
        self.part, self.layer = layer.out, _View(layer)
        self.unsaved = max(layer.unsaved, 2 * self.part + 3 * self.out)

    def forward(self, ledger: Ledger) -> None:
        x, part = self.out, self.part
        self.layer.forward(ledger)
        ledger.take(part, part, part)  # a₂ x, (a₁ + a₂) x, what the layer changed
        ledger.give(part)
        ledger.take(part, part)  # times b, added to a₂ x
        ledger.give(part, part)
        ledger.take(x, x, x)  # a₁ x, the change at every token, both
        ledger.give(x, x, part, part)  # what the layer made, and the change

    def backward(self, ledger: Ledger) -> None:
        x, part = self.out, self.part
        ledger.take(part)  # of the change
        ledger.take(x, x)
        ledger.give(x, x)  # a₁'s, the output's
        ledger.take(part, part)
        ledger.give(part, part)  # b's; what the layer changed
        ledger.take(part, part, part)
        ledger.give(part, part)  # times −1; that of (a₁ + a₂)
        ledger.take(part, part)
        ledger.give(part, part, part)  # a₂'s; added to the other gradient of what the layer reads; the change's
        self.layer.backward(ledger)
        ledger.give(part)  # added to that one
        ledger.take(x)  # zeros, but for the tokens that the layer reads
        ledger.give(part, x, x)  # added to a₁ x's; x


def around(layer: LayerBlock, spec: LayerSpec, config: ModelConfig, at: Pass) -> LayerBlock:
    """What a layer of ``config`` holds, given what it computes: that is of ``strided(at, spec)``."""
    if spec.stride > 1:
        return StridedPass(at, layer, config.embed_dim)
    if config.stream is None:
        return layer
    if config.stream.routed:
        return RoutedPass(at, config.stream, layer, config)
    return BlocksPass(at, config.stream, layer, config.embed_dim)


def strided(at: Pass, spec: LayerSpec) -> Pass:
    """The tokens that a layer runs on."""
    return dataclasses.replace(at, context=-(-at.context // spec.stride))


class EndsPass:
    """``Ends``, from the embedding's output to the stream and from there to the final norm. Parts that lie side by side
    in a token are copied, to lie one after the other, and back."""

    def __init__(self, at: Pass, stream: AltUp, embed: int) -> None:
        self.stream, self.parts = at.wide(stream.blocks * embed), at.wide(stream.parts * embed)
        self.copied = self.parts if stream.parts > 1 else 0.0

    def enter(self, ledger: Ledger) -> None:
        """From the embedding's output, which stays."""
        ledger.take(self.copied, self.stream)
        ledger.give(self.copied)

    def leave(self, ledger: Ledger) -> None:
        """The stream stays."""
        ledger.take(self.parts)
        ledger.passing(self.copied)

    def leave_back(self, ledger: Ledger) -> None:
        ledger.take(self.copied, self.stream)
        ledger.give(self.copied, self.parts, self.stream)

    def enter_back(self, ledger: Ledger) -> None:
        ledger.take(self.parts)
        ledger.give(self.stream, self.parts)
        ledger.passing(self.copied)


def traffic_per_token(config: ModelConfig) -> float:
    """Bytes of memory that a token's blocks take to be read, mixed and written in both passes of a training step,
    beside what the layers compute; each operand and result of ops/blocks.py once, float32."""
    if config.stream is None:
        return 0.0
    K, order = config.stream.blocks, config.stream.order
    if order == "paper":  # R, y → R′; dR′ and R → dN, dR′ and y → db, dR′ → dR, dR′ → dy; dz into a block
        moved = (2 * K + 1) + (6 * K + 2) + 3
    elif order == "round_robin":  # R → z; y, z → change; R → R′, a block changed; back the same way
        moved = (K + 1) + 3 + (2 * K + 3) + (2 * K + 2) + 2 + (K + 1) + (2 * K + 1)
    else:  # R → z; as the paper's; R and dz → da; dR and dz → dR
        moved = (K + 1) + (2 * K + 1) + (6 * K + 2) + (K + 1) + (2 * K + 1)
    ends = 3 * (K + config.parts)  # to the stream, from it, and their gradients
    return float(FLOAT * config.embed_dim * (len(config.layers) * moved + 2 * ends))
