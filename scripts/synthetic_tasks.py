"""Trains every synthetic recipe and scores it on 1,000 sequences that no run trains on.

    python scripts/synthetic_tasks.py [--only induction needle] [--threads 1] [--keep FOLDER]

Goes through `growkit train` and `growkit eval`, one recipe after the other, at the length of training and at twice and
four times that. Writes docs/results/synthetic_tasks.json and prints the table of docs/how-to/synthetic-tasks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from growkit.checkpoint.metrics_log import read_log
from growkit.cli.recipes import read
from growkit.train import hardware

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "synthetic_tasks.json"
RECIPES = ("selective-copying", "induction", "associative-recall", "needle")
SEQUENCES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, help="recipes to run (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--keep", type=Path, help="a folder to keep the runs in")
    options = parser.parse_args()
    measured = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows = {row["recipe"]: row for row in measured}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            rows[name] = one(name, options.keep or Path(folder), options.threads)
            machine = hardware.environment("cpu", torch.float32, 1) | {"cores": os.cpu_count()}
            report = {"sequences": SEQUENCES, "machine": machine | {"threads": options.threads}}
            ordered = [rows[recipe] for recipe in RECIPES if recipe in rows]
            RESULTS.write_text(json.dumps(report | {"rows": ordered}, indent=1) + "\n")
    print(table(ordered))


def one(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Trains the recipe ``name`` and scores it."""
    run = folder / name
    growkit("train", name, f"run.folder={folder}", f"run.name={name}", f"run.threads={threads}", "run.seed=0")
    log = list(read_log(run / "metrics.jsonl"))
    stage = read(name, [])[1].last
    lengths = [stage.context_length * times for times in (1, 2, 4)]
    said = growkit("eval", run, "--json", "--sequences", SEQUENCES, *[w for n in lengths for w in ("--context", n)])
    scores = [json.loads(line) for line in said.splitlines()]
    kept = ("context_length", "sequence_accuracy", "sequence_accuracy_95", "token_accuracy", "loss")
    return {
        "recipe": name,
        "task": scores[0]["task"],
        "parameters": scores[0]["parameters"],
        "context_length": stage.context_length,
        "steps": stage.steps,
        "sequences_trained": log[-1]["tokens"] // stage.context_length,
        "seconds": round(log[-1]["seconds"]),
        "curve": {r["step"]: round(r["sequence_accuracy"], 4) for r in log if r["kind"] == "validation"},
        "scores": [{key: score[key] for key in kept} for score in scores],
    }


def growkit(*words: object) -> str:
    command = [sys.executable, "-m", "growkit.cli.main", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown: sequences right with the 95 % interval, at the length of training; and beyond."""
    lines = [
        "| recipe | task | context | steps | seconds | sequences right | at twice the length | at four times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        task = ", ".join(f"{key} {value}" for key, value in row["task"].items() if value is not None)
        first, *longer = row["scores"]
        low, high = first["sequence_accuracy_95"]
        share = f"{first['sequence_accuracy']:.1%} ({low:.1%} to {high:.1%})"
        beyond = [f"{score['sequence_accuracy']:.1%}" for score in longer]
        cells = [row["recipe"], task, row["context_length"], row["steps"], row["seconds"], share, *beyond]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
