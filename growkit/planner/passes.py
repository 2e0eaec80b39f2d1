"""Layers, loss and model of the dry run: what lives together in one forward and one backward pass. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from growkit.models.config import (
    Attention,
    DenseMLP,
    LayerSpec,
    Mamba,
    Mixer,
    ModelConfig,
    MoEMLP,
    Pattention,
)
from growkit.models.config import projections as projections_of
from growkit.ops import tiling
from growkit.planner import experts, mamba
from growkit.planner.activations import (
    BFLOAT,
    FLOAT,
    INDEX,
    Block,
    DenseFeedForward,
    NormBlock,
    Pass,
    Weights,
    projections,
)
from growkit.planner.ledger import Ledger, Trace
from growkit.planner.streams import EndsPass, LayerBlock, around, strided

HIDDEN = {"swiglu": 4, "gelu": 2, "gelu_tanh": 2}  # hidden widths alive at once when nothing is kept


class AttentionBlock:
    """models/layers.py, ``CausalAttention`` with a fused kernel, which holds no (T × T) scores. Reads float32."""

    def __init__(self, at: Pass, spec: Attention, embed: int, *, lends_gradient: bool) -> None:
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.read = projections(at, (spec.q, spec.k, spec.v), embed, (heads, kv, kv), is_wide=True)
        (self.write,) = projections(at, (spec.o,), heads, (embed,), is_wide=False, lends_gradient=lends_gradient)
        self.q, self.k, self.embed = at.narrow(heads), at.narrow(kv), at.wide(embed)
        self.log_sum_exp = at.wide(spec.num_heads)
        self.norms: list[tuple[NormBlock, float]] = []
        if spec.qk_norm is not None:
            q_norm = NormBlock(at, spec.qk_norm, spec.head_dim, spec.num_heads)
            k_norm = NormBlock(at, spec.qk_norm, spec.head_dim, spec.num_kv_heads)
            self.norms = [(q_norm, self.q), (k_norm, self.k)]
        self.bf16 = at.bf16

    def forward(self, ledger: Ledger) -> None:
        for block in self.read:
            block.forward(ledger)
        for norm, _ in self.norms:
            ledger.take(norm.whole if self.bf16 else 0.0)  # float32 copies in, narrow copies out
            norm.forward(ledger)
            if self.bf16:
                ledger.take(norm.whole / 2)
                ledger.give(norm.whole, norm.whole)
        ledger.give(*(narrow for _, narrow in self.norms))
        ledger.take(self.q, self.k)  # rotated
        ledger.give(self.q, self.k)
        ledger.take(self.q, self.log_sum_exp)
        self.write.forward(ledger)

    def backward(self, ledger: Ledger) -> None:
        q, k = self.q, self.k
        self.write.backward(ledger)
        ledger.take(q, k, k)
        ledger.give(q, q, k, k, q, self.log_sum_exp)  # the output's gradient; q, k, v, output
        ledger.passing(k)  # rotated back
        ledger.passing(q)
        for norm, narrow in reversed(self.norms):
            if self.bf16:
                ledger.take(norm.whole)
                ledger.give(narrow)
            norm.backward(ledger)
            if self.bf16:
                ledger.take(narrow)
                ledger.give(norm.whole)
        for index, block in enumerate(reversed(self.read)):
            block.backward(ledger)
            if index:  # the gradients of one input add up
                ledger.give(self.embed)


class LayerPass:
    """models/layers.py, ``Layer``: from the residual stream to the residual stream, both float32."""

    def __init__(self, at: Pass, spec: LayerSpec, config: ModelConfig, dropout: bool) -> None:
        self.at, self.dropout, self.parallel, embed = at, dropout, spec.parallel, config.embed_dim
        self.x, self.narrow = at.wide(embed), at.narrow(embed)
        mask = 1 if at.cuda else at.element  # on a CPU, PyTorch draws a mask as wide as what it drops
        self.mask = at.tokens * embed * mask if dropout else 0.0
        lends = not at.bf16 and not dropout  # then a branch's gradient is the residual stream's own
        self.lends = lends
        self.norm = NormBlock(at, config.norm, embed)
        self.out, self.keeps_input = self.x, self.norm.holds_input
        self.branches = [_mixer(at, spec.mixer, embed, lends), *_feed_forward(at, spec, embed, lends)]
        self.unsaved = 2 * self.x + max(map(self._alone, self.branches))  # with what the branches write

    def forward(self, ledger: Ledger) -> None:
        for branch in self.branches:
            self.norm.forward(ledger)
            branch.forward(ledger)
            if self.at.bf16:
                ledger.give(self.x)  # the norm's output: products saved casts of it
            if self.dropout:
                ledger.take(self.mask, self.narrow)
                ledger.give(self.narrow)
            ledger.passing(self.x if self.at.bf16 else 0.0, self.x)
            ledger.take(self.x)
        ledger.give(self.narrow * len(self.branches))  # what they wrote, which variables hold to the end
        if not self.norm.holds_input:
            ledger.give(self.x * len(self.branches))
        elif self.parallel:  # both norms hold the layer's input, and nothing the sum between them
            ledger.give(self.x)

    def _alone(self, branch: Block) -> float:
        """Most bytes of a branch's forward pass."""
        ledger = Ledger()
        self.norm.forward(ledger)
        branch.forward(ledger)
        return ledger.peak

    def backward(self, ledger: Ledger) -> None:
        for branch in reversed(self.branches):
            if self.at.bf16:
                ledger.take(self.narrow)
            if self.dropout:
                ledger.take(self.narrow)
                ledger.give(self.mask, self.narrow if self.at.bf16 else 0.0)
            branch.backward(ledger)
            if not self.at.bf16:
                ledger.give(self.x)  # the norm's output
            self.norm.backward(ledger)
            ledger.give(self.x)  # added to the residual stream's
            if self.parallel and branch is not self.branches[0]:
                ledger.take(self.x if self.norm.holds_input else 0.0)  # the other norm holds it still
                ledger.take(self.x if self.lends else 0.0)  # the sum is not what attention's branch was lent
        if self.parallel:
            ledger.give(self.x if self.lends else 0.0)


def _mixer(at: Pass, spec: Mixer, embed: int, lends: bool) -> Block:
    if isinstance(spec, Mamba):
        return mamba.MambaBlock(at, spec, embed, lends_gradient=lends)
    return AttentionBlock(at, spec, embed, lends_gradient=lends)


def _feed_forward(at: Pass, spec: LayerSpec, embed: int, lends: bool) -> list[Block]:
    """Of a layer that is all mixer, none."""
    if spec.mlp is None:
        return []
    if isinstance(spec.mlp, DenseMLP):
        return [DenseFeedForward(at, spec.mlp, embed, lends_gradient=lends)]
    if isinstance(spec.mlp, MoEMLP):
        return [experts.MixtureFeedForward(at, spec.mlp, embed, lends_gradient=lends)]
    return projections(at, (spec.mlp.projection,), embed, (embed,), is_wide=True, lends_gradient=lends)


class FinalNorm(NormBlock):
    """models/norm.py over the width of the head: with several parts, their gains are taken apart from the norm."""

    def __init__(self, at: Pass, config: ModelConfig) -> None:
        super().__init__(at, config.final_norm, config.embed_dim, config.parts)
        self.apart = self.whole if config.parts > 1 and config.final_norm.kind != "layernorm_gainless" else 0.0

    def forward(self, ledger: Ledger) -> None:
        super().forward(ledger)
        ledger.take(self.apart)

    def backward(self, ledger: Ledger) -> None:
        ledger.take(self.apart, self.apart)  # of the normed, of the gains
        ledger.give(self.apart, self.apart, self.apart)
        super().backward(ledger)


class LossPass:
    """models/loss.py, from the final norm's output."""

    def __init__(self, at: Pass, config: ModelConfig) -> None:
        count = at.chunk_tokens if 0 < at.chunk_tokens < at.tokens else at.tokens
        self.chunks = -(-at.tokens // count)
        width = config.parts * config.embed_dim
        self.at, self.h = at, at.wide(width)
        self.logits, self.narrow_logits = count * config.vocab_size * FLOAT, count * config.vocab_size * at.element
        self.chunk_h = count * width * at.element
        self.scaled = config.logit_scale != 1
        self.head = Weights(at, config.vocab_size * width)

    def forward(self, ledger: Ledger) -> None:
        """One chunk after the other; a single one leaves what its backward needs."""
        if self.chunks == 1:
            self._logits(ledger)
            if self.at.bf16:
                ledger.give(self.h)
        else:
            chunk = Ledger()
            self._logits(chunk)
            ledger.passing(chunk.peak)

    def _logits(self, ledger: Ledger) -> None:
        bf16 = self.at.bf16
        ledger.take(self.chunk_h if bf16 else 0.0)
        self.head.forward(ledger)
        ledger.take(self.narrow_logits)
        if bf16:
            ledger.take(self.logits)
            ledger.give(self.narrow_logits)
        if self.scaled:
            ledger.take(self.logits)
            ledger.give(self.logits)
        ledger.take(self.logits)  # log-softmax
        if self.at.z_loss:
            ledger.passing(self.logits)  # logsumexp, which saves them
        else:
            ledger.give(self.logits)

    def backward(self, ledger: Ledger) -> None:
        if self.chunks == 1:
            self._backward(ledger)
            return
        part = self.chunk_h / self.at.element * FLOAT
        self._logits(ledger)
        self._backward(ledger)
        ledger.take(self.h - 2 * part)  # what the chunks between first and last give
        self._logits(ledger)
        self._backward(ledger)
        ledger.give(self.head.gradient - self.head.added)  # gradients of the head add up
        ledger.take(self.h)
        ledger.give(self.h)

    def _backward(self, ledger: Ledger) -> None:
        logits, bf16 = self.logits, self.at.bf16
        if self.at.z_loss:
            ledger.take(logits, logits, logits)
            ledger.give(logits, logits, logits)  # what passes, and what logsumexp saved
        ledger.take(logits, logits)
        ledger.give(logits, logits)  # of the log-probabilities, and they themselves
        if self.at.z_loss:
            ledger.give(logits)
        if self.scaled:
            ledger.passing(logits)
        if bf16:
            ledger.take(self.narrow_logits)
            ledger.give(logits)
        ledger.take(self.chunk_h)
        self.head.product(ledger)
        ledger.give(self.narrow_logits)
        self.head.backward(ledger)
        if bf16:
            wide = self.chunk_h / BFLOAT * FLOAT
            ledger.give(self.chunk_h)
            ledger.take(wide)
            ledger.give(self.chunk_h)


@dataclass(frozen=True)
class Traces:
    """``forward`` to the loss, and ``backward`` from it, which leaves the gradients unless they are added to others."""

    forward: Trace
    backward: Trace


def trace(config: ModelConfig, at: Pass, elementwise: Mapping[int | None, float]) -> Traces:
    """The passes of one micro-batch through ``config``. ``elementwise``: entries of the gains and biases of each layer,
    by id; None: the model's own."""
    ledger, back = Ledger(), Ledger()
    width = config.parts * config.embed_dim
    x = at.wide(width)
    ropes = {s.mixer.rope for s in config.layers if isinstance(s.mixer, Attention)}
    batch = 4 * INDEX * at.tokens + sum(FLOAT * at.context * rotated for _, rotated, _ in ropes)
    ledger.take(batch, x)
    ends = EndsPass(at, config.stream, config.embed_dim) if config.stream is not None else None
    if ends is not None:
        ends.enter(ledger)
    known: dict[object, Traces] = {}
    passes = []
    for spec in config.layers:
        kind = (spec.mixer, spec.mlp, spec.parallel, spec.stride)
        if kind not in known:
            known[kind] = layer_traces(spec, config, at)
        passes.append(known[kind])
        ledger.replay(passes[-1].forward)
    if ends is not None:
        ends.leave(ledger)
    norm, loss = FinalNorm(at, config), LossPass(at, config)
    norm.forward(ledger)
    if not norm.holds_input:
        ledger.give(x)
    loss.forward(ledger)

    table = config.vocab_size * width * FLOAT
    loss.backward(back)
    back.give(0.0 if at.bf16 and loss.chunks == 1 else x)
    norm.backward(back)
    if ends is not None:
        ends.leave_back(back)
    for spec, layer in zip(reversed(config.layers), reversed(passes), strict=True):
        back.replay(layer.backward)
        if not at.adds_gradients:
            back.take(elementwise.get(spec.id, 0.0) * FLOAT)
    if ends is not None:
        ends.enter_back(back)
    back.take(table)
    back.give(x, batch)
    if config.tied_head:  # the table's two gradients become one
        back.give(table if not at.adds_gradients else 0.0)
    if at.adds_gradients:
        back.give(table)
    else:
        back.take(elementwise.get(None, 0.0) * FLOAT)
    return Traces(ledger.close(), back.close())


def layer_traces(spec: LayerSpec, config: ModelConfig, at: Pass) -> Traces:
    """The passes of one layer."""
    computed = LayerPass(strided(at, spec), spec, config, config.dropout > 0)
    layer: LayerBlock = around(computed, spec, config, at)
    ledger, back = Ledger(), Ledger()
    layer.forward(ledger)
    layer.backward(back)
    if not at.checkpoint_layers:
        return Traces(ledger.close(), back.close())
    # Only the input stays, and what a branch saves goes when the next one begins. Backward runs the layer once more;
    # its output is not kept.
    again = Ledger()
    again.replay(ledger.close())
    again.give(layer.out if layer.keeps_input else 0.0)
    again.replay(back.close())
    again.give(0.0 if layer.keeps_input else layer.out)
    return Traces(Trace(min(ledger.peak, layer.unsaved), layer.out), again.close())


def loss_peak(config: ModelConfig, at: Pass) -> float:
    """Most bytes alive in both passes of the head and the loss, from the final norm's input."""
    ledger = Ledger()
    norm, loss = FinalNorm(at, config), LossPass(at, config)
    norm.forward(ledger)
    loss.forward(ledger)
    loss.backward(ledger)
    norm.backward(ledger)
    return ledger.peak


def evaluation_peak(config: ModelConfig, at: Pass, *, several: bool) -> float:
    """Most bytes alive beside the weights while ``at`` is scored as validation does: nothing is kept for a backward
    pass, but all logits of the pass are there at once, and, of ``several`` passes, those of the one before."""
    logits = at.tokens * config.vocab_size
    scoring = logits * (2 * FLOAT if not at.bf16 else 2 * FLOAT + BFLOAT)
    before = logits * at.element if several else 0.0
    x = at.wide(config.parts * config.embed_dim)
    return 2 * INDEX * at.tokens + max(scored_layers(config, at) + before, scoring + x)


def scored_layers(config: ModelConfig, at: Pass) -> float:
    """Most bytes alive beside the weights while ``at`` goes through the layers and nothing is kept."""
    widest = 0.0
    known = set()
    for spec in config.layers:
        if (spec.mixer, spec.mlp) in known:
            continue
        known.add((spec.mixer, spec.mlp))
        widest = max(widest, _scored_mixer(spec.mixer, at), _scored_mlp(spec, config, at))
    x, blocks = at.wide(config.embed_dim), config.stream.blocks if config.stream is not None else 0
    return max((blocks + 3) * x + widest, (2 * blocks + 2) * x)  # in a layer, or while the blocks are written


def _scored_mixer(mixer: Mixer, at: Pass) -> float:
    read = max((_scored(p, at) for p in projections_of(mixer).values() if isinstance(p, Pattention)), default=0.0)
    if isinstance(mixer, Mamba):
        return mamba.scored(at, mixer) + read
    heads, kv = at.narrow(mixer.num_heads * mixer.head_dim), at.narrow(mixer.num_kv_heads * mixer.head_dim)
    return 3 * (heads + kv) + read


def _scored_mlp(spec: LayerSpec, config: ModelConfig, at: Pass) -> float:
    mlp = spec.mlp
    if isinstance(mlp, DenseMLP):
        return at.narrow(HIDDEN[mlp.kind] * mlp.dim)
    if isinstance(mlp, MoEMLP):
        return experts.scored(at, mlp, config.embed_dim)
    return 0.0 if mlp is None else _scored(mlp.projection, at)


def _scored(spec: Pattention, at: Pass) -> float:
    """Scores of the tokens under one norm, three times over, as their Θ is taken; of a chunk once, by the kernels."""
    if at.triton and spec.theta != "softmax":
        return min(at.tokens, tiling.chunk_rows(spec.tokens)) * spec.tokens * at.element
    return 3 * at.narrow(max(spec.banks) if spec.scope == "bank" else spec.tokens)
