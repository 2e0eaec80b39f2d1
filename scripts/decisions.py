"""Runs the recipes that decide how to grow, whole, and says what they decided and what came of it.

    python scripts/decisions.py [--only choose-growth] [--threads 1] [--keep FOLDER]

One recipe after the other, one seed each, on the standard library's text. Writes docs/results/decisions.json and prints
the table of docs/how-to/growth-that-decides.md.
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
from statistics import fmean
from typing import Any

import torch

from growkit.checkpoint.metrics_log import Record, read_log
from growkit.duration import quantity
from growkit.schedule.decisions import decided
from growkit.train import hardware

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "decisions.json"
RECIPES = ("grow-on-plateau", "choose-growth", "greedy-stages")
SEED = 0
AROUND = 200  # steps before and after the beginning of a stage whose mean training losses are told


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
            report = {"seeds": [SEED], "machine": machine | {"threads": options.threads}}
            ordered = [rows[recipe] for recipe in RECIPES if recipe in rows]
            RESULTS.write_text(json.dumps(report | {"rows": ordered}, indent=1) + "\n")
    print(table(ordered))


def one(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Trains the recipe ``name``, and reads its log."""
    words = ("train", name, f"run.folder={folder}", f"run.name={name}", f"run.threads={threads}", f"run.seed={SEED}")
    subprocess.run([sys.executable, "-m", "growkit.cli.main", *words], cwd=ROOT, check=True)
    log = list(read_log(folder / name / "metrics.jsonl"))
    decisions = [record for record in log if record["kind"] == "decision"]
    return {
        "recipe": name,
        "seed": SEED,
        "seconds": round(log[-1]["seconds"]),
        "bits_per_byte": [record for record in log if record["kind"] == "validation"][-1]["bits_per_byte"],
        "ngram_bits_per_byte": next(record["bits_per_byte"] for record in log if record["kind"] == "ngram"),
        "flops_training": log[-1]["flops"] - sum(made["probe_flops"] for made in decisions),
        "flops_probes": sum(made["probe_flops"] for made in decisions),
        "decisions": [{key: value for key, value in made.items() if key != "seconds"} for made in decisions],
        "stages": [stage(record, log) for record in log if record["kind"] == "stage"],
    }


def stage(begun: Record, log: Sequence[Record]) -> dict[str, Any]:
    """Of the stage whose record is ``begun``: its size, its steps, and training losses around its beginning."""
    (end,) = (r for r in log if r["kind"] == "validation" and r["stage"] == begun["stage"] and r["end_of_stage"])
    steps = [(r["step"] - begun["step"], r["loss"]) for r in log if r["kind"] == "step"]
    before = [loss for at, loss in steps if -AROUND < at <= 0]
    return {
        "name": begun["name"],
        "parameters": begun["parameters"],
        "planned_steps": begun["planned_steps"],
        "steps": end["step"] - begun["step"],
        "loss_before": fmean(before) if before else None,
        "loss_after": fmean(loss for at, loss in steps if 0 < at <= AROUND),
        "bits_per_byte": end["bits_per_byte"],
        "flops": end["flops"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown, a line for each stage; FLOPs are of the whole run until then, probes among them."""
    lines = [
        "| recipe | stage | parameters | steps | bits per byte | FLOPs | decided |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for index, part in enumerate(row["stages"]):
            made = [decision for decision in row["decisions"] if decision["stage"] == index]
            of = f" of {part['planned_steps']}" if part["steps"] < part["planned_steps"] else ""
            probes = sum(decision["probe_flops"] for decision in made)
            flops = quantity(part["flops"]) + (f", {quantity(probes)} of them in probes" if probes else "")
            said = "; ".join(decided(decision).removeprefix(f"{part['name']} ") for decision in made) or "–"
            score = f"{part['bits_per_byte']:.3f}"
            cells = [
                row["recipe"],
                part["name"],
                quantity(part["parameters"]),
                f"{part['steps']}{of}",
                score,
                flops,
                said,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
