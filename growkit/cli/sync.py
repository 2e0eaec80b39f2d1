"""``growkit sync``: a run's metrics log to Weights & Biases."""

from __future__ import annotations

from pathlib import Path

import typer

from growkit.checkpoint.metrics_log import read_log
from growkit.checkpoint.run_folder import RunFolder
from growkit.errors import CheckpointError
from growkit.train.loggers.wandb_process import WandbProcess


def sync_run(path: Path) -> None:
    """Sends what the server lacks of the run at ``path``, however long it takes. Raises CheckpointError."""
    folder = RunFolder.open(path)
    folder.lock()
    try:
        if not sum(1 for _ in read_log(folder.metrics)):  # a damaged line is found before anything is sent
            _refuse(path, "it has logged nothing yet", "train it first")
        with WandbProcess(folder, "online", typer.echo, wait=True) as process:
            pass
    finally:
        folder.unlock()
    if process.failure is not None:
        mend = "see to that (`wandb login`, or WANDB_API_KEY), and run it again; nothing is sent twice"
        _refuse(path, f"Weights & Biases did not get it: {process.failure}", mend)


def _refuse(path: Path, problem: str, mend: str) -> None:
    raise CheckpointError("not-synced", problem, key=str(path), mend=mend)
