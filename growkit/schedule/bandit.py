"""An automated curriculum: which source or length to train on next, by what training on it has taught so far
(Graves et al. 2017, "Automated Curriculum Learning for Neural Networks", arXiv 1704.03003). No torch here.

All of it is a function of a state, plain JSON, and of the numbers that training gives: the same again after a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.data.shape import LAG

GAINS_KEPT = 512  # of the last, whose quantiles scale a reward
LOW, HIGH = 0.2, 0.8  # quantiles of gains that are rewards −1 and 1 (section 3.3)


@dataclass(frozen=True)
class Exp3S:
    """Exp3.S over ``arms`` (section 2.2): π_i = (1 − ε) softmax(w)_i + ε/N. After a reward r in [−1, 1] of arm a, with
    r̃_i = r [i = a] / π_i,

        w_i ← log((1 − α_t) exp(w_i + η r̃_i) + α_t/(N − 1) Σ_{j≠i} exp(w_j + η r̃_j)),  α_t = 1/t.

    A reward is what the loss fell by on the arm's own tokens, per FLOP, scaled so that the 20 % and 80 % quantiles of
    the last gains are −1 and 1. ``learning_rate``: η. ``exploration``: ε.

    State: ``weights``, w; ``rewards``, t; ``gains``, the last ones; ``pending``, [step, arm, gain] of the last LAG
    steps, which choices do not know of yet: a trainer that runs ahead would otherwise choose by other numbers than one
    that was resumed. A gain that is not a number is None: it has to lie in a checkpoint.
    """

    arms: int
    learning_rate: float = 0.01
    exploration: float = 0.05
    seed: int = 0

    def begin(self) -> Mapping[str, Any]:
        return {"weights": [0.0] * self.arms, "rewards": 0, "gains": [], "pending": []}

    def probabilities(self, state: Mapping[str, Any]) -> tuple[float, ...]:
        """π after all rewards that are not pending."""
        weights = np.array(state["weights"])
        likely = np.exp(weights - weights.max())
        mixed = (1 - self.exploration) * likely / likely.sum() + self.exploration / self.arms
        return tuple(map(float, mixed))

    def settled(self, state: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """``state`` as a choice for step ``step`` may know it: gains of LAG steps before and earlier rewarded."""
        late = [entry for entry in state["pending"] if entry[0] > step - LAG]
        for _, arm, gain in (entry for entry in state["pending"] if entry[0] <= step - LAG):
            state = self._rewarded(state, arm, gain)
        return {**state, "pending": late}

    def choose(self, state: Mapping[str, Any], step: int) -> int:
        """The arm of step ``step``: a draw from π with a random number of its own."""
        digest = hashlib.sha256(f"exp3s/{self.seed}/{step}".encode()).digest()
        uniform = int.from_bytes(digest[:7], "big") / 2**56
        bounds = np.cumsum(self.probabilities(self.settled(state, step)))
        return min(int(np.searchsorted(bounds, uniform, side="right")), self.arms - 1)

    def learned(self, state: Mapping[str, Any], step: int, arm: int, gain: float) -> Mapping[str, Any]:
        """The state after step ``step`` was trained on ``arm`` and gained ``gain``."""
        state = self.settled(state, step)
        return {**state, "pending": [*state["pending"], [step, arm, gain if math.isfinite(gain) else None]]}

    def _rewarded(self, state: Mapping[str, Any], arm: int, gain: float | None) -> Mapping[str, Any]:
        gains = [*state["gains"], gain][-GAINS_KEPT:]
        count = state["rewards"] + 1
        weights = np.array(state["weights"])
        weights[arm] += self.learning_rate * scaled_reward(gains, gain) / self.probabilities(state)[arm]
        top = weights.max()
        likely = np.exp(weights - top)
        alpha = 1 / count
        others = (likely.sum() - likely) / max(1, self.arms - 1)
        # Only differences matter: the largest is kept at 0, so that none grows without bound.
        mixed = np.log((1 - alpha) * likely + alpha * others) if self.arms > 1 else np.zeros(1)
        return {**state, "weights": (mixed - mixed.max()).tolist(), "rewards": count, "gains": gains}


def scaled_reward(gains: Sequence[float | None], gain: float | None) -> float:
    """``gain`` in [−1, 1]: −1 at the 20 % quantile of ``gains`` and below, 1 at the 80 % quantile and above."""
    if gain is None:
        return -1.0  # a loss that is not a number has taught nothing
    low, high = np.quantile([g for g in gains if g is not None], (LOW, HIGH))
    if high <= low:
        return 0.0
    return float(np.clip(2 * (gain - low) / (high - low) - 1, -1, 1))
