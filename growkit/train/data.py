"""What a run needs of its data: a text, or a synthetic task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from growkit.checkpoint.reference import Reference, load_reference
from growkit.config.recipe import BYTES, Recipe
from growkit.data.corpus import Corpus, Part, load_corpus
from growkit.data.decomposed import Decomposed
from growkit.data.importance import drawn_blocks, require_block
from growkit.data.mixture import Mixture
from growkit.data.packing import Packed
from growkit.data.pieces import pieces_of, require_pieces
from growkit.data.stream import DataSource, TokenStream, validation_windows, windows
from growkit.data.synthetic.source import TaskSource
from growkit.data.synthetic.tasks import VALIDATION_SEED, Task, task_of
from growkit.data.tokenizer import load_tokenizer
from growkit.duration import quantity
from growkit.errors import DataError
from growkit.eval.ngram import bits
from growkit.eval.synthetic import TaskScore, task_sums
from growkit.eval.validate import mean_loss, target_positions, target_sizes
from growkit.schedule.selection import selection_of
from growkit.schedule.stage import GrowthSchedule


class RunData(Protocol):
    """``name``: of the source. ``amount``: how much there is, for the reader. ``sha256``: of what is trained on.
    ``record``: what a checkpoint says of it. ``bytes_per_token``: of what is trained on, on average. ``corpus``: the
    text that an n-gram counts and a sample goes on from; None where there is none. ``reference``: the model that
    ``data.select`` compares with; None where there is none."""

    @property
    def name(self) -> str: ...
    @property
    def amount(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def record(self) -> dict[str, Any]: ...
    @property
    def bytes_per_token(self) -> float: ...
    @property
    def corpus(self) -> Corpus | None: ...
    @property
    def reference(self) -> Reference | None: ...

    def require_same(self, record: Mapping[str, Any]) -> None:
        """Raises DataError when this is not what a run was trained on, as its ``record`` says."""
        ...

    def source(self, recipe: Recipe, schedule: GrowthSchedule) -> DataSource:
        """What is trained on."""
        ...

    def probe(self, context_length: int, tokens: int) -> Tensor:
        """About ``tokens`` held-out tokens, int64 (rows, context_length + 1)."""
        ...

    def score_sums(self, model: nn.Module, context_length: int, wanted_tokens: int, **options: Any) -> Tensor:
        """float64: this process's share of what ``scores`` is made of; ``options`` as of ``task_sums``."""
        ...

    def scores(self, sums: Tensor, context_length: int, wanted_tokens: int) -> dict[str, float]:
        """``loss``, ``bits_per_byte`` and whatever else there is to say of a model, from the sums of all processes."""
        ...


@dataclass(frozen=True)
class TextData:
    corpus: Corpus
    reference: Reference | None = None

    @property
    def name(self) -> str:
        return self.corpus.name

    @property
    def amount(self) -> str:
        corpus = self.corpus
        held_out = quantity(len(corpus.validation_text))
        sizes = f"{quantity(corpus.train_bytes)} bytes to train on, {held_out} held out"
        if corpus.tokenizer.name == BYTES:
            return sizes
        per_token = f"{corpus.bytes_per_token:.2f} bytes a token"
        return (
            f"{sizes}, as {quantity(corpus.train_tokens)} and {quantity(len(corpus.validation))} tokens ({per_token})"
        )

    @property
    def sha256(self) -> str:
        return self.corpus.sha256

    @property
    def record(self) -> dict[str, Any]:
        return self.corpus.record | ({} if self.reference is None else {"reference": self.reference.digest})

    @property
    def bytes_per_token(self) -> float:
        return self.corpus.bytes_per_token

    def require_same(self, record: Mapping[str, Any]) -> None:
        self.corpus.require_same(record)
        if self.reference is not None:
            self.reference.require_same(record.get("reference", self.reference.digest))

    def source(self, recipe: Recipe, schedule: GrowthSchedule) -> DataSource:
        sources = [_rows_of(part, recipe, schedule) for part in self.corpus.parts]
        selection = selection_of(recipe)
        if selection is not None and selection.kind == "importance":
            (stream,) = sources
            assert isinstance(stream, TokenStream), "what else there is has been refused"
            how = {"smoothing": selection.smoothing, "temperature": selection.temperature}
            return drawn_blocks(stream, unbiased=selection.unbiased, **how)
        return sources[0] if len(sources) == 1 else Mixture(sources, [part.weight for part in self.corpus.parts])

    def probe(self, context_length: int, tokens: int) -> Tensor:
        starts, _ = validation_windows(self.corpus.validation, context_length, max(context_length, tokens))
        inputs, targets = windows(self.corpus.validation, starts, context_length)
        return torch.cat((inputs, targets[:, -1:]), dim=1)

    def score_sums(self, model: nn.Module, context_length: int, wanted_tokens: int, **options: Any) -> Tensor:
        total, count = mean_loss(model, self.corpus.validation, context_length, wanted_tokens, **options)
        return torch.tensor([total, float(count)], dtype=torch.float64)

    def scores(self, sums: Tensor, context_length: int, wanted_tokens: int) -> dict[str, float]:
        """In nats per token, and in bits per byte of the text behind the scored tokens."""
        loss = float(sums[0] / sums[1])
        scored = target_positions(self.corpus.validation, context_length, wanted_tokens)
        size = float(target_sizes(self.corpus.validation_ends, scored).mean())
        return {"loss": loss, "bits_per_byte": bits(loss, size)}


def _rows_of(part: Part, recipe: Recipe, schedule: GrowthSchedule) -> DataSource:
    """As ``data.packing`` has them."""
    order: dict[str, Any] = {"seed": recipe.run.seed, "shuffle": recipe.data.shuffle}
    if recipe.data.packing == "decompose":
        return Decomposed(part.train, part.train_starts, lengths=schedule.lengths, **order)
    order["block_tokens"] = schedule.block_tokens
    if recipe.data.packing == "best_fit":
        return Packed(part.train, part.train_starts, **order)
    bounded = recipe.data.packing == "documents"
    return TokenStream(part.train, starts=part.train_starts if bounded else None, **order)


@dataclass(frozen=True)
class TaskData:
    """A token of a task counts as one byte: there is no text behind it."""

    task: Task
    bytes_per_token: float = 1.0
    corpus: None = None
    reference: None = None

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def amount(self) -> str:
        said = ", ".join(f"{key} {value}" for key, value in self.task.settings.items() if value is not None)
        return f"{said}; no text, so no n-gram and no sample"

    @property
    def sha256(self) -> str:
        return self.task.sha256

    @property
    def record(self) -> dict[str, Any]:
        return {"name": self.task.name, "sha256": self.task.sha256}

    def require_same(self, record: Mapping[str, Any]) -> None:
        if record["sha256"] != self.task.sha256:
            raise DataError(
                "corpus-changed",
                "is not the task this run was trained on: its settings, or growkit's generator, are others",
                key="data.task",
                value=self.task.settings,
                mend="restore the settings; to go on with another task, start a new run or `growkit extend`",
            )

    def source(self, recipe: Recipe, schedule: GrowthSchedule) -> TaskSource:
        return TaskSource(self.task, recipe.run.seed)

    def probe(self, context_length: int, tokens: int) -> Tensor:
        rows = max(1, tokens // context_length)
        return torch.from_numpy(self.task.samples(VALIDATION_SEED, 0, rows, context_length + 1).tokens)

    def score_sums(self, model: nn.Module, context_length: int, wanted_tokens: int, **options: Any) -> Tensor:
        sequences = max(1, wanted_tokens // context_length)
        return task_sums(model, self.task, VALIDATION_SEED, sequences, context_length, **options)

    def scores(self, sums: Tensor, context_length: int, wanted_tokens: int) -> dict[str, float]:
        score = TaskScore.of(sums, self.task.answers)
        return {
            "loss": score.loss,
            "bits_per_byte": bits(score.loss, self.bytes_per_token),
            "token_accuracy": score.token_accuracy,
            "sequence_accuracy": score.sequence_accuracy,
        }


def prepare_data(recipe: Recipe, schedule: GrowthSchedule) -> RunData:
    """What ``recipe`` trains on: long enough for its longest context, in ids that its model has. Raises DataError and
    ConfigError, and CheckpointError for a reference that is damaged."""
    task = task_of(recipe.data)
    if task is not None:  # whose lengths and vocabulary the schedule has checked
        return TaskData(task)
    tokenizer = load_tokenizer(recipe.data)
    tokenizer.require_room(schedule.start_model.vocab_size)
    corpus = load_corpus(recipe.data, tokenizer)
    corpus.require(schedule.max_context_length)
    if recipe.data.packing == "decompose":
        for part in corpus.parts:
            require_pieces(pieces_of(part.train_starts, len(part.train) - 1, schedule.lengths), part.name)
    if recipe.data.select is not None and recipe.data.select.kind == "importance":
        require_block(corpus.name, corpus.train_tokens, schedule.block_tokens)
    return TextData(corpus, load_reference(recipe.data.select, corpus, recipe.trainer.backend))
