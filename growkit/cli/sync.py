"""``growkit sync``: a run's metrics log to Weights & Biases."""

from __future__ import annotations

from pathlib import Path

import typer

from growkit.checkpoint.run_folder import RunFolder
from growkit.errors import CheckpointError
from growkit.train.loggers.wandb_process import WandbProcess


def sync_run(path: Path) -> None:
    """Sends what the server lacks of the run at ``path``, however long it takes."""
    folder = RunFolder.open(path)
    folder.lock()
    try:
        with WandbProcess(folder, "online", typer.echo, wait=True) as process:
            pass
    finally:
        folder.unlock()
    if process.failure is not None:
        mend = "run the command again when that is mended; nothing is sent twice"
        raise CheckpointError(
            "not-synced", f"Weights & Biases did not take it ({process.failure})", key=str(path), mend=mend
        )
