"""Parts of tensors that stand still: old entries of a parameter that grew, among new ones that train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class HeldEntries:
    """Puts ``still`` entries (bool, by parameter) back after every step of ``optimizer``, and their moments, bitwise:
    even without a gradient AdamW would decay both. A parameter that has moments must have them when this is made."""

    def __init__(self, still: Mapping[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._still = dict(still)
        self._kept: list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]] = []  # with its values and moments
        for parameter, at in self._still.items():
            moments = optimizer.state.get(parameter, {})  # none before its first update, and then zero without gradient
            kept = {key: moments[key][at] for key in ("exp_avg", "exp_avg_sq") if moments}
            self._kept.append((parameter, parameter.detach()[at], kept))
        optimizer.register_step_post_hook(self._put_back)

    def mask_gradients(self) -> None:
        """Zeroes the gradients of what stands still, so that norms and clipping are of what trains."""
        for parameter, at in self._still.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(at, 0)

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, values, moments in self._kept:
            at = self._still[parameter]
            parameter.masked_scatter_(at, values)
            for key, moment in moments.items():
                optimizer.state[parameter][key].masked_scatter_(at, moment)
