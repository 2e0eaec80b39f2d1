"""Pictures of runs, drawn from their histories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from growkit.report.history import AXES, History, kept, number, smoothed

POINTS = 4000  # of a line, more than the picture has columns


def draw_curves(runs: Sequence[History], path: Path, *, x: str = "flops") -> None:
    """Bits per byte over ``x`` (one of AXES) of one or more runs, as a PNG.

    Lines are training loss (smoothed over about 2 % of the run), dots are validation; vertical marks are growth steps;
    a dashed line is the n-gram's score.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    for index, run in enumerate(runs):
        color = f"C{index}"
        values = run.steps["bits_per_byte"]
        smooth = smoothed(values, max(1, len(values) // 50))
        at = kept(smooth, POINTS)
        name = run.name.replace("$", r"\$")  # not a formula
        if len(at):
            axes.plot(run.steps[x][at], smooth[at], color=color, alpha=0.6, linewidth=1, label=f"{name}, training")
        if len(run.validations(x)[1]):
            axes.plot(*run.validations(x), "o-", color=color, label=f"{name}, validation")
        for event in run.kind("growth"):
            place = number(event.get(x))
            if not np.isfinite(place):
                continue
            axes.axvline(place, color=color, linestyle=":", linewidth=1)
            sizes = [number(event.get(key)) / 1e6 for key in ("parameters_before", "parameters_after")]
            label = f"{sizes[0]:.2f}M → {sizes[1]:.2f}M"
            axes.annotate(
                label,
                (place, 0.97),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
                color=color,
            )
    ngrams = sorted({(r["order"], number(r["bits_per_byte"])) for run in runs for r in run.kind("ngram")})
    for index, (order, score) in enumerate(ngrams):
        once = "" if index else f"{order}-gram (Kneser–Ney)"
        axes.axhline(score, color="gray", linestyle="--", linewidth=1, label=once)
    scores = [score for run in runs for score in run.validations(x)[1]]
    if scores:  # the first steps of training would flatten the rest
        lowest = min([*scores, *(score for _, score in ngrams)])
        axes.set_ylim(lowest * 0.95, min(max([*scores, 1.5 * lowest]) * 1.05, 8))
    axes.set_xlabel(AXES[x])
    axes.set_ylabel("bits per byte")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.1, top=0.95)  # tight_layout would draw everything twice
    figure.savefig(path, format="png")
    plt.close(figure)
