"""``growkit eval`` on a synthetic task: how many sequences a checkpoint answers right, at any length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from growkit.config.load import apply_override
from growkit.config.recipe import Recipe
from growkit.data.synthetic.tasks import EVALUATION_SEED, Task, make_task
from growkit.eval.synthetic import TaskScore, task_sums
from growkit.models.decoder import DecoderLM

console = Console(highlight=False)
SEQUENCES = 1000


def task_to_score(source: str, settings: Sequence[str], recipe: Recipe | None) -> Task:
    """The task ``source`` as the checkpoint's run had it, if it was trained on that, with ``settings`` (key=value) on
    top. Raises ConfigError."""
    own = recipe is not None and recipe.data.source == source
    raw: dict[str, Any] = dict(recipe.data.task) if own and recipe is not None else {}
    for setting in settings:
        apply_override(raw, setting)
    return make_task(source, raw, key="--data", settings_key="--setting")


def evaluate_task(
    model: DecoderLM,
    task: Task,
    contexts: Sequence[int],
    sequences: int | None,
    about: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Prints the accuracy on as many ``sequences`` (None: 1,000) of each length. ``about``: what JSON says of the
    checkpoint."""
    task.require_room(model.config.vocab_size)
    for context in contexts:
        task.require_length(context, "--context")
    count = sequences or SEQUENCES
    table = Table("context", "sequences right", "95 % interval", "answers right", "nats per answer")
    for context in contexts:
        score = TaskScore.of(task_sums(model, task, EVALUATION_SEED, count, context), task.answers)
        low, high = score.interval
        table.add_row(
            f"{context:,}",
            f"{score.sequence_accuracy:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{score.token_accuracy:.2%}",
            f"{score.loss:.4f}",
        )
        if as_json:
            values = {
                "data": task.name,
                "task": task.settings,
                "context_length": context,
                "sequences": score.sequences,
                "sequence_accuracy": score.sequence_accuracy,
                "sequence_accuracy_95": [low, high],
                "token_accuracy": score.token_accuracy,
                "loss": score.loss,
            }
            typer.echo(json.dumps(about | values))
    if not as_json:
        console.print(about["checkpoint"], soft_wrap=True, markup=False)
        said = ", ".join(f"{key} {value}" for key, value in task.settings.items() if value is not None)
        console.print(f"{task.name} ({said}), {count:,} sequences of each length", soft_wrap=True, markup=False)
        console.print(table)
