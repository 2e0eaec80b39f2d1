"""A growth schedule over tokens, as a PNG and as rows of characters: parameters, context, batch, learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from growkit.duration import quantity
from growkit.errors import cannot_write
from growkit.schedule.plan import GrowthSchedule, Stage

BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 400  # of each stage's learning rate in the PNG

ROWS = ("parameters", "context", "batch", "learning rate")


def _series(schedule: GrowthSchedule) -> list[tuple[Stage, dict[str, Callable[[int], float]]]]:
    """Each stage, and what each row shows of a step of it."""

    def constant(value: float) -> Callable[[int], float]:
        return lambda _: value

    return [
        (
            stage,
            {
                "parameters": constant(stage.model.num_params()),
                "context": constant(stage.context_length),
                "batch": constant(stage.global_batch_tokens),
                "learning rate": stage.lr.lr,
            },
        )
        for stage in schedule.stages
    ]


def draw_schedule(schedule: GrowthSchedule, path: Path) -> None:
    """The four quantities over tokens, one above the other, as a PNG. Raises CheckpointError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(ROWS), 1, sharex=True, figsize=(9, 7), dpi=120)
    series = _series(schedule)
    for panel, name in zip(panels, ROWS, strict=True):
        tokens, values, behind = [], [], 0
        for stage, value in series:
            for step in _some_steps(stage):
                tokens.append(behind + step * stage.global_batch_tokens)
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
    label = max(map(len, ROWS)) + 1
    ranges = [_range([value[name](step) for stage, value in series for step in _some_steps(stage)]) for name in ROWS]
    columns = max(10, width - label - 1 - max(map(len, ranges)))
    places = [_at(schedule, (column + 0.5) / columns) for column in range(columns)]
    marks = [
        "·" if column and places[column - 1][0] == position else str(position + 1)[-1]
        for column, (position, _) in enumerate(places)
    ]
    lines = [f"{'stage':<{label}}{''.join(marks)}"]
    for name, bounds in zip(ROWS, ranges, strict=True):
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
    corners = {0, stage.lr.warmup_steps, stage.steps - stage.lr.decay_steps, stage.steps - 1}
    even = range(0, stage.steps, max(1, stage.steps // POINTS))
    return sorted(step for step in corners | set(even) if 0 <= step < stage.steps)


def _at(schedule: GrowthSchedule, share: float) -> tuple[int, int]:
    """(position of the stage, its step) when ``share`` of all tokens is read."""
    left = share * schedule.tokens
    for position, stage in enumerate(schedule.stages):
        if left < stage.tokens:
            return position, int(left // stage.global_batch_tokens)
        left -= stage.tokens
    return position, schedule.last.steps - 1
