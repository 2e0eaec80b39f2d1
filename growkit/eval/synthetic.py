"""Accuracy on a synthetic task: of single answers, and of sequences of which every answer is right.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit import faults
from growkit.data.synthetic.tasks import Task
from growkit.models.config import Mamba
from growkit.models.decoder import Cache, DecoderLM
from growkit.ops.targets import UNSCORED

PASS_TOKENS = 1 << 14  # of a forward pass; or one sequence if that is longer, in pieces where the mixers carry a state
NORMAL_95 = 1.959963984540054  # the middle 95 % of a normal distribution lie within so many standard deviations


@dataclass(frozen=True)
class TaskScore:
    """``loss``: nats per answer. ``token_accuracy``: share of the answers that are the likeliest token.
    ``sequence_accuracy``: share of the ``sequences`` with all answers right."""

    loss: float
    token_accuracy: float
    sequence_accuracy: float
    sequences: int

    @classmethod
    def of(cls, sums: Tensor, answers: int) -> TaskScore:
        """Of what ``task_sums`` gives, added up over processes; ``answers``: of a sequence."""
        nats, right_answers, right_sequences, sequences = sums.tolist()
        count = sequences * answers
        return cls(nats / count, right_answers / count, right_sequences / sequences, round(sequences))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the sequence accuracy."""
        return wilson(self.sequence_accuracy, self.sequences)


def task_sums(
    model: nn.Module,
    task: Task,
    seed: int,
    sequences: int,
    context_length: int,
    *,
    autocast: AbstractContextManager[object] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """float64 (4,): nats of the answers, right answers, right sequences, sequences; over this process's share of the
    first ``sequences`` samples of ``seed``. Memory beside the tokens does not grow with ``context_length`` where
    ``carries_state``."""
    first = sequences * rank // world_size
    count = sequences * (rank + 1) // world_size - first
    most = -(-sequences // world_size)  # sharded models must run the same number of passes everywhere
    rows = max(1, PASS_TOKENS // context_length)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad(), autocast or nullcontext():
        for index in range(0, most, rows):
            size = min(rows, most - index)
            mine = max(0, min(size, count - index))
            tokens, targets = map(torch.from_numpy, task.samples(seed, first + index, size, context_length))
            asked = targets != UNSCORED
            logits = asked_logits(model, tokens.to(device), asked.to(device)).float()
            answers = targets[asked].to(device)
            nats = F.cross_entropy(logits, answers, reduction="none").view(size, -1)[:mine]
            right = (logits.argmax(-1) == answers).view(size, -1)[:mine]
            sums += torch.stack([nats.double().sum(), right.sum(), right.all(1).sum(), nats.new_tensor(mine)]).cpu()
            if index == 0:
                faults.point("mid_validation")
    model.train(training)
    return sums


def carries_state(model: nn.Module) -> bool:
    """Whether all that ``model`` remembers is of one size, however long the sequence: every mixer is Mamba's."""
    return isinstance(model, DecoderLM) and all(isinstance(layer.mixer, Mamba) for layer in model.config.layers)


def asked_logits(model: nn.Module, tokens_BT: Tensor, asked_BT: Tensor) -> Tensor:
    """(answers, V), row by row. Of a model that carries its state a sequence longer than PASS_TOKENS is read in pieces
    of that many tokens, each from the state after the one before."""
    if tokens_BT.shape[1] <= PASS_TOKENS or not carries_state(model):
        logits: Tensor = model(tokens_BT)[asked_BT]
        return logits
    assert isinstance(model, DecoderLM)
    rows = []
    for row in range(tokens_BT.shape[0]):
        cache = Cache(model.config)
        for start in range(0, tokens_BT.shape[1], PASS_TOKENS):
            piece = slice(row, row + 1), slice(start, start + PASS_TOKENS)
            rows.append(model.logits(model.hidden(tokens_BT[piece], cache)[asked_BT[piece]]))
    return torch.cat(rows)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a probability that ``count`` trials met with ``share`` of them (Wilson 1927): it stays
    within 0..1, and is honest when all or none of them did."""
    z = NORMAL_95**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)
