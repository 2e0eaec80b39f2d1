"""DecoderLM: embedding → layers → final norm → head. The one model of growkit.

Legend: B batch, T tokens, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from growkit.models.config import Attention, ModelConfig
from growkit.models.layers import Layer, LayerCache, rope_table
from growkit.models.loss import EachLoss, TokenLoss, chunked_cross_entropy, each_cross_entropy
from growkit.models.mamba import mamba_start
from growkit.models.norm import Normalize
from growkit.models.ramp import Ramp, stream_mask
from growkit.models.spec import ParamSpec, param_specs
from growkit.models.stream import Ends
from growkit.models.unset import Embedding, Linear
from growkit.models.visible import Visible


class Cache:
    """Keys and values of every layer, by layer id, and how many positions they hold."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers = {layer.id: LayerCache() for layer in config.layers}
        self.length = 0


class DecoderLM(nn.Module):
    """A causal language model built from ``config``; parameters are unset until ``init_params`` or a state is loaded.

    ``backend``: path of the ops (ops/dispatch.py). ``checkpoint_layers``: recompute each layer in backward.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto", checkpoint_layers: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_layers = checkpoint_layers
        width = config.parts * config.embed_dim
        self.embedding = Embedding(config.vocab_size, width)
        self.embedding_mask = stream_mask(config, parts=config.parts)
        if config.stream is not None:
            self.stream = Ends(config.stream)
        self.layers = nn.ModuleDict({str(spec.id): Layer(spec, config, backend) for spec in config.layers})
        self.final_norm = Normalize(config.final_norm, config.embed_dim, config.parts)
        if not config.tied_head:
            self.head = Linear(width, config.vocab_size, bias=False)

    def set_ramp(self, ramp: float) -> None:
        """Puts everything that is under a mask to ``ramp``, 0..1, in place; ``config`` says so afterwards."""
        if ramp == self.config.ramp:
            return
        self.config = dataclasses.replace(self.config, ramp=ramp)
        self.place_ramp()

    def place_ramp(self) -> None:
        """Puts everything that is under a mask to where ``config`` has the ramp."""
        for module in self.modules():
            if isinstance(module, Ramp):
                module.set(self.config.ramp)

    def param_axes(self) -> dict[str, ParamSpec]:
        """Name → axes, role and layer of every parameter."""
        return param_specs(self.config)

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        *,
        positions: Tensor | None = None,
        mask: Visible | None = None,
    ) -> Tensor:
        """Final-norm output (B, T, D), with a full AltUp stream (B, T, K · D). With ``cache``, tokens continue the
        cached positions.

        ``mask``: what tokens see, where that is not all before them. For rows that hold padding also ``positions``
        (B, T) of the tokens.
        """
        return self._hidden(tokens_BT, cache, positions, mask)[0]

    def _hidden(
        self,
        tokens_BT: Tensor,
        cache: Cache | None,
        positions: Tensor | None = None,
        mask: Visible | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """``hidden``, and the balance losses of the layers that have one."""
        balances = []
        x = self.embedding(tokens_BT)
        if self.embedding_mask is not None:
            x = self.embedding_mask(x)
        if self.config.stream is not None:
            x = self.stream.entered(x)
        past = cache.length if cache is not None else 0
        length = past + tokens_BT.shape[1] if positions is None else None  # then the positions say it
        if positions is None:
            positions = torch.arange(past, past + tokens_BT.shape[1], device=x.device)
        ropes: dict[object, tuple[Tensor, Tensor] | None] = {}
        for spec in self.config.layers:
            layer = self.layers[str(spec.id)]
            key = spec.mixer.rope if isinstance(spec.mixer, Attention) else None
            if key not in ropes:
                ropes[key] = rope_table(spec.mixer, positions, x.dtype, length=length)
            if self.checkpoint_layers and self.training:
                x, balance = checkpoint(layer, x, ropes[key], None, mask, use_reentrant=False)
            else:
                x, balance = layer(x, ropes[key], cache.layers[spec.id] if cache is not None else None, mask)
            if balance is not None:
                balances.append(balance)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        if self.config.stream is not None:
            x = self.stream.left(x)
        return self.final_norm(x), balances

    @property
    def head_weight(self) -> Tensor:
        """(V, D), with a full AltUp stream (V, K · D)."""
        return self.embedding.weight if self.config.tied_head else self.head.weight

    def logits(self, h_BTD: Tensor) -> Tensor:
        """(B, T, V) of the final norm's output."""
        logits = F.linear(h_BTD, self.head_weight)
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cache: Cache | None = None,
        mask: Visible | None = None,
        unscored: bool = False,
        each: bool = False,
        z_loss: float = 0.0,
        chunk_tokens: int = 0,
    ) -> Tensor | TokenLoss | EachLoss:
        """tokens (B, T) → logits (B, T, V); with ``targets`` (B, T), the losses instead, logits made in chunks. In
        training the total has the mixtures' balance losses in it, added up over the layers. ``mask``: as of ``hidden``.
        ``unscored``: some targets are UNSCORED, and losses are means over the others. ``each``: they are of each
        target, (B · T,)."""
        h, balances = self._hidden(tokens, cache, mask=mask)
        if targets is None:
            return self.logits(h)
        flat = (h.flatten(0, 1), self.head_weight, targets.flatten())
        scale = self.config.logit_scale
        balance = torch.stack(balances).sum() if balances else None
        if each:
            of_each = each_cross_entropy(*flat, logit_scale=scale, z_loss=z_loss, chunk_tokens=chunk_tokens)
            return of_each._replace(balance=balance)
        loss = chunked_cross_entropy(
            *flat, logit_scale=scale, z_loss=z_loss, chunk_tokens=chunk_tokens, unscored=unscored
        )
        return loss if balance is None else loss._replace(total=loss.total + balance)


def init_tensor(spec: ParamSpec, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter's start: N(0, init_std²), its constant, or both added; what ``spec.start`` names, of Mamba."""
    if spec.start != "normal":
        return mamba_start(spec, generator).to(dtype)
    if spec.init_std is None:
        return constant(spec, dtype)
    drawn = torch.empty(spec.shape, dtype=dtype).normal_(0.0, spec.init_std, generator=generator)
    return drawn if spec.constant is None else drawn.add_(constant(spec, dtype))


def constant(spec: ParamSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that a parameter has before any noise."""
    if spec.constant is None:
        return torch.full(spec.shape, spec.starts_at(), dtype=dtype)
    return torch.tensor(spec.constant, dtype=dtype).view(spec.shape)


def init_params(config: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A fresh state: name → float32 tensor, drawn in the order of the parameter table."""
    return {name: init_tensor(spec, generator) for name, spec in param_specs(config).items()}


def build(config: ModelConfig, params: Mapping[str, Tensor], *, copy: bool = True, **options: object) -> DecoderLM:
    """A model whose parameters are those of ``params`` (copies of them unless ``copy`` is off)."""
    with torch.device("meta"):
        model = DecoderLM(config, **options)  # type: ignore[arg-type]
    state = {name: tensor.detach().clone() if copy else tensor.detach() for name, tensor in params.items()}
    model.load_state_dict(state, strict=True, assign=True)
    for module in model.modules():
        if isinstance(module, Ramp):  # on the CPU, where they were made
            module.to(model.embedding.weight.device)
    return model.requires_grad_(True)
