"""A picture of the loss at each position of a window: whether a model goes on beyond the length it was trained at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

BINS_PER_DOUBLING = 8  # of the positions, over each of which the loss is a mean


def draw_positions(losses: Mapping[int, Sequence[float]], trained: int | None, path: Path) -> None:
    """``losses``: window length → mean nats at each of its positions; a line for each. ``trained``: the length of
    training, marked. As a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    for context, by_position in losses.items():
        spans = list(itertools.pairwise(bins(context)))
        means = [float(np.mean(by_position[low:high])) for low, high in spans]
        axes.plot([(low + 1 + high) / 2 for low, high in spans], means, label=f"windows of {context}")
    if trained is not None:
        axes.axvline(trained, color="gray", linestyle="--", linewidth=1, label=f"trained at {trained}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens that the prediction is made from")
    axes.set_ylabel("nats per token")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def bins(context: int) -> list[int]:
    """Edges 0 = e₀ < e₁ < … = ``context``, each about a bin of a doubling after the one before."""
    steps = np.arange(int(BINS_PER_DOUBLING * np.log2(context)) + 1)
    return sorted({0, *(2 ** (steps / BINS_PER_DOUBLING)).astype(int).tolist(), context})
