"""A run in a few figures: what it is, how far it got, and what it scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.checkpoint.run_folder import RunFolder
from growkit.config.load import read_mapping
from growkit.errors import ConfigError
from growkit.report.history import History, finite, labels, number


@dataclass(frozen=True)
class RunSummary:
    """``state``: complete | running (another process writes it) | unfinished (it can be resumed) | empty (no step yet,
    and nobody writes it). ``parameters``: at the start and now. ``tokens``, ``flops``, ``seconds``: so far; None where
    the log does not say. ``last``, ``best``: validation in bits per byte; of an extended run from its extension on, as
    it may score another text. ``ngram``: its order and score on the same text.
    ``max_delta_logits``: the largest over all growths, in float64. ``corpus``: hash of the text, of the last
    checkpoint. ``environment``: what the last checkpoint says of the machine. ``recipe``: as a mapping, empty if it
    cannot be read."""

    name: str
    folder: RunFolder
    history: History
    state: str
    parameters: tuple[float, float] | None
    tokens: float | None
    flops: float | None
    seconds: float | None
    last: float | None
    best: float | None
    validation_context: float | None
    ngram: tuple[int, float] | None
    growths: int
    max_delta_logits: float | None
    corpus: str | None
    environment: dict[str, Any]
    recipe: dict[str, Any]
    recipe_text: str

    @classmethod
    def read(cls, path: Path, name: str = "") -> RunSummary:
        """Works on a run that is still being written. Raises CheckpointError if ``path`` is no run, or its log is
        damaged."""
        folder = RunFolder.open(path)
        name = name or labels([path])[0]
        history = History.read(name, folder.metrics)
        recipe_text = folder.recipe.read_text(encoding="utf-8", errors="replace") if folder.recipe.is_file() else ""
        recipe = _mapping(recipe_text, str(folder.recipe))
        place = history.place
        sizes = [number(stage.get("parameters")) for stage in history.kind("stage")]
        sizes = [size for size in sizes if math.isfinite(size)]
        begun = number(_start(recipe).get("step", 0))
        at, scores = history.validations("step")
        if (at > begun).any():
            scores = scores[at > begun]
        contexts = [finite(number(record.get("context_length"))) for record in history.kind("validation")]
        beside = [r for r in history.kind("ngram") if number(r.get("step")) >= begun]
        scored = [(number(r.get("order")), number(r.get("bits_per_byte"))) for r in beside]
        ngrams = [(int(order), score) for order, score in scored if math.isfinite(order + score)]
        deltas = [
            number((growth.get("certificate") or {}).get("max_delta_logits_float64"))
            for growth in history.kind("growth")
        ]
        manifest = folder.last_manifest()
        return cls(
            name=name,
            folder=folder,
            history=history,
            state=_state(folder, history, recipe),
            parameters=(sizes[0], sizes[-1]) if sizes else None,
            tokens=place["tokens"],
            flops=place["flops"],
            seconds=place["seconds"],
            last=float(scores[-1]) if len(scores) else None,
            best=float(scores.min()) if len(scores) else None,
            validation_context=contexts[-1] if contexts else None,
            ngram=ngrams[-1] if ngrams else None,
            growths=len(history.kind("growth")),
            max_delta_logits=max((delta for delta in deltas if math.isfinite(delta)), default=None),
            corpus=manifest.corpus.get("text_sha256", manifest.corpus.get("sha256")) if manifest else None,
            environment=dict(manifest.environment) if manifest else {},
            recipe=recipe,
            recipe_text=recipe_text,
        )


def read_runs(paths: Sequence[Path]) -> list[RunSummary]:
    """Each under a name of its own. Raises ConfigError for a run named twice, and CheckpointError as ``read``."""
    return [RunSummary.read(path, name) for path, name in zip(paths, labels(paths), strict=True)]


def _state(folder: RunFolder, history: History, recipe: dict[str, Any]) -> str:
    if folder.writer() is not None:
        return "running"
    if not len(history.steps["step"]):
        return "empty"
    stages, first = recipe.get("stages"), number(_start(recipe).get("stage", 0))
    ended = {record.get("stage") for record in history.kind("validation") if record.get("end_of_stage") is True}
    return "complete" if isinstance(stages, list) and first + len(stages) - 1 in ended else "unfinished"


def _start(recipe: dict[str, Any]) -> dict[str, Any]:
    """Where an extended run begins; empty for a run from the beginning."""
    start = recipe.get("start")
    return start if isinstance(start, dict) else {}


def _mapping(text: str, name: str) -> dict[str, Any]:
    """Empty if the recipe was edited into something that is none: it is shown as it is, and not compared."""
    try:
        return read_mapping(text, name)
    except ConfigError:
        return {}
