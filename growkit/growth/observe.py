"""What the parts of a model see on a probe, for ways to grow that look before they choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from growkit.growth.state import TrainState
from growkit.models.config import PROJECTIONS, Attention
from growkit.models.decoder import build
from growkit.models.layers import Layer


@dataclass(frozen=True)
class Seen:
    """One projection or MLP on a probe of N positions: ``inputs`` (N, in), and ``gradients`` (N, out) of the loss with
    respect to what it gives out; None where only what it read was recorded. In the dtype of the parameters."""

    inputs: Tensor
    gradients: Tensor | None


@torch.enable_grad()  # tensors may be asked for, and so grown, where gradients are off
def observe(state: TrainState, probe: Tensor) -> Mapping[str, Seen]:
    """By prefix of the parameters' names (``layers.0.mlp.``, ``layers.0.attention.q.``) what each part of each layer
    sees on ``probe`` (rows, context + 1), in one pass forward and one back. Holds the model once."""
    model = build(state.config, state.params, copy=False).eval()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(module: nn.Module, *prefixes: str) -> None:
        def before(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.update(dict.fromkeys(prefixes, given[0].detach()))

        def after(_: nn.Module, __: object, output: Tensor | tuple[Tensor, Tensor | None]) -> None:
            output = output[0] if isinstance(output, tuple) else output  # experts give their balance loss as well
            output.retain_grad()
            outputs.update(dict.fromkeys(prefixes, output))

        module.register_forward_pre_hook(before)
        if len(prefixes) == 1:
            module.register_forward_hook(after)

    for layer in state.config.layers:
        prefix, module = f"layers.{layer.id}.", model.layers[str(layer.id)]
        assert isinstance(module, Layer)
        if isinstance(layer.mixer, Attention):
            watch(module.attention, *(f"{prefix}attention.{part}." for part in "qkv"))  # the three share their op
            watch(module.attention.o, f"{prefix}attention.o.")
        else:
            for part in PROJECTIONS["mamba"]:
                watch(getattr(module.mamba, part), f"{prefix}mamba.{part}.")
        if module.mlp is not None:
            watch(module.mlp, f"{prefix}mlp.")
    model(probe[:, :-1], probe[:, 1:]).total.backward()
    seen = {}
    for prefix, given in inputs.items():
        gradient = outputs[prefix].grad if prefix in outputs else None
        seen[prefix] = Seen(given.flatten(0, 1), gradient.flatten(0, 1) if gradient is not None else None)
    return seen


def own(seen: Mapping[str, Seen], name: str) -> Seen | None:
    """What the part that parameter ``name`` belongs to saw, if it was watched."""
    return next((found for prefix, found in seen.items() if name.startswith(prefix)), None)
