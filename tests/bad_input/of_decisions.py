"""Mistakes in what a run is to decide for itself."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import yaml

from growkit.checkpoint import manifest as manifests
from growkit.config.load import read_mapping
from growkit.schedule.decisions import CANDIDATES, Decision
from tests.bad_input.support import LAST, RUN, Case, train


def until(name: str, words: str, at: str, code: str, value: str, mend: str) -> Case:
    """A row for a trigger of the first of two stages, which have two steps; ``at``: the key to name, below it."""
    key = f"stages.0.until.{at}".removesuffix(".")
    return train(name, f"stages.0.until={{{words}}}", code, value, mend, key)


def candidates(
    name: str, words: str, at: str, code: str, value: str, mend: str, *more: str, probe: str = "1 step"
) -> Case:
    """A row for candidates of the second of two stages, which have two steps; ``at``: the key to name, below it."""
    given = [f"stages.1.probe={probe}"] if probe else []
    overrides = [f"stages.1.candidates=[{words}]", *given, *(more or ("stages.1.grow={}",))]
    options = " ".join(map(shlex.quote, overrides))
    return Case(name, f"train recipe.yaml run.name=new {options}", code, f"stages.{at}", value, mend)


def _other_choice(_: pytest.MonkeyPatch) -> None:
    """The run is in a stage whose growth it is said to have chosen among others."""
    recipe = read_mapping((RUN / "recipe.yaml").read_text(), "")
    recipe["stages"][1] |= {"grow": {}, "candidates": [{"name": "deep", "grow": {"num_layers": 2}}], "probe": "1 step"}
    (RUN / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    manifest = manifests.read(Path(LAST))
    made = (Decision(CANDIDATES, 1, "tokens", 0, 2, 0, 0.0, chosen="wide"),)
    progress = dataclasses.replace(manifest.progress, decisions=made)
    Path(LAST, manifests.NAME).write_bytes(manifests.encode(dataclasses.replace(manifest, progress=progress)))


DEEP, WIDE = "{name: deep, grow: {num_layers: 2}}", "{name: wide, grow: {mlp_tokens: 16}}"
MANY = ", ".join(f"{{name: a{size}, grow: {{mlp_tokens: {size}}}}}" for size in range(9, 210))


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
    candidates(
        "a selection beside candidates",
        DEEP,
        "1.candidates",
        "two-choosers",
        "data.select",
        "drop data.select",
        "stages.1.grow={}",
        "data.select={kind: importance}",
    ),
    candidates(
        "a growth beside candidates", DEEP, "1.grow", "two-growths", "16", "drop it", "stages.1.grow={mlp_tokens: 16}"
    ),
    candidates("no probe", DEEP, "1.probe", "missing-key", "is missing", "30 steps", probe=""),
    train("a probe of nothing", "stages.1.probe=1 step", "unused-key", "'1 step'", "write candidates"),
    candidates("a probe of no step", DEEP, "1.probe", "too-small", "'0 steps'", "one step", probe="0 steps"),
    candidates("a probe in words", DEEP, "1.probe", "bad-duration", "'some'", "unit", probe="some"),
    candidates("a probe beyond the stage", DEEP, "1.probe", "probe-too-long", "'2 steps'", "2 steps", probe="2 steps"),
    candidates(
        "a gain below zero",
        DEEP,
        "1.probe_least",
        "too-small",
        "-1",
        "at least 0",
        "stages.1.probe_least=-1",
        "stages.1.grow={}",
    ),
    candidates(
        "two candidates of a name", f"{DEEP}, {DEEP}", "1.candidates", "duplicate-name", "['deep', 'deep']", "own"
    ),
    candidates(
        "a candidate called none",
        "{name: none, grow: {num_layers: 2}}",
        "1.candidates",
        "duplicate-name",
        "['none']",
        "that of not growing",
    ),
    candidates(
        "a candidate that does not grow",
        f"{DEEP}, {{name: same, grow: {{}}}}",
        "1.candidates.1.grow",
        "nothing-grows",
        "with the candidate 'same'",
        "a larger size",
    ),
    candidates(
        "a candidate without growth",
        "{name: same}",
        "1.candidates.0.grow",
        "missing-key",
        "is missing",
        "name and grow",
    ),
    candidates(
        "a candidate of no operator",
        f"{DEEP}, {{name: more, grow: {{wings: 2}}}}",
        "1.candidates.1.grow.wings",
        "cannot-grow",
        "2",
        "allowed",
    ),
    candidates(
        "a candidate's unused method",
        "{name: deep, grow: {num_layers: 2}, methods: {depth: stack, mlp: masked}}",
        "1.candidates.0.methods.mlp",
        "unused-method",
        "'masked'",
        "drop it",
    ),
    candidates(
        "nothing trains without growth",
        DEEP,
        "1.freeze",
        "all-frozen",
        "where no candidate is chosen",
        "leave something",
        "stages.1.grow={}",
        "stages.1.freeze=[old]",
    ),
    Case(
        "a choice that leaves nothing to grow",
        "train recipe.yaml run.name=new 'stages=[{name: first, duration: 2 steps, context_length: 16, "
        f"global_batch_tokens: 128}}, {{name: tokens, duration: 9 steps, probe: 1 step, candidates: [{DEEP}, {WIDE}]}}"
        ", {name: last, duration: 2 steps, grow: {mlp_tokens: 16}}]'",
        "nothing-grows",
        "stages.2.grow",
        "if the choice in 'tokens' is 'wide'",
        "larger size",
    ),
    candidates("far too many candidates", MANY, "1.candidates", "too-many-outcomes", "200 schedules", "fewer"),
    Case(
        "a choice that is no more",
        "resume runs/run",
        "recipe-changed",
        "stages.1.candidates",
        "'wide'",
        "undo",
        _other_choice,
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
