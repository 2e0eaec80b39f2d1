"""torch's modules without an initialisation of their own: parameters come from ``init_params`` or a state. Drawing them
first, on the meta device, would load torch's compiler: seconds at the start of every process."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leaves the table unset."""


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leaves weight and bias unset."""
