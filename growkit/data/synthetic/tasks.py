"""Synthetic tasks: sequences whose answers can only be had by remembering. No torch here.

A sample is a function of the task, a seed, its number and the context length alone. Training seeds are a run's
(``run.seed``, below 2^63); the two seeds above are for scoring, so no run trains on what it is scored on.

Legend: T context length.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from growkit.config.load import read_settings
from growkit.config.recipe import SYNTHETIC, DataConfig
from growkit.data.synthetic.draws import Draws
from growkit.errors import ConfigError
from growkit.ops.targets import UNSCORED
from growkit.registry import Registry

VALIDATION_SEED = 2**63  # of what a run is validated on
EVALUATION_SEED = 2**63 + 1  # of what `growkit eval` scores
VERSION = 1  # of what the generators draw: a run goes on with the samples it began with


class Samples(NamedTuple):
    """``tokens``, ``targets``: int64 (samples, T). ``targets`` are UNSCORED but for the answers, each at the token that
    asks for it."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class Task(ABC):
    """Its fields are its settings. An answer may be asked for by the answer before it, which is then the right one, as
    in training: all answers of a sequence are right just when the model would have written them so by itself."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Every token is below."""

    @property
    @abstractmethod
    def answers(self) -> int:
        """Scored targets of a sequence, whatever its length."""

    @property
    @abstractmethod
    def least_length(self) -> int:
        """Tokens of the shortest sequence there is."""

    @abstractmethod
    def _draw(self, draws: Draws, count: int, length: int) -> Samples:
        """``count`` samples of ``length`` tokens."""

    def samples(self, seed: int, first: int, count: int, context_length: int) -> Samples:
        """The samples ``first`` .. ``first + count`` of ``seed``. Raises ConfigError for too short a context."""
        self.require_length(context_length, "context_length")
        return self._draw(Draws(seed, first, count), count, context_length)

    def require_length(self, context_length: int, key: str) -> None:
        """Raises ConfigError, which names ``key``, when a sequence does not fit into ``context_length``."""
        if context_length < self.least_length:
            problem = f"is too short for the task {self.name}, which needs {self.least_length}"
            mend = f"use {self.least_length} or more, or less of {', '.join(self.settings)}"
            raise ConfigError("context-too-short", problem, key=key, value=context_length, mend=mend)

    def require_room(self, vocab_size: int) -> None:
        """Raises ConfigError when a model of ``vocab_size`` lacks some of the tokens."""
        if vocab_size < self.vocab_size:
            problem = f"cannot hold the tokens of {self.name}, which reach {self.vocab_size - 1}"
            mend = f"use {self.vocab_size} or more"
            raise ConfigError("vocab-too-small", problem, key="model.vocab_size", value=vocab_size, mend=mend)

    @property
    def name(self) -> str:
        return next(name for name, kind in TASKS.items() if kind is type(self))

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def sha256(self) -> str:
        """Of what decides the samples of a seed."""
        return hashlib.sha256(json.dumps([VERSION, self.name, self.settings], sort_keys=True).encode()).hexdigest()

    def check(self, key: str) -> None:
        """Raises ConfigError, with ``key`` in front, for a setting that cannot be."""
        for name, value in self.settings.items():
            if isinstance(value, int) and value < 1:
                raise ConfigError("too-small", "must be at least 1", key=f"{key}.{name}", value=value)


TASKS: Registry[type[Task]] = Registry("synthetic task")


@TASKS.register("synthetic/selective-copying")
@dataclass(frozen=True)
class SelectiveCopying(Task):
    """``memorise`` values, each at a random place in noise, then as many markers: at marker i, say value i.

    Gu & Dao 2023 (arXiv 2312.00752), section 4.1 and appendix E.1: 16 tokens in all, 16 to memorise, T = 4096.
    """

    values: int = 14  # with noise and marker the paper's 16 tokens
    memorise: int = 16

    @property
    def vocab_size(self) -> int:
        return self.values + 2

    @property
    def answers(self) -> int:
        return self.memorise

    @property
    def least_length(self) -> int:
        return 2 * self.memorise

    def _draw(self, draws: Draws, count: int, length: int) -> Samples:
        noise, marker = self.values, self.values + 1
        shown = length - self.memorise
        tokens, targets = np.full((count, length), noise), np.full((count, length), UNSCORED)
        values = draws.below(self.values, self.memorise)
        np.put_along_axis(tokens, np.sort(draws.different(shown, self.memorise), axis=1), values, axis=1)
        tokens[:, shown:], targets[:, shown:] = marker, values
        return Samples(tokens, targets)


@TASKS.register("synthetic/induction")
@dataclass(frozen=True)
class Induction(Task):
    """Random values, one trigger among them, and the trigger again as the last token: say what followed the first.

    Gu & Dao 2023 (arXiv 2312.00752), section 4.1 and appendix E.2, after Olsson et al. 2022 (arXiv 2209.11895): 16
    tokens in all, trained at T = 256.
    """

    values: int = 15  # with the trigger the paper's 16 tokens

    @property
    def vocab_size(self) -> int:
        return self.values + 1

    @property
    def answers(self) -> int:
        return 1

    @property
    def least_length(self) -> int:
        return 3

    def _draw(self, draws: Draws, count: int, length: int) -> Samples:
        trigger = self.values
        tokens, targets = draws.below(self.values, length), np.full((count, length), UNSCORED)
        place = draws.below(length - 2, 1)
        np.put_along_axis(tokens, place, trigger, axis=1)
        tokens[:, -1], targets[:, -1:] = trigger, np.take_along_axis(tokens, place + 1, axis=1)
        return Samples(tokens, targets)


@TASKS.register("synthetic/associative-recall")
@dataclass(frozen=True)
class AssociativeRecall(Task):
    """``pairs`` of a key and a value, the keys of a sequence all different; then each key once more, blanks between: at
    each, say its value.

    Multi-query associative recall, Arora et al. 2023 (arXiv 2312.04927), section 3 and appendix E: the place of a
    question, counted in steps of two tokens from 1, is drawn with P(g) ∝ g^(power - 1). Between questions the paper's
    code has random tokens or blanks; here they are blanks.
    """

    pairs: int = 8
    keys: int = 4096
    values: int = 4096  # with the keys about the paper's 8192 tokens
    power: float = 0.01  # of the places of questions; small: soon after the pairs

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values

    @property
    def answers(self) -> int:
        return self.pairs

    @property
    def least_length(self) -> int:
        return 4 * self.pairs

    def check(self, key: str) -> None:
        super().check(key)
        if self.keys < self.pairs:
            problem, mend = f"is less than pairs = {self.pairs}, whose keys are all different", f"use {self.pairs}"
            raise ConfigError("too-small", problem, key=f"{key}.keys", value=self.keys, mend=f"{mend} or more")
        if not self.power > 0:
            raise ConfigError("not-positive", "must be above zero", key=f"{key}.power", value=self.power)

    def _draw(self, draws: Draws, count: int, length: int) -> Samples:
        shown = 2 * self.pairs
        tokens, targets = np.zeros((count, length), dtype=np.int64), np.full((count, length), UNSCORED)
        keys = 1 + draws.different(self.keys, self.pairs)
        values = 1 + self.keys + draws.below(self.values, self.pairs)
        tokens[:, 0:shown:2], tokens[:, 1:shown:2] = keys, values
        gaps = np.arange(1, (length - shown) // 2 + 1, dtype=np.float64)
        places = shown + 2 * draws.weighted(gaps ** (self.power - 1), self.pairs)
        np.put_along_axis(tokens, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)
        return Samples(tokens, targets)


@TASKS.register("synthetic/needle")
@dataclass(frozen=True)
class Needle(Task):
    """A key and its ``length`` values, all different, in a stream of fillers; the key again at the end: say the values,
    one after the other.

    The needle in a haystack of Kamradt 2023 in the form of RULER's S-NIAH (Hsieh et al. 2024, arXiv 2404.06654), with
    tokens for words.
    """

    fillers: int = 16
    keys: int = 16
    values: int = 16
    length: int = 4  # values of the needle
    depth: float | None = None  # of the needle, 0 (first) .. 1 (last); default: anywhere

    @property
    def vocab_size(self) -> int:
        return self.fillers + self.keys + self.values

    @property
    def answers(self) -> int:
        return self.length

    @property
    def least_length(self) -> int:
        return 2 * self.length + 1

    def check(self, key: str) -> None:
        super().check(key)
        if self.values < self.length:
            problem, mend = f"is less than length = {self.length}, whose values are all different", f"use {self.length}"
            raise ConfigError("too-small", problem, key=f"{key}.values", value=self.values, mend=f"{mend} or more")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError("out-of-range", "must be in [0, 1]", key=f"{key}.depth", value=self.depth)

    def _draw(self, draws: Draws, count: int, length: int) -> Samples:
        hay = length - self.length  # what is before the question
        tokens, targets = draws.below(self.fillers, length), np.full((count, length), UNSCORED)
        keys = self.fillers + draws.below(self.keys, 1)
        values = self.fillers + self.keys + draws.different(self.values, self.length)
        last = hay - self.length - 1
        first = draws.below(last + 1, 1) if self.depth is None else np.full((count, 1), round(self.depth * last))
        np.put_along_axis(tokens, first + np.arange(self.length + 1), np.hstack((keys, values)), axis=1)
        tokens[:, hay:], targets[:, hay:] = np.hstack((keys, values[:, :-1])), values
        return Samples(tokens, targets)


def is_task(source: str | None) -> bool:
    return source is not None and source.startswith(SYNTHETIC)


def make_task(name: str, settings: Mapping[str, Any], *, key: str, settings_key: str) -> Task:
    """The task ``name`` with ``settings``; the keys are what to blame. Raises ConfigError."""
    task = read_settings(dict(settings), TASKS.get(name, key=key), settings_key)
    assert isinstance(task, Task)
    task.check(settings_key)
    return task


def task_of(data: DataConfig) -> Task | None:
    """The task that ``data.source`` names; None if it is a text. Raises ConfigError, also for what does not go with
    it."""
    if data.source is None or not is_task(data.source):
        if data.task:
            mend = f"leave it out, or name one of {', '.join(TASKS)}"
            problem = f"is for a synthetic task, and data.source is {data.source!r}"
            raise ConfigError("not-a-task", problem, key="data.task", value=data.task, mend=mend)
        return None
    task = make_task(data.source, data.task, key="data.source", settings_key="data.task")
    default = DataConfig()
    for field in dataclasses.fields(DataConfig):
        value, wanted = getattr(data, field.name), getattr(default, field.name)
        if field.name not in ("source", "task", "bandit", "block_tokens") and value != wanted:
            problem, mend = f"is for text, and data.source is {data.source!r}", f"leave it at {wanted!r}"
            raise ConfigError("not-for-a-task", problem, key=f"data.{field.name}", value=value, mend=mend)
    return task
