"""The dry run of a mixture of experts: growkit/models/experts.py, booking bytes. No torch here.

Tokens are taken to be spread evenly over the experts, which is what the balance loss is for; where they are not, the
same rows lie in other experts, and only what one expert holds for a moment is larger.
"""

from __future__ import annotations

import dataclasses

from growkit.models.config import DenseMLP, MoEMLP
from growkit.planner.activations import FLOAT, INDEX, DenseFeedForward, Pass
from growkit.planner.ledger import Ledger

HIDDEN = {"moe_swiglu": 4, "moe_gelu": 2}  # hidden widths of one expert alive at once when nothing is kept


class MixtureFeedForward:
    """Reads float32, the router's input under autocast as well."""

    def __init__(self, at: Pass, spec: MoEMLP, embed: int, *, lends_gradient: bool) -> None:
        self.at, self.experts, k = at, spec.num_experts, spec.experts_per_token
        # One expert; what weights' gradients are added to is the gradient of all experts, never an expert's.
        one = dataclasses.replace(at, rows=1, context=-(-at.tokens * k // self.experts), adds_gradients=False)
        block = DenseMLP(spec.dim, "swiglu" if spec.gated else "gelu")
        self.expert = DenseFeedForward(one, block, embed, lends_gradient=True)
        self.x, self.out = at.wide(embed), at.narrow(embed)
        self.out_gradient = 0.0 if lends_gradient else self.out
        self.wide_rows, self.rows = at.wide(embed * k), at.narrow(embed * k)
        self.logits, self.gates = at.wide(self.experts), at.wide(k)
        self.index = at.tokens * k * INDEX
        self.cast_gates = at.narrow(k) if at.bf16 else 0.0
        self.router = self.experts * embed * FLOAT
        self.weights = [self.experts * spec.dim * embed * times * FLOAT for times in (1, 2 if spec.gated else 1)]

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.logits, self.gates, self.index, self.gates)  # the best, who they are, their softmax
        ledger.give(self.gates)
        for _ in ("order", "place"):
            ledger.take(self.index)
            ledger.passing(self.index)  # sorted
        ledger.take(self.wide_rows)
        for _ in range(self.experts):
            self.expert.forward(ledger)
        ledger.take(self.rows)
        ledger.give(self.rows, self.wide_rows if self.at.bf16 else 0.0)  # the parts; products saved casts of the rows
        ledger.take(self.rows)  # in the tokens' order
        ledger.give(self.rows)
        ledger.take(self.cast_gates, self.rows, self.out)
        ledger.give(self.rows)  # weighted, added up
        ledger.take(self.logits)  # their softmax, for the balance
        ledger.give(self.logits)
        ledger.take(self.x if self.at.bf16 else 0.0)  # the router's, which the layer believes to be gone

    def backward(self, ledger: Ledger) -> None:
        ledger.take(self.logits)
        ledger.give(self.logits)  # the balance's; its softmax
        ledger.take(self.rows)
        ledger.passing(self.rows)  # times what the experts wrote: the gates'
        ledger.take(self.gates)
        ledger.give(self.rows, self.cast_gates, self.out_gradient)
        ledger.take(self.rows)  # in the experts' order
        ledger.give(self.rows)
        for _ in range(self.experts):
            self.expert.backward(ledger)
        ledger.give(self.rows)
        for weights in self.weights:
            ledger.passing(weights)  # one gradient of all experts from theirs
            ledger.give(weights if self.at.adds_gradients else 0.0)
        ledger.take(self.wide_rows)
        ledger.give(self.wide_rows)  # the parts
        ledger.take(self.wide_rows)  # in the tokens' order
        ledger.give(self.wide_rows)
        ledger.take(self.x)
        ledger.give(self.wide_rows, 0.0 if self.at.bf16 else self.wide_rows, self.index, self.index)
        ledger.give(self.gates, self.gates)
        ledger.take(self.logits)
        ledger.give(self.logits, self.index)
        ledger.passing(self.x, self.router)
        ledger.take(0.0 if self.at.adds_gradients else self.router)
        ledger.give(self.logits, self.x if self.at.bf16 else 0.0)


def scored(at: Pass, spec: MoEMLP, embed: int) -> float:
    """Most bytes of a pass of which nothing is kept: the rows, what was written of them twice, one expert's hidden."""
    per_expert = spec.experts_per_token / spec.num_experts * spec.dim
    rows = at.wide(embed * spec.experts_per_token) + 2 * at.narrow(embed * spec.experts_per_token)
    return rows + at.narrow(HIDDEN[spec.kind] * per_expert)
