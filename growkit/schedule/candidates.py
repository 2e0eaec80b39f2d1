"""Ways into a stage of which the run chooses one, by the external criterion of the group method of data handling
(Ivakhnenko 1971): what was not trained on decides what is kept, and whether anything is. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from growkit.config.recipe import CandidateConfig, Recipe, StageConfig
from growkit.duration import Duration
from growkit.errors import ConfigError
from growkit.schedule.checks import at_least
from growkit.schedule.decisions import CANDIDATES, NONE, Decision, choice_of

if TYPE_CHECKING:
    from growkit.schedule.stage import GrowthSchedule, Stage

MOST_OUTCOMES = 200  # schedules that a recipe's choices may lead to; each is planned before the run


@dataclass(frozen=True)
class Trial:
    """One of the ways that are tried. ``name``: the candidate's, or NONE of not growing. ``stage``: what would follow;
    its first ``steps`` are the probe."""

    name: str
    stage: Stage
    steps: int

    @property
    def tokens(self) -> int:
        return self.stage.tokens_after(self.steps)

    @property
    def flops(self) -> float:
        return self.stage.pace.flops(self.stage.lengths, self.steps)


def check_choosing(recipe: Recipe) -> None:
    """Raises ConfigError for candidates beside what chooses the data by what the model has learned so far: a trial
    would move it, and the run goes on from before the trial."""
    position = next((n for n, stage in enumerate(recipe.stages) if stage.candidates), None)
    for name in ("bandit", "select"):
        if position is not None and getattr(recipe.data, name) is not None:
            problem = f"are tried on the next data, and data.{name} chooses those by what the run has learned"
            mend = f"drop data.{name}, or write grow in the place of candidates"
            raise ConfigError("two-choosers", problem, key=f"stages.{position}.candidates", mend=mend)


def planned_stage(
    config: StageConfig, key: str, index: int, decisions: Sequence[Decision], make: Callable[[StageConfig], Stage]
) -> Stage:
    """The stage that ``config`` means, as ``make`` plans one. With candidates: with what was chosen; before that with
    the largest one, and with all ways as its ``trials``; without any, if an earlier choice was not to grow. Raises
    ConfigError."""
    _check(config, key)
    if not config.candidates:
        return make(config)
    plain = dataclasses.replace(config, candidates=[], probe=None, probe_least=0.0)
    ways: list[tuple[str, Stage]] = []
    for number, candidate in enumerate(config.candidates):
        with _named(f"with the candidate {candidate.name!r}", key, f"{key}.candidates.{number}"):
            _require_growth(candidate)
            stage = make(dataclasses.replace(plain, grow=candidate.grow, methods=candidate.methods))
        ways.append((candidate.name, stage))
    with _named("where no candidate is chosen", key, key):
        ways.insert(0, (NONE, make(plain)))
    decision = choice_of(decisions, index)
    if decision is not None:
        if decision.chosen not in dict(ways):
            mend = "undo the changes to its past stages; later stages may change"
            problem = f"does not have the candidate {decision.chosen!r}, which the run chose"
            raise ConfigError("recipe-changed", problem, key=f"{key}.candidates", mend=mend)
        chosen, flops, tokens = dict(ways)[decision.chosen], decision.probe_flops, decision.probe_tokens
        return dataclasses.replace(chosen, probe_flops=flops, probe_tokens=tokens)
    if any(made.chosen == NONE for made in decisions):
        return dict(ways)[NONE]
    trials = _trials(config, key, ways)
    largest = max((trial.stage for trial in trials), key=lambda stage: stage.model.num_params())
    flops, tokens = sum(trial.flops for trial in trials), sum(trial.tokens for trial in trials)
    return dataclasses.replace(
        largest, trials=trials, probe_least=config.probe_least, probe_flops=flops, probe_tokens=tokens
    )


def _check(config: StageConfig, key: str) -> None:
    if not config.candidates:
        for name in ("probe", "probe_least"):
            if value := getattr(config, name):
                mend = "drop it, or write candidates"
                raise ConfigError("unused-key", "is for candidates", key=f"{key}.{name}", value=value, mend=mend)
        return
    if config.grow:
        mend = "drop it, or make it one of the candidates"
        problem = "stands beside candidates, one of which is to be chosen"
        raise ConfigError("two-growths", problem, key=f"{key}.grow", value=config.grow, mend=mend)
    if config.probe is None:
        raise ConfigError("missing-key", "is missing", key=f"{key}.probe", mend="write probe, such as '30 steps'")
    at_least(config.probe_least, 0, f"{key}.probe_least")
    names = [candidate.name for candidate in config.candidates]
    if len({*names, NONE}) <= len(names):
        mend = f"give every candidate a name of its own; {NONE!r} is that of not growing"
        raise ConfigError("duplicate-name", "has a name twice", key=f"{key}.candidates", value=names, mend=mend)


def _require_growth(candidate: CandidateConfig) -> None:
    if not candidate.grow:
        mend = "name a larger size; not growing is tried in any case"
        raise ConfigError("nothing-grows", "is empty", key="grow", value=candidate.grow, mend=mend)


def _trials(config: StageConfig, key: str, ways: Sequence[tuple[str, Stage]]) -> tuple[Trial, ...]:
    """All ways get the same FLOPs: those that the dearest candidate spends in the probe, to the nearest step of
    each."""
    key = f"{key}.probe"
    duration = Duration.parse(config.probe, key=key, share=True)

    def flops(stage: Stage) -> float:
        return stage.pace.flops(stage.lengths, stage.pace.steps(duration, stage.lengths, stage.steps))

    budget = Duration(max(flops(stage) for name, stage in ways if name != NONE), "flops")
    if not budget.amount:
        raise ConfigError("too-small", "is less than one step", key=key, value=config.probe)
    trials = tuple(Trial(name, stage, max(1, stage.pace.steps(budget, stage.lengths))) for name, stage in ways)
    for trial in trials:
        if trial.steps > trial.stage.steps:
            mend = f"use a shorter one, or a longer stage: it has {trial.stage.steps} steps"
            problem = f"is {trial.steps} steps of {trial.name}, longer than the stage"
            raise ConfigError("probe-too-long", problem, key=key, value=config.probe, mend=mend)
    return trials


def check_outcomes(
    first: GrowthSchedule, plan: Callable[[tuple[Decision, ...]], GrowthSchedule], decisions: tuple[Decision, ...] = ()
) -> None:
    """Plans every schedule that the choices of ``first`` may lead to, so that none of them turns out to be impossible
    when it is made. Raises ConfigError."""
    left = MOST_OUTCOMES

    def follow(schedule: GrowthSchedule, made: tuple[Decision, ...]) -> None:
        nonlocal left
        position, stage = next(((n, one) for n, one in enumerate(schedule.stages) if one.trials), (0, None))
        if stage is None:
            return
        if len(stage.trials) > left:
            mend = "offer fewer candidates, or in fewer stages"
            problem = f"lead to more than {MOST_OUTCOMES} schedules"
            raise ConfigError("too-many-outcomes", problem, key=f"stages.{position}.candidates", mend=mend)
        left -= len(stage.trials)
        for trial in stage.trials:
            chosen = (*made, Decision(CANDIDATES, stage.index, stage.name, 0, 0, 0, 0.0, chosen=trial.name))
            with _named(f"if the choice in {stage.name!r} is {trial.name!r}", "", ""):
                outcome = plan(chosen)
            follow(outcome, chosen)

    follow(first, decisions)


@contextmanager
def _named(when: str, key: str, place: str) -> Iterator[None]:
    """Says of a ConfigError ``when`` it is one, and puts what grows, below ``key``, at ``place``."""
    try:
        yield
    except ConfigError as error:
        where = f"{key}.grow" if error.key == "grow" else error.key
        if place != key and where.startswith((f"{key}.grow", f"{key}.methods")) and where != f"{key}.grow_time":
            where = f"{place}{where.removeprefix(key)}"
        problem = f"{error.problem} ({when})"
        raise ConfigError(error.code, problem, key=where, value=error.value, mend=error.mend) from error
