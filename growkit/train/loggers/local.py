"""TensorBoard and CSV, by Lightning's own loggers, in the run folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from growkit.checkpoint.metrics_log import Record, read_log
from growkit.checkpoint.run_folder import RunFolder
from growkit.train.loggers.rows import GROWTH_COLUMNS, SAMPLE_COLUMNS, Row, Rows

FLUSH_SECONDS = 10  # until TensorBoard's file has what was logged
log = logging.getLogger(__name__)


class LocalLogger:
    """A context manager that is a listener of the metrics log. ``kind``: tensorboard | csv.

    A resumed run writes its files anew from the metrics log, so that they hold each step once, as the log does.
    """

    def __init__(self, folder: RunFolder, kind: str) -> None:
        self._metrics, self._place = folder.metrics, folder.path / kind
        self._tensorboard = kind == "tensorboard"
        self._rows = Rows()
        self._failed = False

    def __enter__(self) -> LocalLogger:
        with _Warned(self):
            shutil.rmtree(self._place, ignore_errors=True)
            self._logger = _tensorboard(self._place) if self._tensorboard else _csv(self._place)
            assert self._logger.experiment  # made now: TensorBoard's import takes a second that no step is to wait
        self._log(read_log(self._metrics))
        return self

    def __call__(self, record: Record) -> None:
        self._log([record])

    def __exit__(self, *_: Any) -> None:
        if self._rows.open is not None:
            self._write(self._rows.open)
        if not self._failed:
            with _Warned(self):
                self._logger.finalize("success")

    def _log(self, records: Iterable[Record]) -> None:
        for row in self._rows.gather(records):
            self._write(row)

    def _write(self, row: Row) -> None:
        if self._failed:
            return
        with _Warned(self):
            self._logger.log_metrics({**row.values}, row.step)
            if isinstance(self._logger, TensorBoardLogger):
                for name, columns, lines in (
                    ("growth/events", GROWTH_COLUMNS, row.growths),
                    ("samples/texts", SAMPLE_COLUMNS, row.samples),
                ):
                    if lines is not None:
                        self._logger.experiment.add_text(name, _markdown(columns, lines), row.step)

    def fail(self, error: OSError) -> None:
        self._failed = True
        log.warning(
            "logging to %s ended: %s. The run itself goes on, and metrics.jsonl is complete", self._place, error
        )


class _Warned:
    """A full disk ends this logging with a warning, never the run."""

    def __init__(self, logger: LocalLogger) -> None:
        self._logger = logger

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, OSError):
            self._logger.fail(error)
        return isinstance(error, OSError)


def _tensorboard(place: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(place), name="", version="", flush_secs=FLUSH_SECONDS)


def _csv(place: Path) -> CSVLogger:
    return CSVLogger(str(place), name="", version="", flush_logs_every_n_steps=1)


def _markdown(columns: Iterable[str], lines: list[list[Any]]) -> str:
    """A table as TensorBoard shows it."""
    titles = list(columns)
    cells = [titles, ["---"] * len(titles), *[[str(cell).replace("\n", " ") for cell in line] for line in lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
