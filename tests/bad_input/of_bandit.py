"""Mistakes in what a bandit chooses among."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.bad_input.support import RUN, Case, train

TWO = "data={mixture: [{source: corpus.txt}, {source: stdlib, weight: %s}], bandit: {over: sources}}"
DRAWN = "{schedule: buckets, start: 8, odds: [1, 1]%s}"


def of_sources(name: str, override: str, key: str, code: str, value: str, mend: str) -> Case:
    """A row for ``override`` beside a mixture that a bandit over sources goes with."""
    words = f"train recipe.yaml run.name=new {shlex.quote(TWO % 1)} {shlex.quote(override)}"
    return Case(name, words, code, key, value, mend)


def of_lengths(name: str, context: str, at: str, code: str, value: str, mend: str) -> Case:
    """A row for a bandit over the lengths of ``context``; ``at``: the key to name in it."""
    words = f"train recipe.yaml run.name=new 'data.bandit={{over: lengths}}' 'stages.0.context={context}'"
    return Case(name, words, code, f"stages.0.context.{at}", value, mend)


def _bandit_later(_: pytest.MonkeyPatch) -> None:
    """A run that began without a bandit gets one, where it could have had one."""
    file = RUN / "recipe.yaml"
    text = file.read_text().replace("  bandit: null\n", "  bandit: {over: lengths}\n")
    Path(file).write_text(text.replace("  context: null\n", f"  context: {DRAWN % ''}\n"))


BANDIT_CASES = [
    train("a bandit over nothing", "data.bandit={}", "missing-key", "is missing", "over", "data.bandit.over"),
    train("a bandit over something else", "data.bandit={over: tokens}", "unknown-choice", "'tokens'", "lengths",
          "data.bandit.over"),
    train("a bandit over one source", "data.bandit={over: sources}", "no-arms", "'sources'", "two sources",
          "data.bandit.over"),
    train("a bandit over a mixture of one", "data={mixture: [{source: corpus.txt}], bandit: {over: sources}}",
          "no-arms", "'sources'", "two sources", "data.bandit.over"),
    train("a bandit over one length", "data.bandit={over: lengths}", "no-arms", "'lengths'", "buckets",
          "data.bandit.over"),
    train("weights that a bandit chooses", TWO % 3, "chosen-by-bandit", "3.0", "the same weight",
          "data.mixture.1.weight"),
    of_sources("a bandit that learns nothing", "data.bandit.learning_rate=0", "data.bandit.learning_rate",
               "not-positive", "got 0.0", "above zero"),
    of_sources("a bandit that never tries", "data.bandit.exploration=0", "data.bandit.exploration", "out-of-range",
               "got 0.0", "above 0"),
    of_sources("a bandit that tries too much", "data.bandit.exploration=1.1", "data.bandit.exploration",
               "out-of-range", "got 1.1", "at most 1"),
    of_sources("a key that a bandit has not", "data.bandit.arms=2", "data.bandit.arms", "unknown-key", "is not a key",
               "over"),
    of_lengths("odds that a bandit chooses", "{schedule: buckets, start: 8, odds: [2, 1]}", "odds", "chosen-by-bandit",
               "[2, 1]", "[1, 1]"),
    of_lengths("a bandit over rows that stay", DRAWN % ", constant: rows", "constant", "chosen-by-bandit", "'rows'",
               "default"),
    of_lengths("a bandit over rows that are cut", DRAWN % ", how: truncate", "how", "chosen-by-bandit", "'truncate'",
               "default"),
    Case("a bandit in a run that began without", f"resume {RUN}", "recipe-changed", "recipe.yaml",
         "what chose the steps", "data.bandit", _bandit_later),
]  # fmt: skip
