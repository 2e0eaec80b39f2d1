"""Loggers besides metrics.jsonl: listeners of the metrics log that may fail without stopping the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from growkit.checkpoint.metrics_log import Record
from growkit.checkpoint.run_folder import RunFolder
from growkit.config.recipe import LoggerConfig
from growkit.errors import ConfigError

Listener = Callable[[Record], None]


def require(logger: LoggerConfig) -> None:
    """Raises ConfigError if a package that ``logger`` needs is not installed."""
    if logger.kind == "tensorboard" and find_spec("tensorboard") is None:
        mend = "install it: pip install 'growkit[tensorboard]', or use csv or wandb"
        raise ConfigError(
            "not-installed", "needs the package tensorboard", key="logger.kind", value="tensorboard", mend=mend
        )


def open_logger(
    logger: LoggerConfig, folder: RunFolder, say: Callable[[str], None]
) -> AbstractContextManager[Listener | None]:
    """The logger of a run, open from its start or resume to its end. ``say`` shows a line to the user; failures are
    logged as one warning."""
    if logger.kind == "wandb":
        from growkit.train.loggers.wandb_process import WandbProcess

        return WandbProcess(folder, logger.mode, say)
    if logger.kind in ("tensorboard", "csv"):
        from growkit.train.loggers.local import LocalLogger

        return LocalLogger(folder, logger.kind)
    return nullcontext()
