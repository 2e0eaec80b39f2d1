"""The coefficients of an AltUp stream as a picture, for Weights & Biases; the report draws its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

ACROSS = 6  # layers in a row of the picture
MOST_NUMBERS = 6  # blocks, with which a number still fits into a cell
INCHES = 2.1  # of a layer, each way


def heat_maps(lines: Sequence[Sequence[Any]]) -> Figure:
    """Of each layer the matrix of ``matrices``, all on one scale around zero. ``lines``: of ``COEFFICIENT_COLUMNS``."""
    of = matrices(lines)
    across, down = min(ACROSS, len(of)), math.ceil(len(of) / ACROSS)
    figure = Figure(figsize=(INCHES * across, INCHES * down), dpi=110, layout="constrained")
    largest = max((abs(line[3]) for line in lines if line[3] is not None), default=0.0) or 1.0
    for place, (layer, matrix) in enumerate(of.items(), 1):
        axes, blocks = figure.add_subplot(down, across, place), len(matrix) - 1
        axes.imshow(matrix, cmap="PuOr_r", vmin=-largest, vmax=largest)  # the report's colours: orange above zero
        axes.set_xticks(range(blocks + 1), [*map(str, range(blocks)), "layer"], fontsize=7)
        axes.set_yticks(range(blocks + 1), ["read", *map(str, range(blocks))], fontsize=7)
        axes.set_title(f"layer {layer}", fontsize=8)
        axes.tick_params(length=0)
        axes.axhline(0.5, color="white", linewidth=3)
        axes.axvline(blocks - 0.5, color="white", linewidth=3)
        for row, values in enumerate(matrix if blocks <= MOST_NUMBERS else []):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    color = "white" if abs(value) > 0.7 * largest else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    return figure


def pixels(figure: Figure) -> NDArray[numpy.uint8]:
    """[height, width, 4]: wandb takes a figure itself only from pyplot, which keeps every one."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return numpy.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]


def matrices(lines: Sequence[Sequence[Any]]) -> dict[str, list[list[float]]]:
    """Of each layer a matrix of blocks + 1 rows and columns: to which block, from which. The first row is what the
    layer reads, the last column what it writes; NaN in their corner, and where a coefficient is not a number."""
    found = {}
    for layer, cells in groupby(lines, key=lambda line: str(line[0])):
        values = {(to, source): value for _, to, source, value in cells if value is not None}
        names = sorted({to for to, _ in values} - {"layer"}, key=int)
        found[layer] = [[values.get((to, name), math.nan) for name in (*names, "layer")] for to in ("layer", *names)]
    return found
