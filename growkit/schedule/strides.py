"""Layers that run on every k-th token (Sequence-AltUp), and the rows they can be given. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from growkit.config.recipe import Recipe
from growkit.errors import ConfigError
from growkit.schedule.stage import Stage

CUTS = ("documents", "best_fit")  # packings that put several documents in a row


def check_strides(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for a length that a stride does not divide, and for rows in which a token may not see all that
    is before it: the token that a layer ran on last may lie in another document, or outside the window."""
    for position, stage in enumerate(stages):
        stride = max(layer.stride for layer in stage.model.layers)
        if stride == 1:
            continue
        key = f"stages.{position}"
        for length in stage.lengths.values:
            if length % stride:
                problem = f"is not a multiple of the stride of {stride}"
                lower = length // stride * stride
                mend = f"use {lower or stride} or {lower + stride}, or another model.altup_stride"
                raise ConfigError("not-a-multiple", problem, key=f"{key}.context_length", value=length, mend=mend)
        if recipe.data.packing in CUTS:
            problem = "puts several documents in a row, and a layer of a stride carries over from one to the next"
            mend = "use packing none or decompose, or leave model.altup_stride out"
            raise ConfigError("streams-exclude", problem, key="data.packing", value=recipe.data.packing, mend=mend)
        if stage.windows is not None:
            mend = "leave it out, or model.altup_stride"
            problem = "hides tokens that layers of a stride carry on"
            raise ConfigError("streams-exclude", problem, key=f"{key}.window", mend=mend)
