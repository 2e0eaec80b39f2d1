"""Context lengths and attention windows as pure functions of the step within a stage. No torch here."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from growkit.config.recipe import ContextConfig, CurriculumConfig, StageConfig
from growkit.data.shape import StepShape
from growkit.duration import Duration
from growkit.errors import ConfigError
from growkit.models.config import ModelConfig
from growkit.schedule.checks import at_least, one_of
from growkit.schedule.selection import Selection

# schedule: the keys that mean something to it alone
SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "linear": ("over",),
    "root": ("over", "root"),
    "exponential": ("over",),
    "discrete": ("at",),
    "buckets": ("odds",),
}
HOW = ("rechunk", "truncate", "reshape")
CONSTANT = ("tokens", "rows")
MOST_LENGTHS = 8  # torch.compile gives up on a model after as many graphs, and goes on without them
MOST_ODDS = 10_000  # the steps of a round, which is shuffled as a whole


@dataclass(frozen=True)
class Rising:
    """``values[i]`` from step ``starts[i]`` on; both rise, and ``starts`` from 0."""

    starts: tuple[int, ...]
    values: tuple[int, ...]

    def at(self, step: int) -> int:
        return self.values[bisect_right(self.starts, step) - 1]

    def counts(self, steps: int) -> Iterator[tuple[int, int]]:
        """(value, how many of the first ``steps`` steps have it)."""
        for value, start, end in zip(self.values, self.starts, (*self.starts[1:], steps), strict=True):
            yield value, max(0, min(end, steps) - start)


@dataclass(frozen=True)
class Drawn:
    """Every step one of ``values``, dealt from a deck that holds each as often as ``odds`` says and is shuffled anew
    for every round, by ``seed``: so the first n steps hold what the odds promise, up to a part of one round."""

    values: tuple[int, ...]
    odds: tuple[int, ...]
    seed: str

    def at(self, step: int) -> int:
        turn, place = divmod(step, sum(self.odds))
        return _dealt(self.values, self.odds, f"{self.seed}/{turn}")[place]

    def counts(self, steps: int) -> Iterator[tuple[int, int]]:
        """(value, how many of the first ``steps`` steps have it)."""
        turns, more = divmod(steps, sum(self.odds))
        last = _dealt(self.values, self.odds, f"{self.seed}/{turns}")[:more]
        for value, odds in zip(self.values, self.odds, strict=True):
            yield value, turns * odds + last.count(value)


Lengths = Rising | Drawn


@lru_cache(maxsize=64)
def _dealt(values: tuple[int, ...], odds: tuple[int, ...], seed: str) -> tuple[int, ...]:
    """A deck in the order of its cards' hashes: the same on every machine and in every version of Python."""
    deck = [value for value, count in zip(values, odds, strict=True) for _ in range(count)]
    order = sorted(range(len(deck)), key=lambda card: hashlib.sha256(f"{seed}/{card}".encode()).digest())
    return tuple(deck[card] for card in order)


@dataclass(frozen=True)
class Pace:
    """What the steps of a stage come to, by their length. ``rows``: of a step at full ``length``; ``parts``: the
    micro-batches that it is cut into, over all processes. ``how``, ``constant``: as of ContextConfig. ``selection``:
    what is chosen of what is read; None: all of it. ``again``: the share of a step's tokens that the model reads once
    more, forward only."""

    model: ModelConfig
    rows: int
    length: int
    parts: int
    how: str = "rechunk"
    constant: str = "tokens"
    selection: Selection | None = None
    again: float = 0.0
    _flops: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def shape(self, length: int, window: int | None = None) -> StepShape:
        """Of a step of ``length``: as many rows as keep its tokens about what they are at full length (or as many as
        there), and a multiple of ``parts``, so that all micro-batches of a length have one shape."""
        if length == self.length:
            return StepShape(self.rows, length, window)
        rows = self.rows
        if self.how == "reshape":
            pieces = self.length // length
            return StepShape(rows * pieces, length, window, self.length, pieces)
        if self.constant == "tokens":
            rows = self.rows * self.length // (length * self.parts) * self.parts
        return StepShape(rows, length, window, self.length if self.how == "truncate" else None)

    def training_flops(self, length: int) -> float:
        """Of a step, without what is read besides."""
        return self.model.flops_per_token(length) * self.shape(length).tokens

    def choosing_flops(self, length: int) -> float:
        """Of a step, for choosing what to train on by its losses."""
        if self.selection is None:
            return 0.0
        return self.selection.flops(self.model, length, self.shape(length).tokens)

    def step_flops(self, length: int) -> float:
        if length not in self._flops:
            again = self.again * self.model.forward_flops_per_token(length) * self.shape(length).tokens
            self._flops[length] = self.training_flops(length) + again + self.choosing_flops(length)
        return self._flops[length]

    def tokens(self, lengths: Lengths, steps: int) -> int:
        """That the first ``steps`` steps train on."""
        return sum(count * self.shape(length).tokens for length, count in lengths.counts(steps))

    def drawn_tokens(self, lengths: Lengths, steps: int) -> int:
        """That the first ``steps`` steps read."""
        return sum(count * self.shape(length).drawn_tokens for length, count in lengths.counts(steps))

    def flops(self, lengths: Lengths, steps: int) -> float:
        """That the first ``steps`` steps take."""
        return sum(count * self.step_flops(length) for length, count in lengths.counts(steps))

    def steps(self, duration: Duration, lengths: Lengths | Callable[[int], Lengths], whole: int = 0) -> int:
        """Steps that cover ``duration``: the fewest for tokens, the nearest for FLOPs and shares of ``whole``.
        ``lengths``: of the steps, or, if they depend on how many there are, those of a span of n."""
        if isinstance(lengths, Rising) and len(lengths.values) == 1:
            (length,) = lengths.values
            tokens, flops = self.shape(length).tokens, self.step_flops(length)
            return duration.steps(tokens_per_step=tokens, flops_per_step=flops, whole=whole)
        of = lengths if callable(lengths) else lambda _: lengths
        if duration.unit == "tokens":
            return fewest(lambda steps: self.tokens(of(steps), steps), duration.amount)
        if duration.unit == "flops":
            return nearest(lambda steps: self.flops(of(steps), steps), duration.amount)
        return duration.steps(tokens_per_step=1, flops_per_step=1.0, whole=whole)

    def last_steps(self, duration: Duration, lengths: Lengths, whole: int, by: str) -> int:
        """Of ``whole`` steps the last that cover ``duration``; ``by`` tokens: counted in steps of their mean."""
        tokens, flops = self.tokens(lengths, whole), self.flops(lengths, whole)
        if by == "tokens" or len(lengths.values) == 1 or duration.unit not in ("tokens", "flops"):
            return duration.steps(tokens_per_step=tokens / whole, flops_per_step=flops / whole, whole=whole)
        count, total, search = (
            (self.tokens, tokens, fewest) if duration.unit == "tokens" else (self.flops, flops, nearest)
        )

        def reached(steps: int) -> float:
            return total * steps / whole if steps > whole else total - count(lengths, whole - steps)

        return search(reached, duration.amount)


def fewest(reached: Callable[[int], float], amount: float) -> int:
    """The fewest steps that reach ``amount``."""
    if amount <= 0:
        return 0
    below, above = 0, 1
    while reached(above) < amount:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if reached(middle) >= amount else (middle, above)
    return above


def nearest(reached: Callable[[int], float], amount: float) -> int:
    """The steps that come closest to ``amount``."""
    steps = fewest(reached, amount)
    return steps - 1 if steps and amount - reached(steps - 1) < reached(steps) - amount else steps


class Curriculum:
    """A stage's ``context`` or ``window`` section, checked: what it means once it is known how long its spans are.
    Raises ConfigError."""

    def __init__(self, config: CurriculumConfig, key: str, longest: int, seed: str) -> None:
        self.config, self.key, self.longest, self.seed = config, key, longest, seed
        self._check()

    @property
    def how(self) -> str:
        return self.config.how if isinstance(self.config, ContextConfig) else HOW[0]

    @property
    def constant(self) -> str:
        return self.config.constant if isinstance(self.config, ContextConfig) else CONSTANT[0]

    def lengths(self, whole: int, pace: Pace, under: Lengths | None = None) -> Lengths:
        """In a stage of ``whole`` steps, wherever it ends. ``under``: the lengths that tokens and FLOPs are counted by;
        None: these."""
        config, rungs = self.config, self._rungs()
        if config.schedule == "buckets":
            return Drawn(rungs, tuple(config.odds), self.seed)
        if config.schedule == "discrete":
            so_far = {0: config.start}
            for text, value in config.at.items():
                place = Duration.parse(text, key=f"{self.key}.at", share=True)
                so_far[pace.steps(place, under or _rising(so_far), whole)] = value
            return _rising(so_far)
        return self._bucketed(self._span(whole, pace, under), rungs)

    def require(self, whole: int, pace: Pace, under: Lengths | None = None) -> Lengths:
        """``lengths``, all of which the stage reaches, each in its place."""
        made = self.lengths(whole, pace, under)
        if isinstance(made, Rising) and self.config.at and made.values != self._rungs():
            mend = "name places that are steps apart, in order"
            raise ConfigError(
                "not-rising", "names a step twice, or goes back", key=f"{self.key}.at", value=self.config.at, mend=mend
            )
        ends, name = whole, "over"
        if self.config.schedule == "discrete":
            assert isinstance(made, Rising)
            ends, name = made.starts[-1] + 1, "at"
        elif self.config.schedule != "buckets":
            ends = self._span(whole, pace, under)
        if ends > whole:
            mend = f"the stage has {whole} steps: end within it, or train longer"
            value = getattr(self.config, name)
            problem = f"is {ends} steps, longer than the stage"
            raise ConfigError("curriculum-too-long", problem, key=f"{self.key}.{name}", value=value, mend=mend)
        return made

    def _span(self, whole: int, pace: Pace, under: Lengths | None) -> int:
        over, rungs = Duration.parse(self.config.over or "50%", key=f"{self.key}.over", share=True), self._rungs()
        return max(1, pace.steps(over, under or (lambda steps: self._bucketed(steps, rungs)), whole))

    def raw(self, step: int, over: int) -> int:
        """The scheduled value before it is bucketed: d(t), with t = ``step`` of T = ``over`` steps. DeepSpeed's
        ⌊(t/T)^(1/r) · (max − min) + min⌋ (linear: r = 1), and min · (max/min)^(t/T), exponential."""
        if step >= over:
            return self.longest
        low, high, share = self.config.start, self.longest, step / over
        if self.config.schedule == "exponential":
            return min(high, math.floor(round(low * (high / low) ** share, 9)))  # 64 · 32^0.6 is 511.99999999999994
        root = (self.config.root or 2.0) if self.config.schedule == "root" else 1.0
        return min(high, math.floor(share ** (1 / root) * (high - low) + low))

    def _bucketed(self, over: int, rungs: tuple[int, ...]) -> Rising:
        """``raw``, each value down to the next of ``rungs``; those that no step has are left out."""
        starts = {0: self.config.start}
        for rung in rungs[1:]:
            starts[fewest(lambda step, rung=rung: self.raw(step, over) >= rung, 1)] = rung  # type: ignore[misc]
        return _rising(starts)

    def _rungs(self) -> tuple[int, ...]:
        """The values that the steps may have, rising."""
        config = self.config
        if config.schedule == "discrete":
            return (config.start, *config.at.values())
        if config.schedule == "buckets":
            return tuple(config.start * 2**power for power in range(len(config.odds)))
        every = range(config.start, self.longest + 1, config.multiple)
        most = config.most_lengths if isinstance(config, ContextConfig) else len(every)
        if len(every) <= most:
            return tuple(every)
        shares = [place / (most - 1) for place in range(most)]
        if config.schedule == "exponential":
            wanted = [config.start * (self.longest / config.start) ** share for share in shares]
        else:
            wanted = [config.start + (self.longest - config.start) * share for share in shares]
        down = [int(value + 1e-9) // config.multiple * config.multiple for value in wanted]
        return tuple(sorted({config.start, *down[1:-1], self.longest}))

    def _check(self) -> None:
        config, key = self.config, self.key
        known = [name for name in SCHEDULES if name != "buckets" or isinstance(config, ContextConfig)]
        one_of(config.schedule, known, f"{key}.schedule")
        for name in ("over", "root", "at", "odds"):
            given = getattr(config, name)
            if name not in SCHEDULES[config.schedule] and given not in (None, {}, []):
                mend = f"drop it; {config.schedule} reads {' and '.join(SCHEDULES[config.schedule])}"
                problem = f"means nothing to the schedule {config.schedule}"
                raise ConfigError("unused-key", problem, key=f"{key}.{name}", value=given, mend=mend)
        for name in ("at", "odds"):
            if name in SCHEDULES[config.schedule] and not getattr(config, name):
                mend = "write {30%: 128, 60%: 256}" if name == "at" else "write [4, 2, 1]"
                raise ConfigError("missing-key", "is missing", key=f"{key}.{name}", mend=mend)
        at_least(config.multiple, 1, f"{key}.multiple")
        if config.root is not None and not config.root > 0:
            raise ConfigError("not-positive", "must be above zero", key=f"{key}.root", value=config.root)
        if isinstance(config, ContextConfig):
            self._check_context(config)
        for name, value in (("start", config.start), *((f"at.{place}", value) for place, value in config.at.items())):
            self._check_value(value, f"{key}.{name}")
        self._check_value(self.longest, f"{key.rpartition('.')[0]}.context_length")
        if config.start >= self.longest:
            mend = f"start below the stage's context_length = {self.longest}"
            raise ConfigError(
                "too-large", "leaves nothing to grow to", key=f"{key}.start", value=config.start, mend=mend
            )
        rungs = self._rungs()
        if list(rungs) != sorted(set(rungs)):
            mend = "every value above the one before it, and above start"
            raise ConfigError("not-rising", "does not rise", key=f"{key}.at", value=list(rungs), mend=mend)
        if config.schedule == "buckets" and rungs[-1] != self.longest:
            problem = f"are for the lengths {', '.join(map(str, rungs))}, of which the last is not the context_length"
            mend = f"start · 2^(number of odds − 1) must be {self.longest}"
            raise ConfigError("odds-do-not-fit", problem, key=f"{key}.odds", value=list(config.odds), mend=mend)

    def _check_value(self, value: int, key: str) -> None:
        multiple = self.config.multiple
        if value < 1 or value % multiple:
            near = max(1, round(value / multiple)) * multiple
            mend = f"use {near}, or another {self.key}.multiple"
            raise ConfigError("not-a-multiple", f"is not a multiple of {multiple}", key=key, value=value, mend=mend)
        if value > self.longest:
            mend = f"use {self.longest} or less"
            raise ConfigError("too-large", "is above the stage's context_length", key=key, value=value, mend=mend)

    def _check_context(self, config: ContextConfig) -> None:
        key = self.key
        one_of(config.how, HOW, f"{key}.how")
        one_of(config.constant, CONSTANT, f"{key}.constant")
        if config.how == "reshape" and config.constant == "rows":
            mend = "use tokens, or how: rechunk or truncate"
            problem = "does not go with how: reshape, which makes several rows of one"
            raise ConfigError("unknown-choice", problem, key=f"{key}.constant", value=config.constant, mend=mend)
        if not 2 <= config.most_lengths <= MOST_LENGTHS:
            problem = f"must be in 2..{MOST_LENGTHS}"
            raise ConfigError("out-of-range", problem, key=f"{key}.most_lengths", value=config.most_lengths)
        for name, values in (("at", [config.start, *config.at.values()]), ("odds", config.odds)):
            if len(values) > config.most_lengths:
                problem = f"makes {len(values)} lengths, each of which is compiled for itself"
                mend = f"use {config.most_lengths} or fewer, or raise {key}.most_lengths (up to {MOST_LENGTHS})"
                raise ConfigError("too-many-lengths", problem, key=f"{key}.{name}", value=values, mend=mend)
        if any(odds < 1 for odds in config.odds) or sum(config.odds) > MOST_ODDS:
            problem = f"must each be 1 or more, and {MOST_ODDS} at most together"
            raise ConfigError("out-of-range", problem, key=f"{key}.odds", value=config.odds)


def curricula(config: StageConfig, key: str, longest: int, seed: str) -> tuple[Curriculum | None, Curriculum | None]:
    """Of a stage's context, and of its attention's window. Raises ConfigError."""
    if config.context is not None and config.window is not None:
        mend = "keep one of them, or give each a stage of its own"
        problem = "stands beside context: a window grows at a fixed length"
        raise ConfigError("two-curricula", problem, key=f"{key}.window", value=config.window.schedule, mend=mend)
    grows = Curriculum(config.context, f"{key}.context", longest, seed) if config.context is not None else None
    opens = Curriculum(config.window, f"{key}.window", longest, seed) if config.window is not None else None
    return grows, opens


def _rising(values: Mapping[int, int]) -> Rising:
    """From the first step of each value; they are in order."""
    starts = sorted(values)
    return Rising(tuple(starts), tuple(values[start] for start in starts))
