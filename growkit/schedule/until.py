"""What a stage's ``until`` means: the trigger that may end it before its duration does. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from growkit.config.recipe import Recipe, UntilConfig
from growkit.duration import Duration
from growkit.errors import ConfigError
from growkit.schedule.checks import at_least, one_of

if TYPE_CHECKING:
    from growkit.schedule.stage import Stage
    from growkit.schedule.triggers import Trigger

# kind: the keys that mean something to it alone
KINDS = {
    "plateau": ("window", "least", "patience"),
    "crossing": ("horizon", "size_scale", "size_power", "data_power"),
}


def trigger_of(recipe: Recipe, position: int, stage: Stage, following: Stage | None) -> Trigger | None:
    """The trigger of the recipe's stage at ``position``, if it has one; ``following``: the stage after it. Raises
    ConfigError."""
    config = recipe.stages[position].until
    if config is None:
        return None
    key = f"stages.{position}.until"
    _check_keys(config, key)
    if following is None:
        mend = "drop it, or write a stage after this one; trainer.max_minutes stops a run"
        problem = "ends the last stage, after which nothing comes"
        raise ConfigError("until-at-end", problem, key=key, value=config.kind, mend=mend)
    if config.kind == "plateau":
        return _plateau(recipe, config, key, stage)
    return _crossing(recipe, config, position, stage, following)


def _check_keys(config: UntilConfig, key: str) -> None:
    one_of(config.kind, tuple(KINDS), f"{key}.kind")
    for kind, names in KINDS.items():
        for name in names:
            if kind != config.kind and (given := getattr(config, name)) is not None:
                mend = f"drop it; {config.kind} reads {' and '.join(KINDS[config.kind])}"
                raise ConfigError(
                    "unused-key", f"means nothing to {config.kind}", key=f"{key}.{name}", value=given, mend=mend
                )


def _plateau(recipe: Recipe, config: UntilConfig, key: str, stage: Stage) -> Trigger:
    from growkit.schedule.triggers import Plateau  # numpy, which a plan without triggers does without

    for name, such in (("window", "'100 steps'"), ("least", "0.01")):
        if getattr(config, name) is None:
            raise ConfigError("missing-key", "is missing", key=f"{key}.{name}", mend=f"write {name}, such as {such}")
    assert config.window is not None and config.least is not None
    span = Duration.parse(config.window, key=f"{key}.window", share=True)
    window = stage.pace.steps(span, stage.lengths, stage.lr.steps)
    if window < recipe.monitor.log_every:
        mend = f"use {recipe.monitor.log_every} steps or more, or a lower monitor.log_every"
        problem = f"is {window} steps, in which there may be no loss: one is logged every {recipe.monitor.log_every}"
        raise ConfigError("too-small", problem, key=f"{key}.window", value=config.window, mend=mend)
    at_least(config.least, 0, f"{key}.least")
    patience = 1 if config.patience is None else at_least(config.patience, 1, f"{key}.patience")
    _require_time(window * (patience + 1), f"{patience + 1} windows of {window}", key, stage, config)
    return Plateau(window, config.least, patience)


def _crossing(recipe: Recipe, config: UntilConfig, position: int, stage: Stage, following: Stage) -> Trigger | None:
    from growkit.schedule.triggers import FEWEST_POINTS, Crossing

    key = f"stages.{position}.until"
    if not following.links and recipe.stages[position + 1].candidates:
        return None  # the run has found that growing does not help, and waits for nothing
    if not following.links:
        mend = "grow in the next stage, or use kind: plateau"
        problem = "compares this stage's model with the next one's, and that is the same"
        raise ConfigError("nothing-grows", problem, key=key, value=config.kind, mend=mend)
    constants = {name: value for name in KINDS["crossing"] if (value := getattr(config, name)) is not None}
    for name, value in constants.items():
        if not value > 0:
            raise ConfigError("not-positive", "must be above zero", key=f"{key}.{name}", value=value)
    points = 2 * FEWEST_POINTS - 1  # that many logged steps have as few in their later half
    every = recipe.monitor.log_every
    _require_time(points * every, f"{points} logged losses, {every} apart", key, stage, config)
    both = (stage, following)
    small, large = (one.model.num_params() for one in both)
    price, dearer = (one.flops_per_step / one.global_batch_tokens for one in both)
    return Crossing((small, large), (price, dearer), **constants)


def _require_time(steps: int, why: str, key: str, stage: Stage, config: UntilConfig) -> None:
    if steps >= stage.lr.steps:  # at the last step there is nothing left to end
        mend = f"the stage has {stage.lr.steps} steps: lengthen its duration, or look at fewer"
        problem = f"can never end the stage: it needs {why}, {steps} steps"
        raise ConfigError("until-too-long", problem, key=key, value=config.kind, mend=mend)
