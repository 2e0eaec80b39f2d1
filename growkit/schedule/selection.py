"""``data.select``, settled: what a step trains on of what it reads, and what choosing it costs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from growkit.config.recipe import Recipe, SelectConfig
from growkit.errors import ConfigError
from growkit.models.config import ModelConfig, from_json
from growkit.schedule.checks import at_least, one_of

KEY = "data.select"
# kind: the settings that mean something to it alone
KINDS: Mapping[str, tuple[str, ...]] = {
    "rho_1": ("reference", "keep"),
    "rho_loss": ("reference", "candidates"),
    "importance": ("smoothing", "temperature", "unbiased"),
}
MOST_GRAPHS = 8  # torch.compile gives up on a model after as many, and goes on without them
SETTINGS = ("reference", "keep", "candidates", "smoothing", "temperature", "unbiased")


@dataclass(frozen=True)
class Selection:
    """As SelectConfig, with its defaults. ``reference``: the model whose loss is taken off; None where there is
    none. ``candidates``: rows that are read for each that is trained on; 1 but of ``rho_loss``."""

    kind: str
    reference: ModelConfig | None = None
    keep: float = 0.6
    candidates: int = 1
    smoothing: float = 0.2
    temperature: float = 1.0
    unbiased: bool = True

    def flops(self, model: ModelConfig, length: int, tokens: int) -> float:
        """Of choosing what a step of ``tokens`` trains on: forward passes over all that is read, by the reference, and
        of ``rho_loss`` by the model too, whose own training pass comes after."""
        scoring = 0.0 if self.reference is None else self.reference.forward_flops_per_token(length)
        if self.kind == "rho_loss":
            scoring += model.forward_flops_per_token(length)
        return scoring * self.candidates * tokens


def selection_of(recipe: Recipe) -> Selection | None:
    """What ``data.select`` means; None without one. The reference has been described (checkpoint/reference.py). Raises
    ConfigError."""
    config = recipe.data.select
    if config is None:
        return None
    one_of(config.kind, tuple(KINDS), f"{KEY}.kind")
    for name in SETTINGS:
        if name not in KINDS[config.kind] and getattr(config, name) is not None:
            problem = f"means nothing to the kind {config.kind}"
            mend = f"drop it; {config.kind} reads {', '.join(KINDS[config.kind])}"
            raise ConfigError("unused-key", problem, key=f"{KEY}.{name}", value=getattr(config, name), mend=mend)
    _check_values(config)
    _check_data(recipe, config.kind)
    given = {name: value for name in KINDS[config.kind] if (value := getattr(config, name)) is not None}
    if "reference" in KINDS[config.kind]:
        if given.get("reference") is None:
            mend = "name a run, a checkpoint or a Hugging Face folder whose model has this vocabulary"
            raise ConfigError("missing-key", "is missing", key=f"{KEY}.reference", mend=mend)
        given["reference"] = from_json(config.reference_model, key=f"{KEY}.reference_model")
    if config.kind == "rho_loss":
        given.setdefault("candidates", 4)
    return Selection(config.kind, **given)


def _check_values(config: SelectConfig) -> None:
    for name in ("keep", "smoothing"):
        share = getattr(config, name)
        if share is not None and not 0 < share <= 1:
            problem = "must be above 0 and at most 1"
            raise ConfigError("out-of-range", problem, key=f"{KEY}.{name}", value=share)
    if config.candidates is not None:
        at_least(config.candidates, 2, f"{KEY}.candidates")
    if config.temperature is not None and not config.temperature > 0:
        problem = "must be above zero"
        raise ConfigError("not-positive", problem, key=f"{KEY}.temperature", value=config.temperature)


def _check_data(recipe: Recipe, kind: str) -> None:
    """Raises ConfigError for what does not go with choosing rows or blocks."""
    data = recipe.data
    if data.bandit is not None:
        problem = "trains on a part of what is read, and data.bandit measures what all of it taught"
        raise _does_not_fit(kind, problem, "leave data.bandit out, or data.select")
    if kind != "rho_1" and data.packing == "best_fit":
        problem = "compares rows, and those of data.packing=best_fit differ in what they hold"
        raise _does_not_fit(kind, problem, "use packing none or documents, or the kind rho_1")
    if kind == "importance":
        if data.mixture:
            problem = "draws blocks by their losses alone, and data.mixture says how much of each source there is to be"
            raise _does_not_fit(kind, problem, "use one source, or another kind")
        if data.packing == "decompose":
            problem = "draws rows anywhere in a block, and data.packing=decompose has cut documents beforehand"
            raise _does_not_fit(kind, problem, "use packing none or documents, or another kind")
        if not data.shuffle:
            problem = "draws at random, and data.shuffle=false asks for the order of the text"
            raise _does_not_fit(kind, problem, "drop data.shuffle, or use another kind")


def check_stage(
    selection: Selection, key: str, model: ModelConfig, context_length: int, how: str, lengths: int, compiles: bool
) -> None:
    """Raises ConfigError for a stage (its key, model, longest context, how shorter rows are made, how many lengths, and
    whether it is compiled) that the selection does not go with."""
    reference = selection.reference
    if reference is not None and reference.vocab_size != model.vocab_size:
        problem = f"has a vocabulary of {reference.vocab_size}, and the model of {key} one of {model.vocab_size}"
        mend = "name a reference with the same tokenizer and vocabulary"
        raise ConfigError("other-vocabulary", problem, key=f"{KEY}.reference", mend=mend)
    if selection.kind == "importance" and how != "rechunk":
        problem = f"draws a row at a time, and {key}.context.how={how} cuts rows up"
        raise _does_not_fit(selection.kind, problem, "use how: rechunk")
    if selection.kind == "rho_loss" and compiles and 2 * lengths > MOST_GRAPHS:
        problem = f"compiles every length twice, with gradients and without, and {key} has {lengths} lengths"
        mend = f"use at most {MOST_GRAPHS // 2} (context.most_lengths), or trainer.compile=false"
        raise _does_not_fit(selection.kind, problem, mend)


def check_block(selection: Selection, block_tokens: int, longest: int) -> None:
    """Raises ConfigError for blocks that do not hold a row."""
    if selection.kind == "importance" and block_tokens < longest:
        problem = f"draws blocks, and data.block_tokens={block_tokens} is below the longest context_length, {longest}"
        raise _does_not_fit(selection.kind, problem, f"use {longest} or more, or leave data.block_tokens out")


def _does_not_fit(kind: str, problem: str, mend: str) -> ConfigError:
    return ConfigError("selection-does-not-fit", problem, key=f"{KEY}.kind", value=kind, mend=mend)
