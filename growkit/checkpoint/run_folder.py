"""A run's folder: who may write it, which checkpoints it holds, and how a branch starts from one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.hf import source
from growkit.errors import CheckpointError, ConfigError, GrowkitError, cannot_write

if TYPE_CHECKING:
    from growkit.checkpoint import store

_STEP = re.compile(r"step-(\d{8,})", re.ASCII)
LOG = "metrics.jsonl"
LOOK_SECONDS = 0.2  # that a look at who holds the lock may take
MARK = "run.json"  # says that the folder is a run of growkit, and where it came from


def step_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass
class RunFolder:
    """``path``/recipe.yaml, metrics.jsonl, checkpoints/step-…; written by one process at a time."""

    path: Path
    _lock: IO[str] | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / LOG

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def parent(self) -> dict[str, Any] | None:
        """The run (its folder's name) and the step this one was branched from, as its mark says; None if it was not, or
        if the mark is only just being written."""
        try:
            parent = json.loads((self.path / MARK).read_text(encoding="utf-8")).get("parent")
        except (OSError, ValueError, AttributeError):
            return None
        return parent if isinstance(parent, dict) else None

    @classmethod
    def create(
        cls, path: Path, recipe: str, *, parent: dict[str, Any] | None = None, key: str = "run.name"
    ) -> RunFolder:
        """Makes and locks a new run folder for ``recipe``; ``key`` is what said ``path``. Raises ConfigError if
        something is there already, and CheckpointError, leaving nothing, if it cannot be written or another process
        is beginning it."""
        if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
            mend = f"choose another {key}, or go on with `growkit resume {path}`"
            raise ConfigError("run-exists", "is already there", key=key, value=str(path), mend=mend)
        run = cls(path)
        with run.beginning():
            path.mkdir(parents=True, exist_ok=True)
            run.lock()
            run.recipe.write_text(recipe, encoding="utf-8")
            (path / MARK).write_text(json.dumps({"growkit": "run", "parent": parent}))
        return run

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """What puts a first checkpoint into a new run; if it fails, the folder is removed, unless another process has
        it. Raises CheckpointError."""
        try:
            yield
        except (GrowkitError, OSError) as error:
            if self._lock is not None:
                shutil.rmtree(self.path, ignore_errors=True)
                self.unlock()
            else:
                with suppress(OSError):
                    self.path.rmdir()  # which leaves a folder that holds anything
            if isinstance(error, OSError):
                raise cannot_write(self.path, error) from error
            raise

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder, not yet locked. Raises CheckpointError if it is none."""
        if not os.path.isfile(path / MARK):
            problem = "does not exist" if not os.path.exists(path) else "is not a run of growkit"
            mend = "name a folder that `growkit train` or `extend` made"
            if os.path.isfile(path / manifests.NAME):
                problem, mend = "is a checkpoint, not a run", "name its run; inspect, eval and extend take checkpoints"
            raise CheckpointError("not-a-run", problem, key=str(path), mend=mend)
        return cls(path)

    def lock(self) -> None:
        """Takes the run for this process, until it ends. Raises CheckpointError if another one has it."""
        try:
            handle = open(self.path / "run.lock", "a+")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # it may be somebody who only looks, as ``writer`` does
                time.sleep(LOOK_SECONDS)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            handle.close()
            mend = "wait for it, or branch with `growkit resume RUN --from STEP --as NEW`"
            raise CheckpointError(
                "run-busy", f"is being written by process {owner}", key=str(self.path), mend=mend
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        self._lock = handle
        os.register_at_fork(after_in_child=partial(_let_go, weakref.ref(handle)))

    def writer(self) -> str | None:
        """The process, another than this one, that is writing the run now; None if none is."""
        try:
            with open(self.path / "run.lock") as handle:
                owner = handle.read().strip()
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return None if owner == str(os.getpid()) else owner or "unknown"
        return None

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; half-written folders are not among them."""
        if not self.checkpoints.is_dir():
            return []
        found = (_STEP.fullmatch(child.name) for child in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def load(self, step: int | None = None, *, verify: bool = True) -> store.Checkpoint:
        """The checkpoint of ``step``, or the latest. A damaged one is refused, and the one before it offered.
        ``verify``: whether its files are compared with their hashes."""
        steps = self.steps()
        if not steps:
            mend = f"start it again with `growkit resume {self.path}`"
            raise CheckpointError("no-checkpoint", "has no checkpoint yet", key=str(self.path), mend=mend)
        if step is None:
            step = steps[-1]
        if step not in steps:
            mend = f"there are: {', '.join(map(str, steps))}"
            raise CheckpointError("no-such-step", "has no checkpoint", key="--from", value=step, mend=mend)
        from growkit.checkpoint import store  # torch, which a reader of the log does without

        with self.offering_the_one_before(step):
            return store.read(self.checkpoint(step), verify=verify)

    @contextmanager
    def offering_the_one_before(self, step: int) -> Iterator[None]:
        """Context: whatever finds the checkpoint of ``step`` damaged says which one to go on from."""
        try:
            yield
        except CheckpointError as error:
            if error.code not in ("damaged", "not-a-checkpoint", "unreadable"):
                raise
            earlier = [s for s in self.steps() if s < step]
            mend = (
                f"go on from the one before: `growkit resume {self.path} --from {earlier[-1]}`"
                if earlier
                else "no earlier checkpoint is left: start the run again"
            )
            raise CheckpointError("damaged", error.problem, key=error.key, mend=mend) from error

    def last_manifest(self) -> manifests.Manifest | None:
        """Of the newest checkpoint whose manifest is sound, its tensors unread; None if there is none. A run that is
        being written may drop one meanwhile."""
        for step in reversed(self.steps()):
            try:
                return manifests.read(self.checkpoint(step), verify=False)
            except CheckpointError:
                continue
        return None

    def set_aside_after(self, step: int) -> None:
        """Moves checkpoints later than ``step`` aside; they must be damaged. Raises ConfigError for a sound one."""
        later = [s for s in self.steps() if s > step]
        for s in later:
            try:
                manifests.read(self.checkpoint(s))
            except CheckpointError:
                continue
            mend = "branch instead: add `--as NEW`; this run keeps what it has"
            raise ConfigError(
                "would-lose-work", f"the sound checkpoint of step {s} is later", key="--from", value=step, mend=mend
            )
        try:
            for s in later:
                aside = self.checkpoints / f"damaged-{step_name(s)}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.checkpoint(s), aside)
        except OSError as error:
            raise cannot_write(self.checkpoints, error) from error

    def prune(self, keep_last: int, keep: set[int]) -> None:
        """Removes all checkpoints but the last ``keep_last`` and the steps in ``keep`` (ends of stages)."""
        for step in self.steps()[:-keep_last]:
            if step not in keep:
                shutil.rmtree(self.checkpoint(step))

    def branch(self, step: int, path: Path) -> RunFolder:
        """A new run at ``path`` that starts from this one's checkpoint of ``step``; this one is left untouched."""
        checkpoint = self.load(step)
        parent = {"run": self.path.name, "step": step}
        new = RunFolder.create(path, self.recipe.read_text(encoding="utf-8"), parent=parent, key="--as")
        with new.beginning():
            shutil.copytree(checkpoint.folder, new.checkpoint(step))
            new.metrics.write_bytes(log_before(checkpoint.folder, checkpoint.manifest))
        return new


def _let_go(lock: weakref.ref[IO[str]]) -> None:
    """In a process that this one has forked, a worker for one: when it outlives this one, it must not keep the run."""
    handle = lock()
    if handle is not None:
        handle.close()


def run_of(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint folder lies in, if it does."""
    run = checkpoint.parent.parent
    return RunFolder(run) if (run / MARK).is_file() else None


def check_files(checkpoint: store.Checkpoint, *, unread: Collection[str] = ()) -> None:
    """Compares the checkpoint's files with their hashes; ``unread``: those that nobody reads soon. Raises
    CheckpointError naming the file, and the checkpoint before it where there is one."""
    run, manifest = run_of(checkpoint.folder), checkpoint.manifest
    with run.offering_the_one_before(manifest.progress.step) if run is not None else nullcontext():
        manifests.check_files(checkpoint.folder, manifest, unread=unread)


def manifest_of(path: Path) -> manifests.Manifest:
    """What a checkpoint, a run's newest one, or a Hugging Face folder says of itself; its tensors are not looked at.
    Raises CheckpointError if there is none."""
    if source.is_model_folder(path):
        return source.manifest(path)
    if not (path / MARK).is_file():
        return manifests.read(path, verify=False)
    found = RunFolder(path).last_manifest()
    if found is None:
        mend = f"let it come to its first one: `growkit resume {path}`"
        raise CheckpointError("no-checkpoint", "has no sound checkpoint", key=str(path), mend=mend)
    return found


def log_before(checkpoint: Path, manifest: manifests.Manifest) -> bytes:
    """The metrics log up to a checkpoint: its run's, or, of one that lies in no run, what lies in its folder. Empty if
    there is none."""
    run = run_of(checkpoint)
    try:
        with open(run.metrics if run is not None else checkpoint / LOG, "rb") as log:
            return log.read(manifest.log_bytes)
    except FileNotFoundError:
        return b""
