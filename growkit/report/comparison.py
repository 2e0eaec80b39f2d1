"""Runs side by side, aligned on an axis: the figures of each, and what each needs to get where the first one got."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.report.history import Column
from growkit.report.run_summary import RunSummary

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the stretch that all runs share, where they are set beside each other
MOST_DIFFERENCES = 12  # keys of two recipes that are listed
UNSAID = ("run.name", "run.folder", "start")  # every run has its own
NOT_SET = "not set"


@dataclass(frozen=True)
class Aligned:
    """One run on the axis. ``at``: its validation, in bits per byte, at each place of the comparison. ``needed``: how
    much of the axis it took to reach the reference's last score, None if it never did. ``saving``: what the reference
    took over what it took. ``before_first``: it was there at its first validation already, so it needed at most that.
    """

    name: str
    at: tuple[float | None, ...]
    needed: float | None
    saving: float | None
    before_first: bool


@dataclass(frozen=True)
class Comparison:
    """``axis``: flops, tokens or seconds. ``places``: where on it the runs are set beside each other, inside what all
    of them cover; empty if they share no stretch. ``target``: the reference's (the first run's) last score in bits per
    byte. ``differences``: recipe key → its value in every run, where they are not the same. ``notes``: what makes the
    runs less comparable than a table looks."""

    axis: str
    runs: tuple[RunSummary, ...]
    places: tuple[float, ...]
    target: float | None
    aligned: tuple[Aligned, ...]
    differences: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]


def compare(runs: Sequence[RunSummary], axis: str) -> Comparison:
    """Compares ``runs`` with the first of them. Between two validations a score is read off the straight line."""
    curves = [run.history.validations(axis) for run in runs]
    places: tuple[float, ...] = ()
    if all(len(x) for x, _ in curves):
        first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        if first <= last:
            places = tuple(dict.fromkeys(float(first + share * (last - first)) for share in SHARES))
    reference = curves[0]
    target = float(reference[1][-1]) if len(reference[1]) else None
    spent = reached(*reference, target) if target is not None else None
    aligned = []
    for run, (x, y) in zip(runs, curves, strict=True):
        needed = reached(x, y, target) if target is not None else None
        saving = spent / needed if spent is not None and needed else None
        at = tuple(float(np.interp(place, x, y)) for place in places)
        aligned.append(Aligned(run.name, at, needed, saving, needed is not None and needed == float(x[0])))
    differences = differing([run.recipe for run in runs])
    notes = _notes(runs, axis, curves, differences)
    return Comparison(axis, tuple(runs), places, target, tuple(aligned), differences, notes)


def reached(x: Column, y: Column, target: float) -> float | None:
    """The first ``x`` at which the line through the points is down to ``target``; None if it never is."""
    below = np.flatnonzero(y <= target)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0:
        return float(x[0])
    share = (y[at - 1] - target) / (y[at - 1] - y[at])
    return float(x[at - 1] + share * (x[at] - x[at - 1]))


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Dotted key → the value in every recipe, for the keys that do not say the same everywhere."""
    flat = [dict(_flat(recipe, "")) for recipe in recipes]
    extended = any(recipe.get("start") for recipe in recipes)  # by a run that has no model section to compare
    unsaid = (*UNSAID, "model") if extended else UNSAID
    keys = dict.fromkeys(key for one in flat for key in one if not key.startswith(unsaid))
    rows = {key: tuple(one.get(key, NOT_SET) for one in flat) for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def shown(value: Any) -> str:
    """A recipe's value as YAML would say it."""
    return value if isinstance(value, str) else json.dumps(value)


def _flat(value: Any, key: str) -> list[tuple[str, Any]]:
    """The leaves; an empty section is one."""
    if isinstance(value, Mapping | list) and value:
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [leaf for name, item in parts for leaf in _flat(item, f"{key}.{name}" if key else str(name))]
    return [(key, value)]


def _notes(
    runs: Sequence[RunSummary],
    axis: str,
    curves: Sequence[tuple[Column, Column]],
    differences: Mapping[str, tuple[Any, ...]],
) -> tuple[str, ...]:
    notes = []
    corpora = {run.corpus for run in runs if run.corpus is not None}
    sources = [key for key in differences if key.startswith("data.") and key != "data.shuffle"]
    if len(corpora) > 1:
        notes.append("the runs saw different texts: their bits per byte are not of the same thing")
    elif any(run.corpus is None for run in runs):
        where = f", and their recipes differ in {', '.join(sources)}" if sources else "; their recipes name the same"
        notes.append(f"a run has no checkpoint that says which text it saw{where}")
    if "monitor.validation_tokens" in differences:
        notes.append("validation scores different amounts of text (monitor.validation_tokens)")
    contexts = [run.validation_context for run in runs]
    if any(context is not None and context != contexts[0] for context in contexts):
        listed = ", ".join(f"{run.name} {run.validation_context or 0:.0f}" for run in runs)
        notes.append(f"the last validations read different contexts ({listed}): a longer one scores better by itself")
    if "run.seed" in differences:
        notes.append("the runs have different seeds: part of a difference is chance")
    if axis == "seconds":
        notes.append("seconds depend on the machine and on what else it did")
    for run, (x, _) in zip(runs, curves, strict=True):
        if run.state != "complete":
            notes.append(f"{run.name} is {run.state}: its figures are those of its last record")
        if not len(x):
            why = f"its log has no {axis}" if run.history.kind("validation") else "it has not been validated yet"
            notes.append(f"{run.name} cannot be aligned: {why}")
    return tuple(notes)
