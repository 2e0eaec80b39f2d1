"""Trains the Mamba recipes on synthetic tasks, and scores them at every length, long ones by recurrent evaluation.

    python scripts/mamba_tasks.py [--only mamba-induction] [--threads 1] [--keep FOLDER] [--lengths 64 4096]

Goes through `growkit train` and `growkit eval`, one recipe after the other; a finished run of the recipe that is in
FOLDER is scored and not trained again. Writes docs/results/mamba_tasks.json and docs/results/mamba_tasks.png, and
prints the tables of docs/how-to/synthetic-tasks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt

from growkit.checkpoint.metrics_log import read_log
from growkit.cli.recipes import read
from growkit.train import hardware
from scripts.synthetic_tasks import ROOT, growkit

RESULTS = ROOT / "docs" / "results" / "mamba_tasks.json"
PICTURE = ROOT / "docs" / "results" / "mamba_tasks.png"
LENGTHS: Mapping[str, Sequence[int]] = {
    "mamba-selective-copying": [64, 512, 4096, 8192],
    "mamba-induction": [2**n for n in range(6, 21)],
}
RECIPES = tuple(LENGTHS)
SEQUENCES = 1000  # of each length up to MANY
MANY = 4096  # tokens
LONG_TOKENS = 1 << 21  # of each length beyond, but
LEAST = 8  # sequences at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, help="recipes to run (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--keep", type=Path, help="a folder to keep the runs in, and to find finished ones")
    parser.add_argument("--lengths", type=int, nargs="+", help="to score, tokens (default: all of LENGTHS)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            row = one(name, options.keep or Path(folder), options.threads, options.lengths or LENGTHS[name])
            rows = {old["recipe"]: old for old in measured()} | {name: row}
            machine = hardware.environment("cpu", torch.float32, 1) | {"cores": os.cpu_count()}
            ordered = [rows[recipe] for recipe in RECIPES if recipe in rows]
            report = {"machine": machine | {"threads": options.threads}, "rows": ordered}
            RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    ordered = measured()
    draw(ordered)
    print(table(ordered), scores(ordered), sep="\n\n")


def measured() -> list[dict[str, Any]]:
    """The rows of the results that are there."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    return rows


def one(name: str, folder: Path, threads: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Trains the recipe ``name``, unless that is done, and scores it."""
    run = folder / name
    steps = sum(stage.steps for stage in read(name, [])[1].stages)
    if not run.is_dir():
        growkit("train", name, f"run.folder={folder}", f"run.name={name}", f"run.threads={threads}", "run.seed=0")
    log = list(read_log(run / "metrics.jsonl"))
    validations = [record for record in log if record["kind"] == "validation"]
    if validations[-1]["step"] != steps:
        raise SystemExit(f"{run}: stopped at step {validations[-1]['step']} of {steps}; growkit resume {run}")
    scored = []
    for length in lengths:
        count = SEQUENCES if length <= MANY else max(LEAST, LONG_TOKENS // length)
        scored.append(json.loads(growkit("eval", run, "--json", "--sequences", count, "--context", length)))
        print(name, length, count, f"{scored[-1]['sequence_accuracy']:.1%}", flush=True)
    kept = ("context_length", "sequences", "sequence_accuracy", "sequence_accuracy_95", "token_accuracy", "loss")
    return {
        "recipe": name,
        "task": scored[0]["task"],
        "parameters": scored[0]["parameters"],
        "trained_length": read(name, [])[1].last.context_length,
        "steps": steps,
        "tokens": log[-1]["tokens"],
        "seconds": round(log[-1]["seconds"]),
        "curve": [
            {
                key: round(record[key], 4)
                for key in ("step", "context_length", "seconds", "sequence_accuracy", "token_accuracy")
            }
            for record in validations
        ],
        "scores": [{key: score[key] for key in kept} for score in scored],
    }


def draw(rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy over training, and over the length of what is scored."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for color, row in enumerate(rows):
        for axes, points, x in ((left, row["curve"], "step"), (right, row["scores"], "context_length")):
            for key, style in (("token_accuracy", "-"), ("sequence_accuracy", ":")):
                label = f"{row['recipe']}, {'answers' if style == '-' else 'sequences'}"
                at = [point[x] for point in points]
                axes.plot(at, [point[key] for point in points], style, color=f"C{color}", marker=".", label=label)
        right.axvline(row["trained_length"], color=f"C{color}", linewidth=0.8)
    left.set(xlabel="step", ylabel="right, in validation", ylim=(-0.03, 1.03))
    right.set(xlabel="tokens of a sequence (line: longest in training)", ylim=(-0.03, 1.03))
    right.set_xscale("log", base=2)
    left.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was trained, as Markdown."""
    lines = ["| recipe | parameters | trained up to | steps | tokens | seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        sizes = [f"{row[key]:,}" for key in ("parameters", "trained_length", "steps")]
        cells = [row["recipe"], *sizes, f"{row['tokens'] / 1e6:.1f}M", str(row["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scores(rows: Sequence[dict[str, Any]]) -> str:
    """By length, as Markdown: answers right; sequences right with the 95 % interval; of how many."""
    lines = ["| recipe | length | answers right | sequences right | of |", "|---|---|---|---|---|"]
    for row in rows:
        for score in row["scores"]:
            low, high = score["sequence_accuracy_95"]
            share = f"{score['sequence_accuracy']:.1%} ({low:.1%} to {high:.1%})"
            cells = [row["recipe"], f"{score['context_length']:,}", f"{score['token_accuracy']:.1%}", share]
            lines.append(f"| {' | '.join([*cells, str(score['sequences'])])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
