"""Triggers: each fires where its own formula says, and not a step before; what it saw decides, nothing else."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.schedule.triggers import FEWEST_POINTS, Crossing, Measured, Plateau

N, LARGER = 1_000_000, 4_000_000


def losses(values: list[float], every: int = 1) -> list[Measured]:
    return [Measured((i + 1) * every, (i + 1) * every * 100, 0.0, value) for i, value in enumerate(values)]


def first(trigger: Plateau | Crossing, measured: list[Measured]) -> int | None:
    """The step at which the trigger would have ended the stage."""
    fired = (at.stage_step for n, at in enumerate(measured, 1) if trigger.decide(measured[:n]).fire)
    return next(fired, None)


def test_a_plateau_is_seen_when_its_second_window_is_full() -> None:
    falling = [3.0 - 0.01 * i for i in range(40)]
    assert first(Plateau(10, 0.05), losses(falling + [2.6] * 40)) == 60, "one window across the bend, one beyond"
    assert first(Plateau(10, 0.05, patience=2), losses(falling + [2.6] * 40)) == 70
    assert first(Plateau(10, 0.05), losses(falling * 1)) is None
    assert first(Plateau(10, 0.101), losses(falling)) == 20, "it falls by 0.1 a window"
    assert first(Plateau(10, 0.05), losses([2.0] * 19)) is None


@given(st.integers(1, 7), st.integers(1, 30), st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_plateau_by_its_definition(every: int, window: int, values: list[float]) -> None:
    """Logged every so many steps: a window has the losses that fell into it."""
    measured = losses(values, every)
    decision = Plateau(window, 0.1).decide(measured)
    whole = measured[-1].stage_step // window
    means = [
        float(np.mean(inside)) if (inside := [m.loss for m in measured if n < m.stage_step / window <= n + 1]) else None
        for n in range(whole)
    ]
    known = whole >= 2 and None not in means[-2:]
    assert (
        decision.fire == bool(known and means[-2] - means[-1] < 0.1 - 1e-12) or abs(means[-2] - means[-1] - 0.1) < 1e-9
    )


def test_a_loss_that_is_not_a_number_is_no_plateau() -> None:
    assert not Plateau(2, 0.5).decide(losses([1.0, 1.0, math.nan, 1.0])).fire


def curve(floor: float, scale: float, steps: int) -> list[Measured]:
    """A million tokens a step."""
    at = [(s, 10**6 * s) for s in range(1, steps + 1)]
    return [Measured(s, tokens, 6.0 * N * tokens, floor + scale * tokens**-0.28) for s, tokens in at]


def crossing(**options: float) -> Crossing:
    return Crossing((N, LARGER), (6.0 * N, 6.0 * LARGER), **options)


def test_the_fit_finds_the_curve_it_was_made_of() -> None:
    evidence = crossing().decide(curve(1.7, 60.0, 200)).evidence
    assert evidence["floor"] == pytest.approx(1.7, rel=1e-6) and evidence["scale"] == pytest.approx(60.0, rel=1e-6)
    json.dumps(evidence, allow_nan=False)


def test_predictions_are_those_of_two_simulated_runs() -> None:
    """FLOP by FLOP along both curves, the larger one from the loss of now."""
    measured = curve(2.0, 60.0, 40)
    evidence = crossing(horizon=2.0).decide(measured).evidence
    pieces = 100_000
    each = 2.0 * measured[-1].flops / pieces
    for name, floor, size in (
        ("as it is", 2.0, N),
        ("grown", 2.0 - 406.4 * (N**-0.34 - LARGER**-0.34), LARGER),
    ):
        loss = measured[-1].loss
        for _ in range(pieces):  # dL/dD = −β·B·D^(−β−1), D from the loss itself
            tokens = ((loss - floor) / 60.0) ** (-1 / 0.28)
            loss -= each / (6.0 * size) * 0.28 * 60.0 * tokens**-1.28
        assert evidence["predicted"][name] == pytest.approx(loss, rel=1e-4)


def test_it_fires_where_the_larger_models_loss_falls_faster_per_flop() -> None:
    """((L − c′)/(L − c))^(1 + 1/β) = f′/f, solved by hand: of an infinitely short horizon."""
    gain = 40.0 * (N**-0.34 - LARGER**-0.34)
    above = gain / (4 ** (1 / (1 + 1 / 0.28)) - 1)
    wanted = (above / 60.0) ** (-1 / 0.28) / 1e6
    found = first(crossing(horizon=1e-3, size_scale=40.0), curve(2.0, 60.0, 300))
    assert found is not None and wanted < found < wanted + 2
    earlier = first(crossing(horizon=3.0, size_scale=40.0), curve(2.0, 60.0, 300))
    assert earlier is not None and earlier < found - 5, "a long horizon forgives an early growth"
    assert first(crossing(size_scale=1e-3), curve(2.0, 60.0, 300)) is None, "nothing is to be gained"


def test_a_loss_that_rises_is_no_reason_to_grow() -> None:
    rising = [Measured(s, 100 * s, 100.0 * s, 2.0 + 0.01 * s) for s in range(1, 40)]
    decision = crossing().decide(rising)
    assert not decision.fire and "does not fall" in decision.evidence["problem"]


def test_too_few_points_are_no_curve() -> None:
    assert first(crossing(horizon=100.0), curve(2.0, 60.0, 60)) == 2 * FEWEST_POINTS - 1
