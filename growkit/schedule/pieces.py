"""``data.packing: decompose``, checked: the lengths of rows that documents are cut into. No torch here; what does it:
data/decomposed.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from growkit.config.recipe import Recipe
from growkit.errors import ConfigError
from growkit.schedule.stage import Stage, lengths_of

DECOMPOSE = "decompose"
# Schedules of which every length is in the recipe, so that no decision of a run can change what there is.
SCHEDULES = ("buckets", "discrete")


def check_pieces(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for stages whose rows documents cannot be cut into."""
    if recipe.data.packing != DECOMPOSE:
        return
    for position, config in enumerate(recipe.stages):
        if config.context is None:
            continue
        key = f"stages.{position}.context"
        if config.context.schedule not in SCHEDULES:
            problem = "has lengths that follow from the number of steps, and data.packing=decompose needs them named"
            raise _does_not_fit(f"{key}.schedule", config.context.schedule, problem, f"use {' or '.join(SCHEDULES)}")
        if config.context.how != "rechunk":
            problem = "cuts rows up, and those of data.packing=decompose are whole"
            raise _does_not_fit(f"{key}.how", config.context.how, problem, "use rechunk")
    lengths = lengths_of(stages)
    if len(lengths) == 1:
        problem = f"cuts documents into rows of several lengths, and all steps have rows of {lengths[0]}"
        mend = "give a stage context: {schedule: buckets, ...}, or use packing documents"
        raise _does_not_fit("data.packing", DECOMPOSE, problem, mend)
    for shorter, longer in pairwise(lengths):
        if longer % shorter:
            said = ", ".join(map(str, lengths))
            problem = f"needs lengths each a multiple of the one before, and the stages have {said}"
            mend = "let every length be one start · 2^n (context: {schedule: buckets}, context_length)"
            raise _does_not_fit("data.packing", DECOMPOSE, problem, mend)


def same_pieces(lengths: Sequence[int], data: Mapping[str, Any]) -> bool:
    """Whether a state of the data is of documents cut into rows of ``lengths``; true of one that is of none."""
    if "joined" in data and data["rows"].keys() != {str(length) for length in lengths}:
        return False
    return all(same_pieces(lengths, own) for own in data.get("sources", []))


def _does_not_fit(key: str, value: str, problem: str, mend: str) -> ConfigError:
    return ConfigError("pieces-do-not-fit", problem, key=key, value=value, mend=mend)
