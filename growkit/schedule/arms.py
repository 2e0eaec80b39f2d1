"""What a bandit chooses among in a stage, checked: sources of the mixture, or lengths. No torch here; which arm is
chosen: schedule/bandit.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growkit.config.mixture import names_of, source_key
from growkit.config.recipe import BanditConfig, ContextConfig, Recipe
from growkit.errors import ConfigError
from growkit.schedule.checks import one_of

OVER = ("sources", "lengths")
STATE = "bandit"  # where its state lies in that of the data


@dataclass(frozen=True)
class Arms:
    """``over``: one of OVER. ``names``: of the arms, in the order of the mixture, or the rising one of the lengths."""

    over: str
    names: tuple[str, ...]

    def state_in(self, data: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """That of a bandit over these, if there is one in the state of the data."""
        state = data.get(STATE)
        if state is None or state["over"] != self.over or len(state["weights"]) != len(self.names):
            return None
        return dict(state)


def arms_of(recipe: Recipe, context: ContextConfig | None) -> Arms | None:
    """Of a stage with that ``context``; None where nothing is chosen in it."""
    bandit = recipe.data.bandit
    if bandit is None:
        return None
    if bandit.over == "sources":
        return Arms(bandit.over, tuple(names_of(recipe.data)))
    if context is None or not _draws(context):
        return None
    return Arms(bandit.over, tuple(str(context.start * 2**power) for power in range(len(context.odds))))


def same_arms(arms: Arms | None, data: Mapping[str, Any]) -> bool:
    """Whether a stage that was stopped with that state of the data had these arms, or none."""
    return STATE not in data if arms is None else arms.state_in(data) is not None


def check_bandit(recipe: Recipe) -> None:
    """Raises ConfigError for a bandit that has nothing to choose from, or is told beforehand how often to choose it."""
    bandit = recipe.data.bandit
    if bandit is None:
        return
    one_of(bandit.over, OVER, "data.bandit.over")
    if not bandit.learning_rate > 0:
        key = "data.bandit.learning_rate"
        raise ConfigError("not-positive", "must be above zero", key=key, value=bandit.learning_rate)
    if not 0 < bandit.exploration <= 1:
        key = "data.bandit.exploration"
        raise ConfigError("out-of-range", "must be above 0 and at most 1", key=key, value=bandit.exploration)
    (_check_sources if bandit.over == "sources" else _check_lengths)(recipe, bandit)


def _check_sources(recipe: Recipe, bandit: BanditConfig) -> None:
    mixture = recipe.data.mixture
    if len(mixture) < 2:
        mend = "write two sources or more into data.mixture, or choose among lengths"
        problem = "has nothing to choose from: there is one source"
        raise ConfigError("no-arms", problem, key="data.bandit.over", value=bandit.over, mend=mend)
    for index, source in enumerate(mixture):
        if source.weight != mixture[0].weight:
            mend = "give all sources the same weight, or leave data.bandit out"
            problem = "says how often a source is trained on, which data.bandit chooses"
            key = f"{source_key(recipe.data, index)}.weight"
            raise ConfigError("chosen-by-bandit", problem, key=key, value=source.weight, mend=mend)


def _check_lengths(recipe: Recipe, bandit: BanditConfig) -> None:
    drawn = [(at, stage.context) for at, stage in enumerate(recipe.stages) if _draws(stage.context)]
    if not drawn:
        mend = "give a stage context: {schedule: buckets, ...}, or choose among sources"
        problem = "has nothing to choose from: no stage draws its lengths"
        raise ConfigError("no-arms", problem, key="data.bandit.over", value=bandit.over, mend=mend)
    for at, context in drawn:
        assert context is not None
        key = f"stages.{at}.context"
        if len(set(context.odds)) > 1:
            mend = f"write {[1] * len(context.odds)}, which says how many lengths there are, or leave data.bandit out"
            problem = "says how often a length is trained on, which data.bandit chooses"
            raise ConfigError("chosen-by-bandit", problem, key=f"{key}.odds", value=context.odds, mend=mend)
        for name, value, unfit in (("constant", context.constant, "rows"), ("how", context.how, "truncate")):
            if value == unfit:
                mend = "leave it at its default, or leave data.bandit out"
                problem = "lets steps differ in the tokens that they read, and data.bandit needs them alike"
                raise ConfigError("chosen-by-bandit", problem, key=f"{key}.{name}", value=value, mend=mend)


def _draws(context: ContextConfig | None) -> bool:
    return context is not None and context.schedule == "buckets"
