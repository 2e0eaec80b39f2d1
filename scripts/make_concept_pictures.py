"""Draws the pictures of docs/concepts.md and docs/kernels.md into docs/pictures/, the same bytes each time.

    python scripts/make_concept_pictures.py [FOLDER]

They stand on a light ground of their own, so that they can be read on light and dark pages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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


def said(axes: Axes, x: float, top: float, lines: Sequence[tuple[str, str]]) -> None:
    """Lines of text and their colors, from ``top`` down."""
    for line, (text, color) in enumerate(lines):
        axes.text(x, top - 0.3 * line, text, color=color, fontsize=9.5)


def scan_on_a_gpu() -> Figure:
    """How Triton's kernels go through one sequence: programs, a block of 64 tokens going back, spans."""
    figure, axes = canvas(9.2, 5.6)
    left, top, width, height, gap = 0.9, 5.0, 1.1, 0.5, 0.18
    for column in range(3):
        x = left + column * width
        axes.text(x + width / 2, top + 0.14, "32 channels", ha="center", fontsize=9.5)
        for block in range(4):
            y = top - (block + 1) * height - (gap if block >= 2 else 0)
            chosen = column == 1 and block >= 2
            axes.add_patch(Rectangle((x, y), width, height, facecolor=OLD if chosen else ZERO, alpha=0.25))
            axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=OLD, linewidth=1.2))
            axes.plot(x + width / 2, y + height, "o", color=NEW, markersize=6)
            axes.text(x + 0.07, y + 0.1, "64 tokens", fontsize=8.5, color=SOFT)
    for span in range(2):
        y = top - height - span * (2 * height + gap)
        axes.text(left - 0.15, y, f"span {span + 1}", rotation=90, ha="right", va="center", fontsize=9.5)
    right = left + 3 * width + 0.45
    said(
        axes,
        right,
        top - 0.05,
        (
            ("a program: one sequence, 32 channels, one span", OLD),
            ("its state, 16 × 32 numbers, stays in registers", OLD),
            ("kept by forward: the state before each 64 tokens", NEW),
        ),
    )
    chunk, strip = 0.36, top - 1.75
    axes.text(right, strip + 0.72, "backward, one block of 64 tokens in chunks of 2:", fontsize=9.5)
    axes.plot(right, strip + 0.15, "o", color=NEW, markersize=6)
    for at in range(10):
        x = right + at * chunk
        if at == 7:
            axes.text(x + chunk / 2, strip + 0.15, "…", ha="center", va="center")
            continue
        face = OLD if at == 5 else ZERO
        axes.add_patch(Rectangle((x, strip), chunk, 0.3, facecolor=face, alpha=0.25))
        axes.add_patch(Rectangle((x, strip), chunk, 0.3, fill=False, edgecolor=OLD, linewidth=1.2))
        if at:
            axes.plot(x, strip + 0.15, "o", color=GROUND, markeredgecolor=NEW, markersize=5)
    end = right + 10 * chunk
    arrow(axes, (right, strip + 0.45), (end, strip + 0.45))
    arrow(axes, (end, strip - 0.15), (right, strip - 0.15), NEW)
    said(
        axes,
        right,
        strip - 0.45,
        (
            ("first: states before each chunk, made again, put aside", INK),
            ("then, from the last chunk on: its states made again", NEW),
            ("in registers, and the gradients back through them", NEW),
        ),
    )
    axes.text(0.55, 1.86, "Where programs are few, spans run at once, in three launches:", fontsize=9.5)
    boxes = (
        "1  each span from a state of zero,\nand the sum of its Δ",
        "2  one span after the other:\nh ← exp(A ΣΔ) h + what it made",
        "3  each span again,\nfrom its right state",
    )
    for at, text in enumerate(boxes):
        x = 0.6 + at * 2.85
        box(axes, x, 0.92, 2.42, 0.62, text, OLD if at != 1 else NEW)
        if at:
            arrow(axes, (x - 0.38, 1.23), (x - 0.06, 1.23))
    axes.text(0.55, 0.3, "Sums over channels, sequences and spans are written as parts and added in one order.")
    return figure


def pattention_on_a_gpu() -> Figure:
    """Forward of one chunk of rows, with both ways to the norm of a row of scores."""
    figure, axes = canvas(9.2, 4.9)
    axes.text(0.3, 4.5, "x, in chunks of rows", fontsize=9.5)
    for chunk in range(4):
        y = 3.75 - chunk * 0.75
        face = OLD if chunk == 1 else ZERO
        axes.add_patch(Rectangle((0.5, y), 0.75, 0.6, facecolor=face, alpha=0.25))
        axes.add_patch(Rectangle((0.5, y), 0.75, 0.6, fill=False, edgecolor=OLD, linewidth=1.2))
    first, second, third = 2.15, 4.65, 6.95
    ways = (
        (3.1, "(i) the norm from the scores", OLD, "first product a = x Kᵀ\nepilogue: Σ a² of each row",
         "a", "second product\nprologue: GELU(τ a / ‖a‖)\nthen times V"),
        (0.85, "(ii) the norm from the Gram matrix, before the scores", NEW,
         "first product a = x Kᵀ\nepilogue: GELU(τ a / ‖a‖)", "GELU(…)", "second product,\na plain one: times V"),
    )  # fmt: skip
    for y, title, color, one, between, two in ways:
        axes.text(first - 0.05, y + 1.15, title, color=color, fontsize=10, fontweight="bold")
        box(axes, first, y, 1.95, 0.8, one, color)
        axes.add_patch(Rectangle((second, y + 0.1), 1.35, 0.6, facecolor=color, alpha=0.18))
        axes.text(second + 0.675, y + 0.4, between, ha="center", va="center", fontsize=10)
        box(axes, third, y, 1.85, 0.8, two, color)
        arrow(axes, (first + 2.0, y + 0.4), (second - 0.04, y + 0.4), color)
        arrow(axes, (second + 1.37, y + 0.4), (third - 0.06, y + 0.4), color)
        arrow(axes, (1.3, 3.3), (first - 0.08, y + 0.4), color)
    axes.text(second + 0.675, 2.93, "rows of the chunk × n, work space", ha="center", fontsize=9, color=SOFT)
    axes.text(first - 0.05, 1.78, "‖a‖² = xᵀ (KᵀK) x; KᵀK as the sum of two matrices in 16 bits", fontsize=9, color=NEW)
    axes.text(0.3, 0.25, "Backward makes a again; x, K, V and one sum of squares for each row are all that is kept.")
    return figure


PICTURES = {
    "bank": bank,
    "identity-layer": layer,
    "schedule": schedule,
    "scan": scan,
    "scan-gpu": scan_on_a_gpu,
    "pattention-gpu": pattention_on_a_gpu,
}


def draw(folder: Path) -> None:
    """Writes every picture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
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
