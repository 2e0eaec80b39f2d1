"""What a run folder remembers of its run in Weights & Biases between sessions (``RUN/wandb.json``)."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

OFFLINE = "offline-run-"  # how wandb names the folder of an offline session, a fragment of the run


@dataclass
class WandbState:
    """``id``: of the run in W&B, made once. ``held``: all rows up to this step are on the server or in the fragments.
    ``fragments``: folders of offline sessions that were closed. ``online``: an online session began and was not closed,
    so that only the server knows what it holds. ``artifacts``: steps whose checkpoint was handed over."""

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    held: int = -1
    fragments: list[str] = field(default_factory=list)
    online: bool = False
    artifacts: list[int] = field(default_factory=list)

    @classmethod
    def load(cls, run: Path) -> WandbState:
        file = run / "wandb.json"
        if file.is_file():
            return cls(**json.loads(file.read_text()))
        state = cls()
        state.save(run)
        return state

    def save(self, run: Path) -> None:
        """Replaces the file at once: a kill leaves the old one or the new one."""
        beside = run / ".wandb.json.writing"
        beside.write_text(json.dumps(asdict(self), indent=1))
        os.replace(beside, run / "wandb.json")

    def unsent(self, run: Path) -> list[Path]:
        """The closed fragments that ``wandb sync`` has not sent yet."""
        folders = [run / "wandb" / name for name in self.fragments]
        return [folder for folder in folders if folder.is_dir() and not list(folder.glob("*.wandb.synced"))]

    def sync_command(self, run: Path) -> str:
        """What sends all fragments, in their order, into one run."""
        return f"wandb sync --id {self.id} {shlex.quote(str(run / 'wandb'))}/{OFFLINE}*"


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Waits until no other process sends this run: one that outlived its killed run may be about to finish."""
    (run / "wandb").mkdir(exist_ok=True)
    with open(run / "wandb" / "lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
