"""The training side of logging to Weights & Biases: starts the process that does it, and never waits for it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType

from growkit.checkpoint.metrics_log import Record
from growkit.checkpoint.run_folder import RunFolder

INIT_SECONDS = 15.0  # that the server has to take the run
FINISH_SECONDS = 20.0  # that the server has, at the end, to take what was not sent yet
# That the end of a run waits at most. Longer than a refused start and an offline end take together.
END_SECONDS = 30.0
FAILED = "FAILED "  # begins the line in which the process says what went wrong
log = logging.getLogger(__name__)


class WandbProcess:
    """A context manager that is a listener of the metrics log.

    It passes no records on: the process reads them from the log itself, and ends when its standard input does, also
    when the run is killed. A listener's call only looks whether the process still lives and has something to say.
    ``mode``: auto | online | offline. ``wait``: whether to wait for the end of the upload, however long it takes.
    """

    def __init__(self, folder: RunFolder, mode: str, say: Callable[[str], None], *, wait: bool = False) -> None:
        self._folder, self._mode, self._say, self._wait = folder, mode, say, wait
        self.failure: str | None = None
        self._heard = b""

    def __enter__(self) -> WandbProcess:
        logs = self._folder.path / "wandb"
        init, finish = (INIT_SECONDS, FINISH_SECONDS) if not self._wait else (4 * INIT_SECONDS, 0.0)
        words = [str(self._folder.path), self._mode, str(init), str(finish)]
        try:
            logs.mkdir(exist_ok=True)
            with open(logs / "logger.log", "ab") as errors:
                self._errors_from = errors.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "growkit.train.loggers.wandb", *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=os.environ
                    | {"PYTHONPATH": os.pathsep.join(sys.path)},  # the same growkit, however it was found
                    start_new_session=True,  # Ctrl-C is meant for the run, which tells this process when it ends
                )
        except OSError as error:
            self._fail(f"it could not be started ({error})")
            return self
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        return self

    def __call__(self, record: Record) -> None:
        if self.failure is None:
            self._hear()
            if self._process.poll() is not None:
                self._fail(self._last_words())

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self.failure is not None:
            return
        assert self._process.stdin is not None
        try:
            if kind is None:
                self._process.stdin.write(b"done")
            self._process.stdin.close()
        except BrokenPipeError:
            log.debug("the process had ended before the run did")
        try:
            self._process.wait(None if self._wait else END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._fail(f"it was not done {END_SECONDS:.0f} s after the end of the run")
            return
        self._hear()
        if self._process.returncode:
            self._fail(self._last_words())

    def _hear(self) -> None:
        assert self._process.stdout is not None
        self._heard += self._process.stdout.read() or b""
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._say(line.decode())

    def _last_words(self) -> str:
        with open(self._folder.path / "wandb" / "logger.log", "rb") as errors:
            errors.seek(self._errors_from)
            lines = errors.read().decode(errors="replace").splitlines()
        said = [line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)]
        return said[-1] if said else f"its process ended with {self._process.returncode}"

    def _fail(self, reason: str) -> None:
        self.failure = reason
        if not self._wait:
            log.warning(
                "logging to Weights & Biases ended: %s. The run itself goes on, and its log is complete: send it later "
                "with `growkit sync %s`",
                reason,
                self._folder.path,
            )
