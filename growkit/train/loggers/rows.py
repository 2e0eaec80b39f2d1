"""Records of the metrics log as rows of named numbers, one row for a step, and the two tables beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from growkit.checkpoint.metrics_log import Record
from growkit.schedule.decisions import CANDIDATES

AXES = ("step", "tokens", "flops", "seconds")  # of training, growkit's own; what a chart can be drawn over
# kind of record: field → metric. The part before the slash is the group in which it is shown.
METRICS = {
    "stage": {
        "stage": "growth/stage",
        "parameters": "growth/parameters",
        "context_length": "growth/context_length",
        "global_batch_tokens": "growth/global_batch_tokens",
    },
    "step": {
        "loss": "train/loss",
        "bits_per_byte": "train/bits_per_byte",
        "lr": "optim/lr",
        "grad_norm": "gradients/norm",
        "new_grad_share": "gradients/new_share",
        "ramp": "growth/ramp",
        "context_length": "growth/context_length",
        "step_tokens": "growth/step_tokens",
        "window": "growth/window",
        "cut_tokens": "growth/cut_tokens",
        "padding": "data/padding",
        "joined_tokens": "data/joined_tokens",
        "passed_over_tokens": "data/passed_over_tokens",
        "kept": "data/kept",
        "excess": "data/excess",
        "excess_read": "data/excess_read",
        "effective_rows": "data/effective_rows",
        "seen_blocks": "data/seen_blocks",
        "prediction_gain": "curriculum/prediction_gain",
        "tokens_per_second": "speed/tokens_per_second",
        "flops_per_second": "speed/flops_per_second",
        "utilisation": "speed/utilisation",
        "memory_bytes": "speed/memory_bytes",
    },
    "validation": {
        "loss": "validation/loss",
        "bits_per_byte": "validation/bits_per_byte",
        "token_accuracy": "validation/token_accuracy",
        "sequence_accuracy": "validation/sequence_accuracy",
    },
    "blocks": {
        "distance": "blocks/distance",
        "new_block_grad_share": "gradients/new_block_share",
    },
}
GROWTH_COLUMNS = (
    "stage",
    "step",
    "tokens",
    "what",
    "parameters_before",
    "parameters_after",
    "exact",
    "delta_logits_float64",
    "delta_logits_training",
    "delta_loss",
    "dead",
    "locked_rows",
)
SAMPLE_COLUMNS = ("stage", "step", "tokens", "name", "prompt", "text")
COEFFICIENT_COLUMNS = ("layer", "to", "from", "coefficient")


@dataclass
class Row:
    """What is logged under one step. ``growths``, ``samples``: the whole tables, in a row that adds to them.
    ``coefficients``: of an AltUp stream as they are in this row."""

    step: int
    values: dict[str, float] = field(default_factory=dict)
    growths: list[list[Any]] | None = None
    samples: list[list[Any]] | None = None
    coefficients: list[list[Any]] | None = None


class Rows:
    """Gathers records into rows.

    What begins a stage (``stage``, ``growth``, a choice) goes into the row of the step after it: the row of the last
    step may have been sent before a stop, and a resumed run grows again. ``growth/mark`` is 1 in the row of a growth,
    else 0.
    """

    def __init__(self) -> None:
        self.open: Row | None = None  # more records of its step may come
        self.growths: list[list[Any]] = []
        self.samples: list[list[Any]] = []
        self.validations: list[float] = []  # bits per byte
        self.ngram: Record | None = None

    def gather(self, records: Iterable[Record]) -> Iterator[Row]:
        """The rows that ``records`` complete."""
        for record in records:
            if record["kind"] == "trial":  # what it comes to is in the decision
                continue
            step = record["step"] + (record["kind"] in ("stage", "growth") or record.get("by") == CANDIDATES)
            if self.open is not None and step > self.open.step:
                yield self.open
                self.open = None
            self.open = self.open or Row(step, {"growth/mark": 0.0})
            self._add(record, self.open)

    def _add(self, record: Record, row: Row) -> None:
        kind, values = record["kind"], {axis: record.get(axis) for axis in AXES}
        values |= {metric: record.get(name) for name, metric in METRICS.get(kind, {}).items()}
        if kind == "step":
            values |= {f"gradients/norm/{part}": norm for part, norm in (record.get("grad_norms") or {}).items()}
            likely = record.get("arm_probabilities") or {}
            values |= {f"curriculum/probability/{arm}": probability for arm, probability in likely.items()}
            values |= {"curriculum/arm": list(likely).index(record["arm"])} if likely else {}
        elif kind == "growth":
            values["growth/mark"] = 1.0
            self.growths.append(growth_line(record))
            row.growths = list(self.growths)
        elif kind == "validation":
            if record["bits_per_byte"] is not None:
                self.validations.append(record["bits_per_byte"])
            if self.ngram is not None:
                values["validation/ngram_bits_per_byte"] = self.ngram["bits_per_byte"]
        elif kind == "blocks":
            row.coefficients = coefficient_lines(record)
        elif kind == "decision":
            values["growth/decision"] = 1.0
            tried = record["evidence"].get("candidates", {})
            values |= {f"growth/candidate/{name}": way["loss"] for name, way in tried.items()}
        elif kind == "ngram":
            self.ngram = record
        elif kind == "sample":
            self.samples.append([record[column] for column in SAMPLE_COLUMNS])
            row.samples = list(self.samples)
        row.values |= {name: value for name, value in values.items() if value is not None}

    def summary(self) -> dict[str, float]:
        """What a list of runs is compared by, in bits per byte."""
        numbers: dict[str, float] = {}
        if self.validations:
            numbers |= {"final/bits_per_byte": self.validations[-1], "best/bits_per_byte": min(self.validations)}
        if self.ngram is not None:
            numbers["ngram/bits_per_byte"] = self.ngram["bits_per_byte"]
        return numbers


def growth_line(record: Record) -> list[Any]:
    """A growth record as a line of ``GROWTH_COLUMNS``."""
    certificate = record["certificate"]
    values = record | certificate
    values["what"] = ", ".join(f"{link['operator']} ({link['method']})" for link in record["links"])
    before, after = certificate["loss_before"], certificate["loss_after"]
    values["delta_loss"] = None if before is None or after is None else after - before
    values["dead"] = len(certificate["dead"])
    return [values[column] for column in GROWTH_COLUMNS]


def coefficient_lines(record: Record) -> list[list[Any]]:
    """A record of an AltUp stream as lines of ``COEFFICIENT_COLUMNS``, one for each cell of a layer's heat map: to a
    block or to what the layer reads, from a block or from what the layer makes."""
    lines = []
    for layer in record["layers"]:
        rows = [("layer", layer["read"], None), *zip(map(str, range(len(layer["mix"]))), layer["mix"], layer["write"])]
        for to, mixed, written in rows:
            lines += [[layer["id"], to, str(block), value] for block, value in enumerate(mixed)]
            lines += [] if written is None else [[layer["id"], to, "layer", written]]
    return lines
