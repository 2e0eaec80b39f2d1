"""What a run shows: a live bar in a terminal, plain lines without one, a table at each growth step."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from growkit.checkpoint.metrics_log import Record
from growkit.duration import quantity
from growkit.schedule.decisions import decided
from growkit.schedule.stage import GrowthSchedule

LINE_SECONDS = 5.0  # between plain log lines
RATE_MEMORY = 0.9  # of the mean speed that the time left is told from, per record: one slow moment does not move it


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class QuietConsole(Console):
    """Goes on in silence when nobody reads any more (``growkit train … | head``): a run is worth more than its
    lines."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """A listener of the metrics log. ``schedule``: the run's, which its decisions change. ``mode``: auto (a
    bar in a terminal, else lines) | bar | plain | off."""

    def __init__(self, schedule: Callable[[], GrowthSchedule], mode: str, console: Console | None = None) -> None:
        self._schedule, self.console = schedule, console or QuietConsole(highlight=False)
        self.mode = ("bar" if sys.stdout.isatty() else "plain") if mode == "auto" else mode
        self._live: Live | None = None
        self._ngram: Record | None = None
        self._last_line = 0.0
        self._flops_per_second: float | None = None

    def __enter__(self) -> Display:
        if self.mode == "bar":
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def schedule(self) -> GrowthSchedule:
        return self._schedule()

    def __call__(self, record: Record) -> None:
        if self.mode != "off":
            show = {
                "step": self._show_step,
                "ngram": self._keep_ngram,
                "stage": self._show_stage,
                "validation": self._show_validation,
                "blocks": self._show_blocks,
                "growth": self._show_growth,
                "trial": self._show_trial,
                "decision": self._show_decision,
                "sample": self._show_sample,
            }
            show[record["kind"]](record)

    def print(self, message: Any) -> None:
        if self.mode != "off":
            self.console.print(message, soft_wrap=isinstance(message, str))

    def _show_step(self, record: Record) -> None:
        stage = self.schedule.stage(record["stage"])
        done = record["flops"] - self.schedule.start.flops
        left = self.schedule.flops - done
        rate = record["flops_per_second"]
        mean = rate if self._flops_per_second is None else self._flops_per_second
        self._flops_per_second = RATE_MEMORY * mean + (1 - RATE_MEMORY) * rate
        line = (
            f"stage {stage.index + 1}/{self.schedule.last.index + 1} {stage.name}  "
            f"{quantity(record['tokens'])} tokens  {quantity(record['tokens_per_second'])} tokens/s  "
            f"loss {record['loss']:.3f}  {record['bits_per_byte']:.3f} bits/byte  "
            f"ETA {clock(left / self._flops_per_second)}"
        )
        if self._live is not None:
            bar = ProgressBar(total=self.schedule.flops, completed=done, width=40)
            self._live.update(Group(bar, Text(line)))
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.print(f"step {record['step']:>6}  {escape(line)}")

    def _keep_ngram(self, record: Record) -> None:
        self._ngram = record

    def _show_stage(self, record: Record) -> None:
        self.print(
            f"[bold]stage {record['stage'] + 1}/{self.schedule.last.index + 1} {escape(record['name'])}[/bold]: "
            f"{quantity(record['parameters'])} parameters, context {record['context_length']}, "
            f"{'at most ' if record.get('at_most') else ''}{record['planned_steps']} steps"
        )

    def _show_trial(self, record: Record) -> None:
        name = f"trial {record['number']}/{record['of']} of {escape(record['name'])}, {escape(record['candidate'])}"
        if "loss" in record:
            loss = "not finite" if record["loss"] is None else f"{record['loss']:.4g} nats"
            self.print(f"{name}: held-out loss {loss} after {record['steps']} steps")
        else:
            self.print(f"{name}: {quantity(record['parameters'])} parameters, {record['steps']} steps")

    def _show_decision(self, record: Record) -> None:
        self.print(f"[bold]{escape(decided(record))}[/bold]")

    def _show_validation(self, record: Record) -> None:
        ngram = self._ngram
        beside = f" (a {ngram['order']}-gram: {ngram['bits_per_byte']:.3f})" if ngram else ""
        where = "end of stage " + escape(record["name"]) if record["end_of_stage"] else f"step {record['step']}"
        score = f"[bold]{record['bits_per_byte']:.3f}[/bold] bits per byte{beside}"
        if "sequence_accuracy" in record:
            shares = f"{record['sequence_accuracy']:.2%}[/bold] of the sequences right, {record['token_accuracy']:.2%}"
            score = f"[bold]{shares} of the answers"
        self.print(f"validation at {where}: {score}")

    def _show_blocks(self, record: Record) -> None:
        self.print(f"the two nearest blocks are {record['distance']:.2g} of a block's size apart")

    def _show_sample(self, record: Record) -> None:
        self.console.rule("a sample")
        self.console.print(record["text"], markup=False)
        self.console.rule()

    def _show_growth(self, record: Record) -> None:
        self.print(growth_table(record))


def growth_table(record: Record) -> Table:
    """What grew, parameters before → after, and what the certificate measured."""
    certificate = record["certificate"]
    title = f"growth into {escape(record['name'])}"
    table = Table(title=title, caption_justify="left")
    table.add_column("what grew", no_wrap=True)
    table.add_column("parameters", no_wrap=True)
    for header in ("Δlogits float64", f"Δlogits {certificate['training_dtype']}", "Δloss"):
        table.add_column(header)
    names = [f"{link['operator']} ({link['method']})" for link in record["links"]]
    if len(names) > 1:
        for name, link in zip(names, record["links"]):
            delta = link.get("delta_logits_float64")  # logs from before it was measured lack it
            table.add_row(name, "", "" if delta is None else f"{delta:.1e}", "", "")
        names = ["together"]
    ratio = record["parameters_after"] / record["parameters_before"]
    sizes = f"{quantity(record['parameters_before'])} → {quantity(record['parameters_after'])} (×{ratio:.2f})"
    table.add_row(
        names[0],
        sizes,
        f"{certificate['delta_logits_float64']:.1e}",
        f"{certificate['delta_logits_training']:.1e}",
        f"{certificate['loss_after'] - certificate['loss_before']:+.1e}",
    )
    notes = [f"{'exact' if certificate['exact'] else 'not exact'}: {certificate['reason']}"]
    if certificate["dead"]:
        notes.append(f"warning: {len(certificate['dead'])} new parameters get no gradient")
    if certificate["locked_rows"]:
        notes.append(f"warning: {certificate['locked_rows']} new rows are copies that training cannot tell apart")
    if certificate.get("tied_blocks"):
        pairs = ", ".join(f"{a} and {b}" for a, b in certificate["tied_blocks"])
        notes.append(f"warning: training cannot tell the blocks {pairs} apart")
    table.caption = "\n".join(notes)
    return table
