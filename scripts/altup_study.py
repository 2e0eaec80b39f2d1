"""What AltUp's recipes bring beside the same model without it, at equal FLOPs, over three seeds.

    python scripts/altup_study.py [--seeds 3] [--only altup altup-stride] [--jobs 2] [--keep FOLDER]

Every recipe, and each of its controls, is trained whole through `growkit train`; the last stage of a control ends
where it has done the FLOPs of the recipe. Runs are judged at equal FLOPs, so several may share the machine. Writes
docs/results/altup_study.json and prints the table of docs/how-to/altup.md: bits per byte, and the paired difference
with its 95 % interval (Student's t over the seeds).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from growkit.checkpoint.metrics_log import read_log
from growkit.cli.recipes import read
from growkit.duration import quantity
from growkit.train import hardware

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "altup_study.json"
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5 % points of t, by degrees of freedom
WHOLE = ["stages.1.grow={}", "stages.2.grow={}"]  # of a control that does not grow


@dataclass(frozen=True)
class Arm:
    """A recipe with ``changes``; ``against``: the arm it is a variant of, None for the recipe itself."""

    recipe: str
    name: str
    changes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.recipe}: {self.name}"


ARMS = [
    Arm("altup", "K 1, 2, 4"),
    Arm("altup", "one block throughout", tuple(WHOLE)),
    Arm("altup", "four blocks throughout", (*WHOLE, "model.altup_blocks=4")),
    Arm("altup-tokens", "tokens and K = 2"),
    Arm("altup-tokens", "tokens alone", ("stages.1.grow={attention_tokens: 64, mlp_tokens: 256}",)),
    Arm("altup-vocabulary", "K = 4, recycled"),
    Arm("altup-vocabulary", "one block throughout", ("stages.1.grow={}",)),
    Arm("altup-stride", "stride 4"),
    Arm("altup-stride", "stride 2", ("model.altup_stride=2",)),
    Arm("altup-stride", "every token", ("model.altup_stride=1",)),
]
RECIPES = tuple(dict.fromkeys(arm.recipe for arm in ARMS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm (default: 3)")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, help="recipes to run (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default: 2)")
    parser.add_argument("--keep", type=Path, help="a folder to keep the runs in; those that are there count")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    kept = [row for row in kept if row["recipe"] not in options.only]
    arms = [arm for arm in ARMS if arm.recipe in options.only]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        extra = (
            {"altup-vocabulary": [f"data.tokenizer={tokenizer(folder)}"]} if "altup-vocabulary" in options.only else {}
        )
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = [
                pool.submit(one, arm, seed, extra.get(arm.recipe, []), folder)
                for arm in arms
                for seed in range(options.seeds)
            ]
        done = [run.result() for run in runs]
    rows = [row | compared(row, done) for row in summaries(arms, done)]
    order = {arm.title: place for place, arm in enumerate(ARMS)}
    rows = sorted([*kept, *rows], key=lambda row: order[f"{row['recipe']}: {row['arm']}"])
    machine = hardware.environment("cpu", torch.float32, 1) | {"cores": os.cpu_count(), "threads": 1}
    RESULTS.write_text(json.dumps({"seeds": options.seeds, "machine": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def tokenizer(folder: Path) -> Path:
    made = folder / "bpe-4096"
    if not made.exists():
        growkit("tokenizer", "train", "altup-vocabulary", "--vocab-size", "4096", "-o", str(made))
    return made


def growkit(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "growkit.cli.main", *words], cwd=ROOT, check=True)


def one(arm: Arm, seed: int, extra: list[str], folder: Path) -> dict[str, Any]:
    """Trains an arm on one seed, and reads its log."""
    name = f"{arm.title.replace(': ', '-').replace(', ', '-').replace(' ', '-').replace('=', '')}-{seed}"
    log, changes = folder / name / "metrics.jsonl", [*extra, *arm.changes, *same_flops(arm, extra)]
    if not log.is_file():
        fixed = [f"run.folder={folder}", f"run.name={name}", "run.threads=1", f"run.seed={seed}"]
        growkit("train", arm.recipe, *fixed, "monitor.progress=off", "trainer.precision=fp32", *changes)
    records = list(read_log(log))
    validations = [record for record in records if record["kind"] == "validation"]
    steps = sum(stage.steps for stage in read(arm.recipe, changes)[1].stages)
    if not validations or validations[-1]["step"] != steps:
        raise SystemExit(f"{folder / name}: is not at step {steps}; delete it, or growkit resume {folder / name}")
    return {
        "arm": arm.title,
        "seed": seed,
        "bits_per_byte": validations[-1]["bits_per_byte"],
        "flops": validations[-1]["flops"],
        "parameters": [record["parameters"] for record in records if record["kind"] == "stage"][-1],
        "ngram_bits_per_byte": next(record["bits_per_byte"] for record in records if record["kind"] == "ngram"),
    }


def same_flops(arm: Arm, extra: list[str]) -> list[str]:
    """The override with which the last stage ends at the FLOPs of the recipe itself."""
    if not arm.changes:
        return []
    whole = read(arm.recipe, extra)[1].flops
    stages = read(arm.recipe, [*extra, *arm.changes])[1].stages
    before = sum(stage.total_flops for stage in stages[:-1])
    return [f"stages.{len(stages) - 1}.duration={whole - before:.6e} flops"]


def summaries(arms: list[Arm], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for arm in arms:
        mine = sorted((run for run in done if run["arm"] == arm.title), key=lambda run: run["seed"])
        row: dict[str, Any] = {"recipe": arm.recipe, "arm": arm.name, "changes": list(arm.changes)}
        row |= {key: mine[0][key] for key in ("flops", "parameters", "ngram_bits_per_byte")}
        rows.append(row | {"bits_per_byte": [run["bits_per_byte"] for run in mine]})
    return rows


def compared(row: dict[str, Any], done: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the paired differences to the recipe itself (recipe − arm; below 0: the recipe is better), and half
    of its 95 % interval."""
    first = next(arm for arm in ARMS if arm.recipe == row["recipe"])
    own = {run["seed"]: run["bits_per_byte"] for run in done if run["arm"] == first.title}
    if row["arm"] == first.name:
        return {"recipe_minus_this": None, "interval": None}
    differences = [own[seed] - score for seed, score in enumerate(row["bits_per_byte"])]
    half = None
    if len(differences) > 1:
        half = STUDENT[len(differences) - 1] * stdev(differences) / math.sqrt(len(differences))
    return {"recipe_minus_this": fmean(differences), "interval": half}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | model | parameters | FLOPs | bits per byte (seeds) | recipe − this |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = f"{fmean(row['bits_per_byte']):.3f} ({', '.join(f'{score:.3f}' for score in row['bits_per_byte'])})"
        difference = ""
        if row["recipe_minus_this"] is not None:
            difference = f"{row['recipe_minus_this']:+.3f} ± {row['interval']:.3f}" if row["interval"] else "one seed"
        cells = [row["recipe"], row["arm"], quantity(row["parameters"]), quantity(row["flops"]), scores, difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
