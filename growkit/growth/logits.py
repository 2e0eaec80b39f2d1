"""Logits of models that are never whole in memory: the weights of one layer at a time are read, those of a matrix
converted and used a few rows at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.growth.gradients import Room, empty_ends, empty_layer, empty_norm, fill
from growkit.growth.state import TrainState
from growkit.models.config import LayerSpec, ModelConfig
from growkit.models.layers import rope_table
from growkit.models.projections import LinearProjection
from growkit.models.ramp import stream_mask

PART_BYTES = 8 << 20  # of weights as they are stored; converted, they are in the cache still when they are multiplied


@torch.no_grad()
def stream_logits(config: ModelConfig, params: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (rows, context, vocab) of ``tokens`` (rows, context), computed in ``dtype`` (bf16: float32 weights under
    autocast)."""
    with _autocast(tokens, dtype):
        pass_ = _Pass(config, params, tokens, dtype, Room())
        for spec in config.layers:
            pass_.through(spec)
        return pass_.logits()


class Pair:
    """Two models of which one may have been grown from the other, to be compared. What two layers with the same weights
    make of the same input is computed once: the same operations on the same bits give the same bits. After an identity
    insert that is every old layer."""

    def __init__(self, before: TrainState, after: TrainState) -> None:
        self.before, self.after = before, after
        self._alike: dict[int, bool] = {}

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, dtype: torch.dtype, seen: Callable[[Tensor], None] = lambda stream: None
    ) -> tuple[Tensor, Tensor]:
        """``stream_logits`` of both. ``seen`` is given the new model's residual stream before each of its layers and
        after the last."""
        with _autocast(tokens, dtype):
            room, states = Room(), (self.before, self.after)
            old, new = (_Pass(state.config, state.params, tokens, dtype, room) for state in states)
            left = list(self.before.config.layers)
            for spec in self.after.config.layers:
                seen(new.x)
                if spec in left:
                    while left[0] != spec:  # the layers before it, that the new model has not, or changed
                        old.through(left.pop(0))
                    same = torch.equal(old.x, new.x) and self._same(spec)
                    old.through(left.pop(0))
                    if same:
                        new.x = old.x
                        continue
                new.through(spec)
            seen(new.x)
            for spec in left:
                old.through(spec)
            return old.logits(), new.logits()

    def _same(self, spec: LayerSpec) -> bool:
        """Whether ``spec`` is the same layer in both, weights included, which are read once for it."""
        if spec.id not in self._alike:
            configs = (dataclasses.replace(state.config, layers=()) for state in (self.before, self.after))
            prefix = f"layers.{spec.id}."
            names = [name for name in self.before.params if name.startswith(prefix)]
            old, new = self.before.params, self.after.params
            self._alike[spec.id] = next(configs) == next(configs) and all(torch.equal(old[n], new[n]) for n in names)
        return self._alike[spec.id]


def _autocast(tokens: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


class _Pass:
    """A forward pass; ``x`` (rows, context, embed): the residual stream so far. ``room``: for one layer's weights."""

    def __init__(
        self, config: ModelConfig, params: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype, room: Room
    ) -> None:
        self.config, self.params, self.room = config, params, room
        self.work = torch.float32 if dtype == torch.bfloat16 else dtype
        x = F.embedding(tokens, params["embedding.weight"]).to(self.work)
        mask = stream_mask(config, parts=config.parts)
        x = x if mask is None else mask(x)
        self.ends = fill(empty_ends(config), params, "stream.", self.work) if config.stream is not None else None
        self.x = x if self.ends is None else self.ends.entered(x)
        self.positions = torch.arange(tokens.shape[1], device=x.device)

    def through(self, spec: LayerSpec) -> None:
        layer = empty_layer(spec, self.config)
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, LinearProjection)}
        stored = {f"{name}.weight" for name in linear}
        fill(layer, self.params, f"layers.{spec.id}.", self.work, self.room, stored=stored)
        for module in linear.values():
            # Not bound to the module, which would then outlive its layer, its weights with it.
            module.forward = partial(self._linear, module.weight, module.bias)  # type: ignore[method-assign]
        self.x, _ = layer(self.x, rope_table(spec.mixer, self.positions, self.x.dtype))

    def _linear(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        if weight.dtype == x.dtype:
            return F.linear(x, weight, bias)
        out = self._product(x, weight, x.new_empty(*x.shape[:-1], len(weight)))
        return out if bias is None else out.add_(bias)

    def _product(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``x`` (..., in) times ``weight`` (out, in), written into ``out`` (..., out)."""
        start = 0
        for rows in torch.split(weight, max(1, PART_BYTES // weight[0].nbytes)):
            out[..., start : start + len(rows)] = F.linear(x, self.room.converted("part", rows, self.work))
            start += len(rows)
        return out

    def logits(self) -> Tensor:
        self.room.clear()  # the layers are behind
        config, x = self.config, self.x if self.ends is None else self.ends.left(self.x)
        h = fill(empty_norm(config), self.params, "final_norm.", self.work)(x)
        head = self.params["embedding.weight" if config.tied_head else "head.weight"]
        logits = h.new_empty(*x.shape[:-1], config.vocab_size, dtype=torch.promote_types(self.work, torch.float32))
        return self._product(h, head, logits).mul_(config.logit_scale)
