"""What growkit says when something is wrong: one sentence with the key, the value and the mend.

Every error a user can cause has a ``code`` (listed in docs/errors.md) and leaves nothing half-written.
Programming errors inside growkit are plain ``assert`` or built-in exceptions.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LONGEST = 300  # characters of a value that are shown


class GrowkitError(Exception):
    """Base of all errors meant for a user.

    ``code``: stable slug. ``key``: what was set (a recipe key, a file). ``value``: what it was set to.
    ``problem``: what is wrong with it. ``mend``: what to do instead.
    """

    exit_code = 2

    def __init__(self, code: str, problem: str, *, key: str = "", value: Any = None, mend: str = "") -> None:
        self.code, self.key, self.value, self.problem, self.mend = code, key, value, problem, mend
        where = f"{key}: " if key else ""
        shown = repr(value)
        shown = shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"
        got = f"got {shown}; " if value is not None else ""
        then = f"; {mend}" if mend else ""
        super().__init__(f"{where}{got}{problem}{then} [{code}]")


class ConfigError(GrowkitError):
    """A recipe, an override or a growth target that cannot be carried out."""


class DataError(GrowkitError):
    """A corpus that is missing, empty, too short or not what it was."""


class CheckpointError(GrowkitError):
    """A checkpoint or run folder that is damaged, foreign, busy or cannot be written."""


class PreservationError(GrowkitError):
    """A growth step that claimed to keep the function and, measured, did not."""


class TrainingError(GrowkitError):
    """A run that had to stop (non-finite loss, no memory for one sequence); what was saved can be resumed."""

    exit_code = 3


def cannot_write(path: Path, error: BaseException) -> CheckpointError:
    """What a full or read-only disk is reported as."""
    place = "another place that is there (run.folder, --output, --as)"
    mend = f"free space or name {place}; earlier checkpoints are untouched"
    return CheckpointError("cannot-write", f"cannot be written ({error})", key=str(path), mend=mend)


def require(package: str, *, extra: str, key: str) -> None:
    """Raises ConfigError if ``package``, which ``key`` needs and growkit's ``extra`` brings, is not installed."""
    if find_spec(package) is None:
        mend = f"install it: pip install 'growkit[{extra}]'"
        raise ConfigError("not-installed", f"needs the package {package}", key=key, mend=mend)
