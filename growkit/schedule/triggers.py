"""When to grow: predicates over what a stage has measured so far. No torch here.

A trigger sees only what the metrics log holds, so that a resumed run, which reads that log, decides the same. It ends
a stage before its duration; what it saw is recorded with the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

FEWEST_POINTS = 8  # of a curve that is fitted


@dataclass(frozen=True)
class Measured:
    """A logged step: ``stage_step`` from 1, ``tokens`` and ``flops`` of the whole run so far, ``loss`` in nats per
    token."""

    stage_step: int
    tokens: int
    flops: float
    loss: float


@dataclass(frozen=True)
class Verdict:
    """``fire``: whether the stage ends now. ``evidence``: the numbers that say so, plain JSON."""

    fire: bool
    evidence: dict[str, Any]


class Trigger(Protocol):
    def decide(self, measured: Sequence[Measured]) -> Verdict:
        """From all logged steps of the stage so far, in order."""
        ...


@dataclass(frozen=True)
class Plateau:
    """Fires when the loss, averaged over each ``window`` of steps, fell by less than ``least`` nats from window to
    window, ``patience`` times in a row."""

    window: int
    least: float
    patience: int = 1

    def decide(self, measured: Sequence[Measured]) -> Verdict:
        count = measured[-1].stage_step // self.window if measured else 0
        windows: list[list[float]] = [[] for _ in range(count)]
        for at in measured:
            if (place := (at.stage_step - 1) // self.window) < count:
                windows[place].append(at.loss)
        means = [sum(losses) / len(losses) if losses else math.nan for losses in windows]
        falls = [before - after for before, after in pairwise(means)]
        last = falls[-self.patience :]
        fire = len(last) == self.patience and all(fall < self.least for fall in last)  # NaN does not
        return Verdict(fire, {"kind": "plateau", "means": means[-self.patience - 1 :], "falls": last})


@dataclass(frozen=True)
class Crossing:
    """Fires when the larger model's predicted loss is lower for the same FLOPs, a ``horizon`` from now.

    Of a model with N parameters, L(D) = c + B·D^−β after D tokens (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2, with
    c = E + A·N^−α). c and B are fitted, by least squares, to the later half of the stage's losses. The larger model
    has c′ = c − A·(N^−α − N′^−α), begins at the fitted loss of now, as exact growth does, which is as if it had seen D′
    tokens, c′ + B·D′^−β, and spends FLOPs at its own price:

        small: c + B·(D + F/f)^−β      large: c′ + B·(D′ + F/f′)^−β

    Over a short horizon this is when the larger model's loss falls faster per FLOP, before which growing is too early:
    over a long one it would fire as soon as growing is better than never growing. ``parameters``, ``flops_per_token``:
    of both. ``horizon``: F, as a share of the run's FLOPs so far. ``size_scale``: A, ``size_power``: α,
    ``data_power``: β; the published ones are of web text in tokens of a few bytes.
    """

    parameters: tuple[int, int]
    flops_per_token: tuple[float, float]
    horizon: float = 0.1
    size_scale: float = 406.4
    size_power: float = 0.34
    data_power: float = 0.28

    def decide(self, measured: Sequence[Measured]) -> Verdict:
        later = [at for at in measured if 2 * at.stage_step > measured[-1].stage_step]
        if len(later) < FEWEST_POINTS:
            return Verdict(False, {"kind": "crossing", "points": len(later), "needed": FEWEST_POINTS})
        tokens = np.array([at.tokens for at in later], dtype=np.float64)
        basis = np.stack((np.ones_like(tokens), tokens**-self.data_power), axis=1)
        floor, scale = (float(x) for x in np.linalg.lstsq(basis, [at.loss for at in later], rcond=None)[0])
        small, large = self.parameters
        lower = floor - self.size_scale * (small**-self.size_power - large**-self.size_power)
        now = floor + scale * tokens[-1] ** -self.data_power
        evidence = {"kind": "crossing", "floor": floor, "scale": scale, "loss": now, "floor_of_the_larger": lower}
        if scale <= 0:  # a loss that does not fall says nothing of what more tokens would give
            return Verdict(False, evidence | {"problem": "the loss does not fall"})
        (price, dearer), flops = self.flops_per_token, self.horizon * measured[-1].flops
        as_if = ((now - lower) / scale) ** (-1 / self.data_power)
        ends = (
            floor + scale * (tokens[-1] + flops / price) ** -self.data_power,
            lower + scale * (as_if + flops / dearer) ** -self.data_power,
        )
        predicted = {"predicted": {"as it is": float(ends[0]), "grown": float(ends[1])}}
        return Verdict(bool(ends[1] < ends[0]), evidence | {"as_if_tokens": float(as_if)} | predicted)
