"""One self-contained HTML file about one or more runs: nothing is loaded when it is looked at.

The page's own script builds everything from JSON, as text and never as markup. A content security policy lets nothing
else run and nothing be fetched, so that a run whose names or samples look like HTML stays what it is.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import html
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from growkit import __version__
from growkit.checkpoint.metrics_log import Record, without_nan
from growkit.errors import ConfigError, cannot_write
from growkit.report.comparison import MOST_DIFFERENCES, differing, shown
from growkit.report.history import MEASURED, PARTED, PLACE, Column, History, finite, kept, number, smoothed
from growkit.report.lineage import tree
from growkit.report.run_summary import RunSummary

POINTS = 2000  # of a curve: more than a screen has columns
SMOOTHING = 30  # the training loss is a mean over this part of the run
MARK = b"<!doctype html>\n<!-- growkit report -->"  # how a report is told from a file that must not be replaced
SCRIPTS = ("format.js", "page.js", "sections.js", "blocks.js", "charts.js", "main.js")
WHOLE = ("step", "tokens", "parameters")  # counts, never rounded
BLOCKS = ("distance", "new_block_grad_share")  # of an AltUp stream, at validations
CURVES = tuple(name for name in MEASURED if name != "loss")  # which is shown in bits per byte


def write_report(runs: Sequence[RunSummary], path: Path) -> None:
    """Writes the page at ``path``; a report that is there is replaced, anything else is not. Raises ConfigError for
    that, and CheckpointError when the disk will not."""
    beside = path.with_name(f".writing-{path.name}")
    try:
        if path.exists() and not _is_report(path):
            mend = "name another file; only a report is replaced"
            raise ConfigError("file-exists", "is already there", key="--output", value=str(path), mend=mend)
        beside.write_bytes(page(runs))
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise cannot_write(path, error) from error


def page(runs: Sequence[RunSummary]) -> bytes:
    """The whole file. Some 2 MB are the charts' library, the rest grows with POINTS and not with the run."""
    script = "".join(_asset(name) for name in SCRIPTS)
    library = _library()
    data = json.dumps(without_nan(page_data(runs)), allow_nan=False, separators=(",", ":"))
    parts = {
        "title": html.escape(", ".join(run.name for run in runs)),
        "policy": f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {_hash(script)} "
        f"{_hash(library)}",
        "style": _asset("report.css"),
        "data": data.replace("<", "\\u003c"),  # or </script> in a sample would end the element
        "library": _compressed(library),
        "script": script,
    }
    body = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))
    return MARK + b"\n" + body.encode()


def page_data(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """What the page draws, as plain values."""
    differences = differing([run.recipe for run in runs])
    listed = {key: [shown(value) for value in row] for key, row in list(differences.items())[:MOST_DIFFERENCES]}
    return {
        "runs": [run_data(run) for run in runs],
        "differences": listed,
        "more_differences": len(differences) - len(listed),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "growkit": __version__,
    }


def run_data(run: RunSummary) -> dict[str, Any]:
    history = run.history
    figures = ("state", "parameters", "tokens", "flops", "seconds", "last", "best", "ngram", "growths")
    return {
        "name": run.name,
        **{key: getattr(run, key) for key in (*figures, "max_delta_logits", "environment")},
        "step": history.place["step"],
        **curves(history),
        "validations": [
            _place(record)
            | {
                "value": finite(number(record.get("bits_per_byte"))),
                "context_length": finite(number(record.get("context_length"))),
                "end_of": str(record.get("name", "")) if record.get("end_of_stage") is True else None,
            }
            for record in history.kind("validation")
        ],
        "marks": marks(history),
        "samples": [
            _place(record) | {key: str(record.get(key, "")) for key in ("name", "prompt", "text")}
            for record in history.kind("sample")
        ],
        "blocks": blocks(history),
        "recipe": run.recipe_text,
        "lineage": asdict(tree(run.folder, history=history)),
    }


def curves(history: History) -> dict[str, Any]:
    """``curves``: name → its values and which of ``places`` they are at; many curves share their places. The training
    loss comes twice, as it was and ``smoothed``; what is known of blocks has the places of validations."""
    columns = {key: history.steps[key] for key in CURVES}
    columns |= {key: column for key, column in history.steps.items() if key.startswith(tuple(PARTED))}
    loss = columns["bits_per_byte"]
    columns["smoothed"] = smoothed(loss, max(1, len(loss) // SMOOTHING))
    validated = {key: _column(history.kind("blocks"), key) for key in (*PLACE, *BLOCKS)}
    places: dict[tuple[bool, bytes], int] = {}
    tables: list[dict[str, list[float | int | None]]] = []
    drawn = {}
    for name, column in (columns | {key: validated[key] for key in BLOCKS}).items():
        at, of_blocks = kept(column, POINTS), name in BLOCKS
        if not len(at):
            continue
        if (of_blocks, at.tobytes()) not in places:
            places[of_blocks, at.tobytes()] = len(tables)
            where = validated if of_blocks else history.steps
            tables.append({key: _rounded(key, where[key][at]) for key in PLACE})
        drawn[name] = {"at": places[of_blocks, at.tobytes()], "value": _rounded(name, column[at])}
    return {"places": tables, "curves": drawn}


def _column(records: Sequence[Record], key: str) -> Column:
    return np.array([number(record.get(key)) for record in records])


def marks(history: History) -> list[dict[str, Any]]:
    """What changed at the start of each stage after the first: growth, context, batch."""
    stages = {record.get("stage"): record for record in history.kind("stage")}
    growths = {record.get("stage"): record for record in history.kind("growth")}
    found = []
    for before, after in zip(list(stages.values()), list(stages.values())[1:]):
        growth = growths.get(after.get("stage"))
        found.append(
            _place(after)
            | {"stage": str(after.get("name", "")), "before": str(before.get("name", ""))}
            | {key: _change(before, after, key) for key in ("parameters", "context_length", "global_batch_tokens")}
            | {"links": growth.get("links") or [] if growth else [], "grows": growth is not None}
            | {"certificate": growth.get("certificate") if growth else None}
        )
    return found


def blocks(history: History) -> dict[str, Any] | None:
    """Of a model with an AltUp stream, the ``layers``' coefficients and the ``distances`` of its blocks when it was
    last validated."""
    found = history.kind("blocks")
    if not found:
        return None
    last, of_layer = found[-1], ("id", "block", "read", "mix", "write")
    layers = [{key: _numbers(layer[key]) for key in of_layer} for layer in last["layers"]]
    return _place(last) | {"layers": layers, "distances": _numbers(last["distances"])}


def _numbers(value: Any) -> Any:
    return [_numbers(item) for item in value] if isinstance(value, list) else finite(number(value))


def _change(before: Record, after: Record, key: str) -> list[float] | None:
    """Both values if they are not the same."""
    old, new = finite(number(before.get(key))), finite(number(after.get(key)))
    return None if old is None or new is None or old == new else [old, new]


def _place(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: finite(number(record.get(key))) for key in PLACE}


def _rounded(name: str, values: Column) -> list[float | int | None]:
    if name in WHOLE:
        return [int(value) if np.isfinite(value) else None for value in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MARK)) == MARK


def _asset(name: str) -> str:
    return resources.files("growkit.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _library() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@functools.cache
def _compressed(library: str) -> str:
    """5 MB become 2: browsers unpack gzip by themselves since 2023."""
    return base64.b64encode(gzip.compress(library.encode(), 6, mtime=0)).decode()
