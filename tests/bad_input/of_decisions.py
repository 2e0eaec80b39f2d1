"""Mistakes in what a run is to decide for itself."""

from __future__ import annotations

import pytest
import yaml

from growkit.config.load import read_mapping
from tests.bad_input.support import RUN, Case, train


def until(name: str, words: str, at: str, code: str, value: str, mend: str) -> Case:
    """A row for a trigger of the first of two stages, which have two steps; ``at``: the key to name, below it."""
    key = f"stages.0.until.{at}".removesuffix(".")
    return train(name, f"stages.0.until={{{words}}}", code, value, mend, key)


def _loss_lost(_: pytest.MonkeyPatch) -> None:
    """The run is in its second stage, which may now be ended early; a loss is no longer in its log."""
    recipe = read_mapping((RUN / "recipe.yaml").read_text(), "")
    recipe["stages"][1] |= {"duration": "9 steps", "until": {"kind": "plateau", "window": "1 step", "least": 0.1}}
    recipe["stages"].append({"name": "last", "duration": "2 steps"})
    (RUN / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log, lost = RUN / "metrics.jsonl", '"stage": 1, "step": 3'
    log.write_text(log.read_text().replace(f'"kind": "step", {lost}', f'"kind": "stop", {lost}'))


DECISION_CASES = [
    until("a trigger there is not", "kind: full_moon", "kind", "unknown-choice", "'full_moon'", "plateau, crossing"),
    until("a trigger of no kind", "window: 2 steps", "kind", "missing-key", "is missing", "kind"),
    until("a plateau without window", "kind: plateau, least: 0.1", "window", "missing-key", "is missing", "100 steps"),
    until("a plateau of no height", "kind: plateau, window: 1 step", "least", "missing-key", "is missing", "0.01"),
    until("a horizon of a plateau", "kind: plateau, horizon: 2", "horizon", "unused-key", "2.0", "window"),
    until("a patience of a crossing", "kind: crossing, patience: 2", "patience", "unused-key", "2", "horizon"),
    until("a window of words", "kind: plateau, window: long, least: 1", "window", "bad-duration", "'long'", "unit"),
    until(
        "a window without a loss", "kind: plateau, window: 0 steps, least: 1", "window", "too-small", "0 steps", "use 1"
    ),
    until("a fall below zero", "kind: plateau, window: 1 step, least: -1", "least", "too-small", "-1", "at least 0"),
    until(
        "no patience at all",
        "kind: plateau, window: 1 step, least: 1, patience: 0",
        "patience",
        "too-small",
        "0",
        "at least 1",
    ),
    until(
        "a trigger that sees too little",
        "kind: plateau, window: 1 step, least: 1",
        "",
        "until-too-long",
        "2 windows of 1",
        "2 steps",
    ),
    until("a crossing of few losses", "kind: crossing", "", "until-too-long", "15 logged losses", "2 steps"),
    until("a horizon of nothing", "kind: crossing, horizon: 0", "horizon", "not-positive", "0", "above zero"),
    until("a size that costs nothing", "kind: crossing, size_scale: -1", "size_scale", "not-positive", "-1", "above"),
    Case(
        "a crossing into the same model",
        "train recipe.yaml run.name=new 'stages.0.until={kind: crossing}' 'stages.1.grow={}'",
        "nothing-grows",
        "stages.0.until",
        "'crossing'",
        "kind: plateau",
    ),
    train(
        "a trigger of the last stage",
        "stages.1.until={kind: plateau, window: 1 step, least: 1}",
        "until-at-end",
        "'plateau'",
        "a stage after",
    ),
    Case(
        "losses that the log has lost",
        "resume runs/run",
        "lost-measurements",
        "runs/run/metrics.jsonl",
        "the loss of step 3",
        "restore the log",
        _loss_lost,
    ),
]
