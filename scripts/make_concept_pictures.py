"""Draws the pictures of docs/concepts.md and docs/kernels.md into docs/pictures/, the same bytes each time.

    python scripts/make_concept_pictures.py [FOLDER]

They stand on a light ground of their own, so that they can be read on light and dark pages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.cli.recipes import read  # noqa: E402
from growkit.duration import quantity  # noqa: E402

OUTPUT = ROOT / "docs" / "pictures"
GROUND, INK, SOFT = "#fbfaf7", "#22262b", "#8a9097"
OLD, NEW, ZERO = "#2a7f78", "#d9822b", "#ffffff"
STYLE = {
    "svg.hashsalt": "growkit",  # element ids that do not change
    "svg.fonttype": "none",  # text as text
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.facecolor": GROUND,
}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing of ``width`` × ``height`` inches, one unit an inch."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def rows(axes: Axes, x: float, top: float, count: int, face: str, edge: str) -> float:
    """A matrix drawn as ``count`` rows from ``top`` down; returns where it ends."""
    for row in range(count):
        axes.add_patch(Rectangle((x, top - 0.2 * (row + 1)), 0.8, 0.17, facecolor=face, edgecolor=edge))
    return top - 0.2 * count


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, style: str = "-") -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=color, linestyle=style, linewidth=1.3)
    )


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.03", facecolor=GROUND, edgecolor=color, lw=1.8)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)


def bank() -> Figure:
    """A Pattention projection before and after a bank is appended."""
    figure, axes = canvas(8.8, 3.7)
    for left, top, middle, title in ((0.25, 2.55, 2.0, "before"), (4.6, 2.85, 1.75, "after: a bank is appended")):
        axes.text(left, 3.4, title, fontweight="bold")
        axes.text(left, middle, "x", fontsize=14, va="center")
        axes.text(left + 3.68, middle, "Σ", fontsize=15, va="center", ha="center")
        for place, name in ((left + 0.75, "keys"), (left + 2.2, "values")):
            axes.text(place, top + 0.12, name, fontsize=9.5)
        banks = (("Θ₀", 4, OLD, OLD), ("Θ₁", 5, NEW, ZERO))[: 1 if title == "before" else 2]
        for theta, count, color, values in banks:
            end = rows(axes, left + 0.75, top, count, color, color)
            rows(axes, left + 2.2, top, count, values, color)
            at = (top + end) / 2
            arrow(axes, (left + 0.18, middle), (left + 0.7, at), color)
            arrow(axes, (left + 1.6, at), (left + 2.15, at), color)
            arrow(axes, (left + 3.05, at), (left + 3.55, middle), color)
            axes.text(left + 1.87, at + 0.08, theta, ha="center")
            if values == ZERO:
                axes.text(left + 1.15, end - 0.22, "random keys", ha="center", fontsize=9.5, color=NEW)
                axes.text(left + 2.6, end - 0.22, "values of zero", ha="center", fontsize=9.5, color=NEW)
            top = end - 0.25
    axes.text(0.25, 0.2, "Each bank has a norm of its own, so the old scores stay as they were; the new term is 0.")
    return figure


def layer() -> Figure:
    """An identity layer between two old ones."""
    figure, axes = canvas(8.6, 3.0)
    axes.text(0.25, 2.7, "before", fontweight="bold")
    axes.text(3.6, 2.7, "after: a layer that writes zeros", fontweight="bold")
    for left, right, places in ((0.35, 3.0, (0.65, 1.9)), (3.7, 8.3, (4.0, 5.55, 7.1))):
        arrow(axes, (left, 0.85), (right, 0.85))
        axes.text(right + 0.05, 0.85, "x", va="center", fontsize=13)
        for number, place in enumerate(places):
            new = len(places) == 3 and number == 1
            color = NEW if new else OLD
            name = "layer 2\n(from 0)" if new else f"layer {number if len(places) == 2 else number // 2}"
            box(axes, place, 1.55, 0.85, 0.65, name, color)
            arrow(axes, (place + 0.15, 0.9), (place + 0.15, 1.5), color)
            arrow(axes, (place + 0.7, 1.5), (place + 0.7, 0.98), color, "--" if new else "-")
            axes.text(place + 0.78, 1.2, "+ 0" if new else "+", color=color, va="center")
    axes.text(
        0.25, 0.2, "The residual stream x passes the new layer unchanged; the zeros get a gradient on the first step."
    )
    return figure


def schedule() -> Figure:
    """Parameters, context and learning rate of the quickstart over its tokens, as its recipe settles them."""
    _, planned = read("quickstart", [])
    figure, panels = plt.subplots(3, 1, figsize=(8.6, 4.8), sharex=True, layout="constrained")
    begin = 0
    for stage in planned.stages:
        tokens = [begin + step * stage.global_batch_tokens for step in range(stage.steps + 1)]
        span, inside = (begin, tokens[-1]), {"ha": "center", "va": "center", "fontsize": 9.5}
        for panel, value in zip(panels, (stage.model.num_params(), stage.context_length)):
            panel.fill_between(span, value, color=OLD, alpha=0.18, linewidth=0)
            panel.plot(span, (value, value), color=OLD, linewidth=2)
        panels[2].plot(tokens[:-1], [stage.lr.lr(step) for step in range(stage.steps)], color=OLD, linewidth=2)
        middle = (span[0] + span[1]) / 2
        parameters = quantity(stage.model.num_params())
        panels[0].text(middle, stage.model.num_params(), f"{stage.name}\n{parameters}", **inside | {"va": "bottom"})
        panels[1].text(middle, stage.context_length / 2, str(stage.context_length), **inside)
        if stage.links:
            for panel in panels:
                panel.axvline(begin, color=NEW, linewidth=1.5, linestyle="--")
            above = {"transform": panels[0].get_xaxis_transform(), "ha": "center", "va": "bottom"}
            panels[0].text(begin, 1.02, stage.links[0].operator, color=NEW, **above)
        begin = tokens[-1]
    panels[0].set_ylim(top=1.5 * planned.stages[-1].model.num_params())
    for panel, label in zip(panels, ("parameters", "context", "learning rate")):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.set_facecolor(GROUND)
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter(lambda value, _: quantity(value) if value >= 1000 else f"{value:g}")
    panels[2].xaxis.set_major_formatter(lambda value, _: quantity(value) if value else "0")
    panels[2].set_xlabel("tokens")
    return figure


def scan() -> Figure:
    """How the selective scan's kernel goes through one sequence: tasks across, chunks down."""
    figure, axes = canvas(9.2, 3.4)
    left, top, width, height = 0.9, 2.75, 1.15, 0.62
    for task in range(3):
        x = left + task * width
        axes.text(x + width / 2, top + 0.12, "128 channels", ha="center", fontsize=9.5)
        for chunk in range(3):
            y = top - (chunk + 1) * height
            face = OLD if (task, chunk) == (1, 1) else ZERO
            axes.add_patch(Rectangle((x, y), width, height, facecolor=face, alpha=0.25, edgecolor=None))
            axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=OLD, linewidth=1.2))
            axes.plot(x + width / 2, y + height, "o", color=NEW, markersize=7)
            axes.text(x + 0.08, y + 0.12, "32 tokens", fontsize=8.5, color=SOFT)
    arrow(axes, (left - 0.2, top), (left - 0.2, top - 3 * height))
    axes.text(left - 0.3, top - 1.5 * height, "forward", rotation=90, ha="right", va="center", fontsize=9.5)
    right = left + 3 * width
    arrow(axes, (right + 0.2, top - 3 * height), (right + 0.2, top), NEW)
    axes.text(right + 0.3, top - 1.5 * height, "backward", rotation=90, va="center", fontsize=9.5, color=NEW)
    for line, (text, color) in enumerate(
        (
            ("in work: 32 tokens of 128 channels;", OLD),
            ("16 states of 16 channels in registers", OLD),
            ("kept by forward: the state before each chunk", NEW),
            ("made again by backward: a chunk's other states", NEW),
        )
    ):
        axes.text(right + 0.62, top - 0.35 - 0.42 * line, text, color=color, fontsize=9.5)
    axes.text(left, 0.2, "A column is a task: no task waits for another, and every sum has one order.")
    return figure


PICTURES = {"bank": bank, "identity-layer": layer, "schedule": schedule, "scan": scan}


def draw(folder: Path) -> None:
    """Writes every picture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=OUTPUT, help="where to (default: docs/pictures)")
    folder = parser.parse_args().folder
    draw(folder)
    print(f"wrote {', '.join(f'{name}.svg' for name in PICTURES)} to {folder}")


if __name__ == "__main__":
    main()
