"""Opening whatever holds a model: a run, a checkpoint, a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from growkit.checkpoint import store
from growkit.checkpoint.hf.folder import read_folder
from growkit.checkpoint.hf.source import is_model_folder
from growkit.checkpoint.run_folder import MARK, RunFolder
from growkit.checkpoint.store import Checkpoint
from growkit.errors import ConfigError


def open_any(folder: Path, step: int | None = None, *, verify: bool = True) -> Checkpoint:
    """A checkpoint or Hugging Face folder, or the latest checkpoint (or that of ``step``) of a run folder. ``verify``:
    whether files are compared with their hashes, where there are any. Raises CheckpointError, and ConfigError for a
    Hugging Face model growkit does not know."""
    if (folder / MARK).is_file():
        return RunFolder.open(folder).load(step, verify=verify)
    if step is not None:
        mend = "name a run folder, or leave --from out"
        raise ConfigError("no-such-step", "is for a run, and this is not one", key="--from", value=step, mend=mend)
    return read_folder(folder) if is_model_folder(folder) else store.read(folder, verify=verify)
