"""Mistakes in curricula, and in rotary angles that grow."""

from __future__ import annotations

from tests.bad_input.support import Case, train


def curriculum(name: str, words: str, at: str, code: str, value: str, mend: str, section: str = "context") -> Case:
    """A row for a curriculum of a stage of two steps, 16 tokens long; ``at``: the key to name, below the stage."""
    return train(name, f"stages.0.{section}={{{words}}}", code, value, mend, f"stages.0.{at}")


CURRICULUM_CASES = [
    curriculum(
        "a schedule there is not",
        "schedule: cubic, start: 8",
        "context.schedule",
        "unknown-choice",
        "'cubic'",
        "buckets",
    ),
    curriculum("a curriculum without start", "schedule: linear", "context.start", "missing-key", "is missing", "start"),
    curriculum(
        "a start above the whole", "schedule: root, start: 32", "context.start", "too-large", "32", "16 or less"
    ),
    curriculum("a start at the whole", "schedule: root, start: 16", "context.start", "too-large", "16", "start below"),
    curriculum(
        "a start of no multiple", "schedule: linear, start: 10", "context.start", "not-a-multiple", "10", "use 8"
    ),
    curriculum(
        "a whole of no multiple",
        "schedule: linear, start: 12, multiple: 12",
        "context_length",
        "not-a-multiple",
        "16",
        "use 12",
    ),
    curriculum("a negative start", "schedule: linear, start: -8", "context.start", "not-a-multiple", "-8", "use 8"),
    curriculum(
        "multiples of nothing",
        "schedule: linear, start: 8, multiple: 0",
        "context.multiple",
        "too-small",
        "0",
        "at least 1",
    ),
    curriculum(
        "a list that falls",
        "schedule: discrete, start: 8, at: {40%: 16, 60%: 8}",
        "context.at",
        "not-rising",
        "[8, 16, 8]",
        "above",
    ),
    curriculum(
        "a place twice",
        "schedule: discrete, start: 4, multiple: 4, at: {50%: 8, 1 step: 16}",
        "context.at",
        "not-rising",
        "twice",
        "apart",
    ),
    Case(
        "more graphs than are allowed",
        "train recipe.yaml run.name=new trainer.compile=true trainer.most_graphs=1",
        "too-many-graphs",
        "trainer.most_graphs",
        "2 graphs",
        "raise it to 2",
    ),
    curriculum(
        "places that go back",
        "schedule: discrete, start: 4, multiple: 4, at: {1 step: 8, 0%: 16}",
        "context.at",
        "not-rising",
        "goes back",
        "in order",
    ),
    curriculum(
        "a place beyond the stage",
        "schedule: discrete, start: 8, at: {9 steps: 16}",
        "context.at",
        "curriculum-too-long",
        "9 steps",
        "2 steps",
    ),
    curriculum(
        "a place that is none",
        "schedule: discrete, start: 8, at: {later: 16}",
        "context.at",
        "bad-duration",
        "'later'",
        "unit",
    ),
    curriculum(
        "a length in words",
        "schedule: discrete, start: 8, at: {50%: all}",
        "context.at.50%",
        "wrong-type",
        "'all'",
        "whole number",
    ),
    curriculum(
        "longer than the stage",
        "schedule: linear, start: 8, over: 9 steps",
        "context.over",
        "curriculum-too-long",
        "'9 steps'",
        "2 steps",
    ),
    curriculum(
        "over no duration", "schedule: linear, start: 8, over: long", "context.over", "bad-duration", "'long'", "unit"
    ),
    curriculum("a root of a line", "schedule: linear, start: 8, root: 3", "context.root", "unused-key", "3", "drop it"),
    curriculum(
        "a root of zero", "schedule: root, start: 8, root: 0", "context.root", "not-positive", "0", "above zero"
    ),
    curriculum(
        "a list without places", "schedule: discrete, start: 8", "context.at", "missing-key", "is missing", "{30%: 128"
    ),
    curriculum(
        "buckets without odds", "schedule: buckets, start: 8", "context.odds", "missing-key", "is missing", "[4, 2, 1]"
    ),
    curriculum(
        "odds for other lengths",
        "schedule: buckets, start: 8, odds: [3, 2, 1]",
        "context.odds",
        "odds-do-not-fit",
        "8, 16, 32",
        "must be 16",
    ),
    curriculum(
        "odds of zero",
        "schedule: buckets, start: 8, odds: [0, 1]",
        "context.odds",
        "out-of-range",
        "[0, 1]",
        "1 or more",
    ),
    curriculum(
        "too many lengths",
        "schedule: discrete, start: 4, multiple: 4, most_lengths: 2, at: {10%: 8, 50%: 16}",
        "context.at",
        "too-many-lengths",
        "[4, 8, 16]",
        "most_lengths",
    ),
    curriculum(
        "far too many lengths",
        "schedule: linear, start: 8, most_lengths: 9",
        "context.most_lengths",
        "out-of-range",
        "9",
        "2..8",
    ),
    curriculum(
        "a cut there is not",
        "schedule: linear, start: 8, how: fold",
        "context.how",
        "unknown-choice",
        "'fold'",
        "reshape",
    ),
    curriculum(
        "constant nothing",
        "schedule: linear, start: 8, constant: x",
        "context.constant",
        "unknown-choice",
        "'x'",
        "rows",
    ),
    curriculum(
        "pieces of as many rows",
        "schedule: linear, start: 8, how: reshape, constant: rows",
        "context.constant",
        "unknown-choice",
        "'rows'",
        "truncate",
    ),
    curriculum(
        "a window in buckets",
        "schedule: buckets, start: 8, odds: [1, 1]",
        "window.schedule",
        "unknown-choice",
        "'buckets'",
        "discrete",
        "window",
    ),
    curriculum(
        "a window that is cut",
        "schedule: linear, start: 8, how: truncate",
        "window.how",
        "unknown-key",
        "is not a key",
        "schedule",
        "window",
    ),
    curriculum(
        "a window beyond the context",
        "schedule: linear, start: 24",
        "window.start",
        "too-large",
        "24",
        "16 or less",
        "window",
    ),
    Case(
        "two curricula",
        "train recipe.yaml run.name=new 'stages.0.context={schedule: linear, start: 8}' "
        "'stages.0.window={schedule: root, start: 8}'",
        "two-curricula",
        "stages.0.window",
        "'root'",
        "keep one",
    ),
    Case(
        "a bucket too short for the task",
        "train recipe.yaml run.name=new 'data={source: synthetic/needle}' "
        "'stages.0.context={schedule: buckets, start: 8, odds: [1, 1]}'",
        "context-too-short",
        "stages.0.context.start",
        "8",
        "or more",
    ),
    train("a batch below one row", "stages.0.global_batch_tokens=8", "batch-not-whole", "8", "such as 16"),
    train("a base of zero", "stages.1.grow={rope_base: 0}", "bad-target", "0", "above 0", "stages.1.grow.rope_base"),
    train(
        "a factor and no method",
        "stages.1.grow={rope_factor: 4}",
        "bad-target",
        "4",
        "ntk, yarn or linear",
        "stages.1.grow.rope_factor",
    ),
    train(
        "a context and no factor",
        "stages.1.grow={rope_context: 4}",
        "bad-target",
        "4",
        "yarn",
        "stages.1.grow.rope_context",
    ),
    Case(
        "yarn from nowhere",
        "train recipe.yaml run.name=new 'stages.1.grow={rope_factor: 4}' stages.1.methods.rope=yarn",
        "bad-target",
        "stages.1.grow.rope_factor",
        "4.0",
        "grow.rope_context",
    ),
    Case(
        "a factor that shortens",
        "train recipe.yaml run.name=new 'stages.1.grow={rope_factor: 0.5}' stages.1.methods.rope=ntk",
        "bad-target",
        "stages.1.grow.rope_factor",
        "0.5",
        "above 1",
    ),
    train(
        "the base it has",
        "stages.1.grow={rope_base: 10000}",
        "nothing-grows",
        "10000",
        "leave grow out",
        "stages.1.grow",
    ),
]
