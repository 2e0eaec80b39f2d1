"""Scores on the tasks of lm-evaluation-harness, through transformers' interface."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.errors import CheckpointError, ConfigError, DataError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("transformers", "accelerate", "lm_eval")  # what the extra ``tasks`` brings
ROWS = 8  # requests per forward pass
NEAR = 5  # names to propose: the harness has thousands


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. ``metric``: as the harness has it, its filter behind a comma unless that is none.
    ``documents``: how many were scored. ``higher_is_better``: None if the task does not say."""

    task: str
    version: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool | None


def check_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's table of tasks, which has all of ``names``. ``folder``: task YAMLs of one's own; if they are tasks
    all of it, the built-in ones, whose reading takes a while, are left out. Raises ConfigError."""
    for package in PACKAGES:
        require(package, extra="tasks", key="--tasks")
    if not names:
        raise ConfigError("missing-key", "names no task", key="--tasks", mend="name one, such as hellaswag")
    if folder is not None and not folder.is_dir():
        mend = "name the folder that your task YAMLs are in"
        raise ConfigError("no-such-folder", "is not a folder", key="--tasks-path", value=str(folder), mend=mend)
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, NEAR)
            mend = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ConfigError("unknown-choice", "is not a known task", key="--tasks", value=name, mend=mend)
    return manager


def load_folder(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a Hugging Face folder; safetensors only, and no code from it. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        mend = "name a folder with config.json, model.safetensors and a tokenizer"
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            "not-a-checkpoint", f"transformers does not read it ({first})", key=str(folder), mend=mend
        ) from error
    return model.to(device), tokenizer


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    max_length: int | None = None,
) -> list[TaskScore]:
    """``model`` on the tasks ``names`` of ``manager`` (check_tasks), groups' own scores among them, in their order.

    ``limit``: documents of each task, the first ones. ``max_length``: tokens of context and continuation together; what
    is longer loses its beginning. Raises DataError for a task whose data cannot be loaded.
    """
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=ROWS, max_length=max_length)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the harness talks; what is printed here is the result
            found = simple_evaluate(scorer, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    except (datasets.exceptions.DatasetsError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        mend = "check the network, or the data_files of your own task"
        raise DataError(
            "dataset-unavailable", f"their data cannot be loaded ({first})", key="--tasks", value=list(names), mend=mend
        ) from error
    scores: dict[tuple[str, str], TaskScore] = {}
    for task, values in (found["results"] | found.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{name}")
            scores[task, key] = TaskScore(
                task=task,
                version=str(found["versions"].get(task, "")),
                metric=metric if name == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                documents=int(values["sample_len"]),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            )
    return list(scores.values())
