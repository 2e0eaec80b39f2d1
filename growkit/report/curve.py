"""Pictures of runs, drawn from their metrics logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]
AXES = {"flops": "FLOPs", "tokens": "tokens", "step": "steps"}


def draw_curves(runs: Mapping[str, Records], path: Path, *, x: str = "flops") -> None:
    """Bits per byte over ``x`` (flops, tokens or step) of one or more runs, as a PNG.

    Lines are training loss (smoothed over about 2 % of the run), dots are validation; vertical marks are growth steps;
    a dashed line is the n-gram's score.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    for index, (name, records) in enumerate(runs.items()):
        color = f"C{index}"
        steps = [r for r in records if r["kind"] == "step" and r["bits_per_byte"] is not None]
        smooth = _smoothed([r["bits_per_byte"] for r in steps], max(1, len(steps) // 50))
        axes.plot([r[x] for r in steps], smooth, color=color, alpha=0.6, linewidth=1, label=f"{name}, training")
        held = [r for r in records if r["kind"] == "validation"]
        axes.plot(
            [r[x] for r in held], [r["bits_per_byte"] for r in held], "o-", color=color, label=f"{name}, validation"
        )
        for event in (r for r in records if r["kind"] == "growth"):
            axes.axvline(event[x], color=color, linestyle=":", linewidth=1)
            label = f"{event['parameters_before'] / 1e6:.2f}M → {event['parameters_after'] / 1e6:.2f}M"
            axes.annotate(
                label,
                (event[x], 0.97),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
                color=color,
            )
    scores = {(r["order"], r["bits_per_byte"]) for records in runs.values() for r in records if r["kind"] == "ngram"}
    for order, score in sorted(scores):
        axes.axhline(score, color="gray", linestyle="--", linewidth=1, label=f"{order}-gram (Kneser–Ney)")
    lows = [r["bits_per_byte"] for records in runs.values() for r in records if r["kind"] == "validation"]
    if lows:
        axes.set_ylim(min(lows) * 0.9, min(min(lows) * 2.5, 8))
    axes.set_xlabel(AXES[x])
    axes.set_ylabel("bits per byte")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _smoothed(values: list[float], width: int) -> list[float]:
    """Mean over the last ``width`` values."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
