"""A growth schedule over tokens, as a PNG, as rows of characters and as a table: parameters, context, batch, window,
learning rate."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from growkit.duration import quantity
from growkit.errors import cannot_write
from growkit.schedule.curriculum import Drawn, Rising, fewest
from growkit.schedule.stage import GrowthSchedule, Stage

BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 400  # of each stage's learning rate in the PNG

WINDOWS = 6  # of those that a window grows through in a stage, in the table

ROWS = ("parameters", "context", "window", "batch", "learning rate")


@dataclass(frozen=True)
class Point:
    """Where something begins to change. ``tokens``: of these stages, before it. ``context``, ``batch``: least and most,
    which differ where they are drawn anew for every step."""

    stage: str
    stage_step: int
    tokens: int
    parameters: int
    context: tuple[int, int]
    batch: tuple[int, int]
    window: int | None
    lr: float


def points(schedule: GrowthSchedule) -> list[Point]:
    """The schedule as a table: the start of each stage, each change of context, some of the window, the corners of the
    learning rate, the last step."""
    found, behind = [], 0
    for stage in schedule.stages:
        drawn = isinstance(stage.lengths, Drawn)
        for step in _corners(stage, WINDOWS):
            shape = stage.shape(step)
            found.append(
                Point(
                    stage=stage.name,
                    stage_step=step,
                    tokens=behind + stage.tokens_after(step),
                    parameters=stage.model.num_params(),
                    context=extent(stage, "context_length") if drawn else (shape.context_length, shape.context_length),
                    batch=extent(stage, "tokens") if drawn else (shape.tokens, shape.tokens),
                    window=shape.window,
                    lr=stage.rate(step),
                )
            )
        behind += stage.tokens
    return found


def extent(stage: Stage, name: str) -> tuple[int, int]:
    """The least and the largest ``name`` (of a StepShape) of the stage's steps."""
    values = [getattr(stage.pace.shape(length), name) for length in stage.lengths.values]
    return min(values), max(values)


def _rows(schedule: GrowthSchedule) -> list[str]:
    """Those of ROWS that there are: a window where a stage has one."""
    return [name for name in ROWS if name != "window" or any(stage.windows for stage in schedule.stages)]


def _series(schedule: GrowthSchedule) -> list[tuple[Stage, dict[str, Callable[[int], float]]]]:
    """Each stage, and what each row shows of a step of it."""

    def constant(value: float) -> Callable[[int], float]:
        return lambda _: value

    return [
        (
            stage,
            {
                "parameters": constant(stage.model.num_params()),
                "context": lambda step, of=stage: of.shape(step).context_length,  # type: ignore[misc]
                "window": lambda step, of=stage: of.shape(step).window or of.shape(step).context_length,  # type: ignore
                "batch": lambda step, of=stage: of.shape(step).tokens,  # type: ignore[misc]
                "learning rate": stage.rate,
            },
        )
        for stage in schedule.stages
    ]


def draw_schedule(schedule: GrowthSchedule, path: Path) -> None:
    """The quantities over tokens, one above the other, as a PNG. Raises CheckpointError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = _rows(schedule)
    figure, panels = plt.subplots(len(rows), 1, sharex=True, figsize=(9, 7), dpi=120)
    series = _series(schedule)
    for panel, name in zip(panels, rows, strict=True):
        tokens, values, behind = [], [], 0
        for stage, value in series:
            for step in _some_steps(stage):
                tokens.append(behind + stage.tokens_after(step))
                values.append(value[name](step))
            behind += stage.tokens
            tokens.append(behind)
            values.append(value[name](stage.steps - 1))
        panel.plot(tokens, values, linewidth=1.5)
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0, top=1.15 * max(values))
        panel.grid(alpha=0.3)
        behind = 0
        for position, stage in enumerate(schedule.stages):
            if behind:
                panel.axvline(behind, color="gray", linestyle=":", linewidth=1)
            if panel is panels[0]:
                place = (behind, 1.03 + 0.13 * (position % 4))  # on steps: short stages begin close together
                panel.annotate(stage.name, place, xycoords=("data", "axes fraction"), fontsize=8)
            behind += stage.tokens
    panels[-1].set_xlabel("tokens")
    figure.tight_layout()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        plt.close(figure)


def schedule_lines(schedule: GrowthSchedule, width: int) -> list[str]:
    """The same as rows of ``width`` characters: a bar for each share of the tokens, as high as its value is of the
    row's largest; the first row has the number of each stage where it begins."""
    series = _series(schedule)
    rows = _rows(schedule)
    label = max(map(len, rows)) + 1
    ranges = [_range([value[name](step) for stage, value in series for step in _some_steps(stage)]) for name in rows]
    columns = max(10, width - label - 1 - max(map(len, ranges)))
    places = [_at(schedule, (column + 0.5) / columns) for column in range(columns)]
    marks = [
        "·" if column and places[column - 1][0] == position else str(position + 1)[-1]
        for column, (position, _) in enumerate(places)
    ]
    lines = [f"{'stage':<{label}}{''.join(marks)}"]
    for name, bounds in zip(rows, ranges, strict=True):
        values = [series[position][1][name](step) for position, step in places]
        most = max(values)
        bars = "".join(BLOCKS[min(len(BLOCKS) - 1, int(len(BLOCKS) * value / most))] for value in values)
        lines.append(f"{name:<{label}}{bars} {bounds}")
    return lines


def _range(values: list[float]) -> str:
    low, high = quantity(min(values)), quantity(max(values))
    return low if low == high else f"{low}–{high}"


def _some_steps(stage: Stage) -> list[int]:
    """Steps of a stage at most POINTS apart, its corners included."""
    even = range(0, stage.steps, max(1, stage.steps // POINTS))
    return sorted({*_corners(stage, POINTS), *even})


def _corners(stage: Stage, windows: int) -> list[int]:
    """The steps at which something begins to change, of the window's at most ``windows``, and the last one."""
    left = stage.lr.decay_steps / stage.steps * stage.tokens  # by tokens; by steps the last ones are counted
    falls = stage.steps - stage.lr.decay_steps
    if stage.lr_by == "tokens":
        falls = fewest(lambda step: stage.tokens_after(step), stage.tokens - left)
    corners = {0, stage.lr.warmup_steps, falls, stage.steps - 1}
    corners.update(() if isinstance(stage.lengths, Drawn) else stage.lengths.starts)
    opens = stage.windows.starts if isinstance(stage.windows, Rising) else ()
    corners.update(opens[:: max(1, -(-len(opens) // windows))], opens[-1:])
    return sorted(step for step in corners if 0 <= step < stage.steps)


def _at(schedule: GrowthSchedule, share: float) -> tuple[int, int]:
    """(position of the stage, its step) when ``share`` of all tokens is read."""
    at = share * schedule.tokens
    ends = list(itertools.accumulate(stage.tokens for stage in schedule.stages))
    position = min(bisect_right(ends, at), len(ends) - 1)
    stage = schedule.stages[position]
    before = ends[position] - stage.tokens
    step = fewest(lambda steps: stage.tokens_after(steps) > at - before, 1) - 1
    return position, min(step, stage.steps - 1)
