"""The bandit: its update is the paper's, it finds the arm that teaches, and it goes on bitwise from a stored state."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.data.shape import LAG
from growkit.schedule.bandit import GAINS_KEPT, Exp3S, scaled_reward

gains = st.floats(-10, 10)


def slow(bandit: Exp3S, history: list[tuple[int, float]]) -> list[float]:
    """π after ``history`` (arm, gain), the paper's formulas sum by sum, without shifting weights."""
    n, weights = bandit.arms, [0.0] * bandit.arms
    policy = [1 / n] * n
    for t, (arm, gain) in enumerate(history, 1):
        known = sorted(g for _, g in history[:t])[-GAINS_KEPT:]
        low, high = np.quantile(known, 0.2), np.quantile(known, 0.8)
        reward = 0.0 if high <= low else min(1.0, max(-1.0, 2 * (gain - low) / (high - low) - 1))
        estimate = [reward / policy[i] if i == arm else 0.0 for i in range(n)]
        grown = [math.exp(w + bandit.learning_rate * e) for w, e in zip(weights, estimate)]
        alpha = 1 / t
        weights = [
            math.log((1 - alpha) * grown[i] + alpha / (n - 1) * sum(g for j, g in enumerate(grown) if j != i))
            for i in range(n)
        ]
        total = sum(map(math.exp, weights))
        policy = [(1 - bandit.exploration) * math.exp(w) / total + bandit.exploration / n for w in weights]
    return policy


@given(st.integers(2, 5), st.lists(st.tuples(st.integers(0, 4), gains), max_size=20), st.floats(0.001, 0.5))
def test_policy_is_the_papers(arms: int, history: list[tuple[int, float]], rate: float) -> None:
    bandit = Exp3S(arms, learning_rate=rate)
    history = [(arm % arms, gain) for arm, gain in history]
    state = bandit.begin()
    for step, (arm, gain) in enumerate(history):
        state = bandit.learned(json.loads(json.dumps(state)), step, arm, gain)
    found = bandit.probabilities(bandit.settled(state, len(history) + LAG))
    assert found == pytest.approx(slow(bandit, history), rel=1e-9)
    assert sum(found) == pytest.approx(1) and min(found) >= bandit.exploration / arms


def walk(bandit: Exp3S, state: Mapping[str, Any], steps: range, world: np.random.Generator) -> list[int]:
    """Arm 2 teaches until step 400, arm 0 afterwards."""
    chosen = []
    for step in steps:
        arm = bandit.choose(state, step)
        good = arm == (2 if step < 400 else 0)
        state = bandit.learned(state, step, arm, float(world.normal(1.0 if good else 0.0, 0.5)))
        chosen.append(arm)
    return chosen


def test_it_finds_what_teaches_and_follows_when_that_changes() -> None:
    """Each with an exploration of 5 %: most choices, but not before it has seen some."""
    chosen = walk(Exp3S(4, learning_rate=0.05, seed=1), Exp3S(4).begin(), range(800), np.random.default_rng(0))
    assert chosen[200:400].count(2) > 150 and chosen[600:].count(0) > 150
    assert chosen[:20].count(2) < 15 and set(chosen) == {0, 1, 2, 3}


def test_a_choice_does_not_know_the_last_steps() -> None:
    """A trainer chooses step n + 1 while step n trains; one that was resumed must choose the same."""
    bandit, state = Exp3S(3, learning_rate=0.5), Exp3S(3).begin()
    for step in range(50):
        ahead = bandit.choose(state, step + LAG - 1)
        state = bandit.learned(state, step, bandit.choose(state, step), float(step % 7))
        assert bandit.choose(json.loads(json.dumps(state)), step + LAG - 1) == ahead
    knowing = bandit.probabilities(bandit.settled(state, 49 + LAG))
    assert knowing != bandit.probabilities(bandit.settled(state, 49 + LAG - 1)), "the last gain is never learned"


@given(st.lists(gains, min_size=1, max_size=30))
def test_rewards_are_scaled_by_quantiles(known: list[float]) -> None:
    rewards = [scaled_reward(known, gain) for gain in known]
    assert all(-1 <= reward <= 1 for reward in rewards)
    assert [r for _, r in sorted(zip(known, rewards))] == sorted(rewards)
    assert scaled_reward([*known, None], None) == -1


def test_old_gains_are_forgotten() -> None:
    bandit, state = Exp3S(2), Exp3S(2).begin()
    for step in range(GAINS_KEPT + 10):
        state = bandit.learned(state, step, 0, float(step))
    assert len(bandit.settled(state, step + LAG)["gains"]) == GAINS_KEPT


def test_a_loss_that_is_no_number_teaches_nothing_and_can_be_stored() -> None:
    bandit, state = Exp3S(2, learning_rate=0.5), Exp3S(2).begin()
    for step, gain in enumerate((1.0, 0.0, math.nan, math.inf)):
        state = json.loads(json.dumps(bandit.learned(state, step, step % 2, gain), allow_nan=False))
    before, after = (bandit.probabilities(bandit.settled(state, step)) for step in (3, 4))
    assert after[0] < before[0] and all(map(math.isfinite, after))
