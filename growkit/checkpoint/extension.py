"""More stages on a checkpoint: what an extended run takes over from it. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.checkpoint.hf.source import LAYOUT
from growkit.checkpoint.manifest import Manifest
from growkit.config.load import parse_recipe, read_mapping
from growkit.config.recipe import Recipe, StartConfig
from growkit.errors import ConfigError
from growkit.models.config import to_json
from growkit.models.presets import PRESETS
from growkit.schedule.pieces import same_pieces
from growkit.schedule.plan import growth_schedule
from growkit.schedule.progress import Progress
from growkit.schedule.stage import GrowthSchedule


def extended_recipe(manifest: Manifest, source: str, text: str, overrides: Sequence[str], *, name: str) -> Recipe:
    """The recipe of a run that goes on from ``manifest``'s checkpoint with the stages of ``text``.

    ``source``: what to call the checkpoint. What ``text`` does not say is taken from the checkpoint's own recipe, but
    for its model, its stages and the name of its run; where no recipe of growkit made the checkpoint, a tokenizer that
    lies in its folder is its own. Raises ConfigError.
    """
    own_words = read_mapping(text, name)
    if "start" in own_words:
        mend = "drop start: it is filled in from the checkpoint"
        raise ConfigError("start-given", "is not for a recipe to say", key="start", mend=mend)
    under: dict[str, Any] = read_mapping(manifest.recipe, "the checkpoint's recipe") if manifest.recipe else {}
    under = {key: value for key, value in under.items() if key not in ("model", "stages")}
    under["run"] = {key: value for key, value in under.get("run", {}).items() if key != "name"}
    if not manifest.recipe:
        from growkit.data.tokenizer import tokenizer_in  # numpy, which a plan does without

        said = "tokenizer" in (own_words.get("data") or {}) or any(o.startswith("data.tokenizer=") for o in overrides)
        if (own := tokenizer_in(Path(source))) is not None:
            under["data"] = {"tokenizer": own}
        elif manifest.layout == LAYOUT and not said:
            problem = "is missing, and no tokenizer lies beside the model"
            mend = "name the one it was trained with; 'bytes' if its ids are bytes"
            raise ConfigError("missing-key", problem, key="data.tokenizer", mend=mend)
    under["start"] = dataclasses.asdict(_start(manifest, source))
    return parse_recipe(text, overrides, PRESETS, name=name, under=under)


def _start(manifest: Manifest, source: str) -> StartConfig:
    at = manifest.progress
    first = at.stage + 1
    grown = [name for name, stage in manifest.born.items() if stage == first]
    if manifest.layout == LAYOUT:  # its stages are not counted
        by_hand = bool(manifest.lineage) and manifest.lineage[-1]["kind"] == "growth"
    else:
        by_hand = any(entry["kind"] == "growth" and entry["stage"] >= first for entry in manifest.lineage)
    counts = (at.step, at.tokens, at.flops)
    start = StartConfig(source, to_json(manifest.model), first, *counts, new=grown, by_hand=by_hand)
    if not manifest.recipe:
        return start
    own = parse_recipe(manifest.recipe, [], PRESETS, name="the checkpoint's recipe")
    stage = growth_schedule(own, at.decisions).stage(at.stage)
    return dataclasses.replace(
        start,
        lr=stage.rate(max(0, at.stage_step - 1)),
        context_length=stage.context_length,
        global_batch_tokens=stage.global_batch_tokens,
    )


def first_progress(manifest: Manifest, recipe: Recipe, schedule: GrowthSchedule, corpus_sha256: str) -> Progress:
    """Where the extended run begins. The data go on where the checkpoint's stopped if they are the same in the same
    order, and start afresh if not."""
    assert recipe.start is not None
    same = manifest.corpus.get("sha256") == corpus_sha256 and _order(manifest.recipe) == _order_of(recipe)
    same = same and same_pieces(schedule.lengths, manifest.progress.data)
    data = manifest.progress.data if same else {}
    return dataclasses.replace(
        manifest.progress, stage=recipe.start.stage, stage_step=0, data=data, micro_batch_size=None, decisions=()
    )


def same_tokenizer(manifest: Manifest, recipe: Recipe) -> bool:
    """Whether the extended run names the tokenizer that the checkpoint's own recipe does."""
    if not manifest.recipe:
        return False
    before = parse_recipe(manifest.recipe, [], PRESETS, name="the checkpoint's recipe").data
    return (before.tokenizer, before.end_token) == (recipe.data.tokenizer, recipe.data.end_token)


def _order(text: str) -> tuple[Any, ...] | None:
    return _order_of(parse_recipe(text, [], PRESETS, name="the checkpoint's recipe")) if text else None


def _order_of(recipe: Recipe) -> tuple[Any, ...]:
    """What the order of the tokens depends on, besides the text itself."""
    data = recipe.data
    drawn = data.select is not None and data.select.kind == "importance"
    return recipe.run.seed, data.shuffle, data.block_tokens, data.packing, data.mixture, drawn
