"""What a step has taught: by how much it lowered the loss of its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from growkit.data.stream import Batch
from growkit.models.loss import TokenLoss


class _Seen(NamedTuple):
    """A micro-batch, the random state before its forward pass, and its loss in it."""

    batch: Batch
    random: Tensor
    cuda_random: Tensor | None
    loss: Tensor


class PredictionGain:
    """PG = L(x, θ) − L(x, θ′) (Graves et al. 2017, section 3.1), in nats per scored token: θ before a step, θ′ after
    it; x the first ``micro_batches`` of the step, of every process. L(x, θ) is the loss that was trained on anyway,
    L(x, θ′) is one more forward pass, in which dropout draws what it drew in the first: the difference is what
    was learned. What training draws next does not change."""

    def __init__(self, token_loss: Callable[[Batch], TokenLoss], micro_batches: int, *, compiled: bool) -> None:
        self.token_loss, self.micro_batches, self.compiled = token_loss, micro_batches, compiled
        self._seen: list[_Seen] = []

    def before(self, batch: Batch) -> TokenLoss:
        """The loss of a micro-batch that is trained on."""
        if len(self._seen) == self.micro_batches:
            return self.token_loss(batch)
        random = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state(batch.tokens.device) if batch.tokens.is_cuda else None
        loss = self.token_loss(batch)
        self._seen.append(_Seen(batch, random, cuda, loss.cross_entropy.detach()))
        return loss

    def after(self, trainer: L.Trainer, model: torch.nn.Module) -> float:
        """PG of the step that was just done, the same in every process. Every process calls this."""
        seen, self._seen = self._seen, []
        devices = [seen[0].batch.tokens.device] if seen[0].batch.tokens.is_cuda else []
        fell = torch.zeros(2, dtype=torch.float64, device=seen[0].loss.device)  # of all scored tokens, and how many
        # A compiled model has a graph for training and would need another one for each length without gradients.
        with (
            torch.random.fork_rng(devices),
            torch.set_grad_enabled(self.compiled),
            trainer.precision_plugin.train_step_context(),
        ):
            for batch, random, cuda, loss in seen:
                torch.set_rng_state(random)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, batch.tokens.device)
                now = self.token_loss(batch).cross_entropy.detach()
                fell += torch.stack((loss.double() - now.double(), torch.ones_like(fell[0]))) * batch.weight
        if isinstance(model, FSDPModule):  # a forward pass without a backward pass leaves the root gathered
            model.reshard()
        if trainer.world_size > 1:
            fell = trainer.strategy.reduce(fell, reduce_op="sum")
        total, scored = fell.tolist()
        return total / scored if scored else 0.0
