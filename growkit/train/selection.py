"""What a step trains on of what it has read: tokens (Rho-1) or rows (RHO-LOSS), by the loss of a reference model; or
all of it, each row with its weight (importance sampling).

Legend: B rows, T tokens, N all targets of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from growkit.checkpoint.reference import Reference
from growkit.data.stream import Batch
from growkit.models.decoder import DecoderLM
from growkit.models.loss import EachLoss, TokenLoss
from growkit.models.visible import visible
from growkit.ops.targets import UNSCORED
from growkit.schedule.selection import Selection


class Selector:
    """Chooses, for one stage. ``chunk_tokens``, ``z_loss``: as of the model's forward. ``notes``: what is to be said of
    each micro-batch of the current step, name → number."""

    def __init__(
        self, selection: Selection, reference: Reference | None, *, chunk_tokens: int = 0, z_loss: float = 0.0
    ) -> None:
        assert (selection.reference is None) == (reference is None)
        self.selection, self.chunk_tokens, self.z_loss = selection, chunk_tokens, z_loss
        self.reference = None if reference is None else reference.model
        self.notes: list[dict[str, Tensor]] = []
        self._rows: list[Tensor] = []
        self._chosen = torch.empty(0)  # of the step's candidates, which rows
        self._note: dict[str, Tensor] = {}  # on how they were chosen

    def loss(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """Of what is trained on of ``batch``."""
        kinds = {"rho_1": self._rho_1, "rho_loss": self._rho_loss, "importance": self._weighted}
        return kinds[self.selection.kind](model, batch)

    def step_done(self) -> dict[str, Tensor]:
        """What there is to say of the step, as means over this process's micro-batches; the next one begins."""
        notes, self.notes = self.notes, []
        return {name: torch.stack([note[name] for note in notes]).mean() for name in notes[0]}

    def rows_done(self) -> Tensor:
        """Of the rows of the step: block, loss and weight, float64 (micro-batches, rows, 3); the next one begins."""
        rows, self._rows = self._rows, []
        return torch.stack(rows)

    def _rho_1(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """The mean over the tokens of largest excess loss, L_θ − L_ref (Lin et al. 2024, arXiv 2404.07965, equations
        2 to 5). The share is of this micro-batch: of more, no loss with gradients is in memory at once."""
        wanted = self._of_reference(batch)
        each = self._each(model, batch)
        scored = batch.targets != UNSCORED
        excess = each.cross_entropy.detach() - wanted
        kept = top_share(excess, scored if batch.unscored else None, self.selection.keep)
        count = kept.sum().clamp(min=1)
        everything = scored.sum().clamp(min=1)
        self.notes.append(
            {
                "kept": kept.sum() / everything,
                "excess": torch.where(kept, excess, 0).sum() / count,
                "excess_read": torch.where(scored, excess, 0).sum() / everything,
            }
        )
        total, cross_entropy = (torch.where(kept, of, 0).sum() / count for of in (each.total, each.cross_entropy))
        return TokenLoss(total if each.balance is None else total + each.balance, cross_entropy)

    def _rho_loss(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """The mean over this micro-batch's part of the step's rows of largest reducible hold-out loss (Mindermann et
        al. 2022, arXiv 2206.07137, algorithm 1). They are chosen before the first: no weight changes within a step."""
        rows = len(batch.tokens) // (self.selection.candidates * batch.parts)
        if batch.part == 0:
            self._choose(model, batch, rows)
        self.notes.append(self._note)
        mine = self._chosen[batch.part * rows : (batch.part + 1) * rows]
        part = _rows(batch, mine)
        mask = visible(part.tokens, part.segments, part.window)
        loss: TokenLoss = model(
            part.tokens, part.targets, mask=mask, z_loss=self.z_loss, chunk_tokens=self.chunk_tokens
        )
        return loss

    def _weighted(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """The mean over rows of weight × the row's mean (data/importance.py). The balance of experts has no weight."""
        assert batch.blocks is not None and batch.row_weights is not None
        each = self._each(model, batch)
        losses, weights = each.cross_entropy.mean(1), batch.row_weights
        self._rows.append(torch.stack([of.detach().double() for of in (batch.blocks, losses, weights)], dim=-1))
        total = (weights * each.total.mean(1)).mean()
        return TokenLoss(total if each.balance is None else total + each.balance, (weights * losses).mean())

    def _choose(self, model: nn.Module, batch: Batch, rows: int) -> None:
        """Scores ``rows`` at a time, as many as a training pass has, without dropout."""
        reducible = []
        training = model.training
        model.eval()
        with torch.no_grad():
            for places in torch.split(torch.arange(len(batch.tokens), device=batch.tokens.device), rows):
                part = _rows(batch, places)
                excess = self._each(model, part).cross_entropy - self._of_reference(part)
                reducible.append(excess.mean(1))
        model.train(training)
        scores = torch.cat(reducible)
        self._chosen = best_rows(scores, rows * batch.parts)
        excess = scores[self._chosen].mean()
        share = scores.new_tensor(1 / self.selection.candidates)
        self._note = {"kept": share, "excess": excess, "excess_read": scores.mean()}

    def _of_reference(self, batch: Batch) -> Tensor:
        """Its nats for each target, (B, T), with what the model sees before them."""
        assert self.reference is not None
        self.reference.to(batch.tokens.device)
        with torch.no_grad():
            return self._each(self.reference, batch).cross_entropy

    def _each(self, model: nn.Module | DecoderLM, batch: Batch) -> EachLoss:
        mask = visible(batch.tokens, batch.segments, batch.window)
        each: EachLoss = model(
            batch.tokens, batch.targets, mask=mask, each=True, z_loss=self.z_loss, chunk_tokens=self.chunk_tokens
        )  # flat: FSDP warns of a module that returns a view
        total, cross_entropy = (of.view_as(batch.targets) for of in (each.total, each.cross_entropy))
        return EachLoss(total, cross_entropy, each.balance)


def _rows(batch: Batch, places: Tensor) -> Batch:
    segments = None if batch.segments is None else batch.segments[places]
    return batch._replace(tokens=batch.tokens[places], targets=batch.targets[places], segments=segments)


def top_share(values: Tensor, among: Tensor | None, share: float) -> Tensor:
    """Where the largest ``share`` of ``values`` are, bool; to the nearest whole number, and one at least. ``among``
    (bool): what counts at all; None: everything. Of equal values the earlier ones."""
    flat = values.flatten()
    if among is not None:
        flat = torch.where(among.flatten(), flat, -torch.inf)
    everything = flat.numel() if among is None else int(among.sum())
    count = min(everything, max(1, int(share * everything + 0.5)))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    return kept.view_as(values)


def best_rows(scores: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest ``scores``, in the order they have; of equal ones the earlier."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values
