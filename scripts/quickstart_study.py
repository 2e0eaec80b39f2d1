"""The quickstart's growth beside static sizes at the same FLOPs: which one wins, and by how much.

    python scripts/quickstart_study.py [--seeds 1] [--only grown middle] [--jobs 2]

Trains recipes/quickstart.yaml and, at exactly its FLOPs, several static sizes of the same model (each with its own
full learning-rate schedule), all at three peak rates and through `growkit train`. Runs are judged at equal FLOPs, so
several may share the machine. Writes every result (JSON) and the curves of the grown run and of the best static one
(PNG) under docs/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from growkit.checkpoint.metrics_log import read_log
from growkit.cli.recipes import read
from growkit.cli.training import start
from growkit.report.curve import draw_curves
from growkit.report.history import History
from growkit.train import hardware

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BATCH_2048 = "stages.0.global_batch_tokens=2048"
STATIC = {  # what each arm changes in recipes/quickstart-static.yaml
    "small": ["model.num_layers=1", BATCH_2048],
    "middle": ["model.num_layers=2", BATCH_2048],
    "middle-1024": ["model.num_layers=2"],  # twice as many, smaller steps
    "large": ["model.num_layers=3", BATCH_2048],
}
PEAK_RATES = (1e-3, 1.5e-3, 2.2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs of every arm (default: 1)")
    parser.add_argument("--only", nargs="+", choices=["grown", *STATIC], default=["grown", *STATIC], help="arms to run")
    parser.add_argument("--rates", nargs="+", type=float, default=list(PEAK_RATES), help="peak learning rates")
    parser.add_argument("--context", type=int, default=256, help="of the static runs, throughout (default: 256)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores (default: 2)")
    options = parser.parse_args()
    _, schedule = read("quickstart", [])
    flops = schedule.flops
    arms: dict[str, tuple[str, list[str]]] = {}
    if "grown" in options.only:
        for rate in options.rates:
            arms[f"grown, lr {rate:g}"] = ("quickstart", [f"optim.lr={rate}"])
    stage = [f"stages.0.duration={flops:.6e} flops", f"stages.0.context_length={options.context}"]
    for name, changes in STATIC.items():
        if name in options.only:
            for rate in options.rates:
                arms[f"{name}, lr {rate:g}"] = ("quickstart-static", [*changes, *stage, f"optim.lr={rate}"])
    folder = Path(tempfile.mkdtemp(prefix="quickstart-study-"))
    cores = max(1, (os.cpu_count() or 1) // options.jobs)
    jobs = []
    for name, (recipe, overrides) in arms.items():
        for seed in range(options.seeds):
            run = f"{name.replace(', lr ', '-')}-{seed}"
            where = [f"run.folder={folder}", f"run.name={run}", f"run.seed={seed}", f"run.threads={cores}"]
            jobs.append((name, seed, folder / run, recipe, [*overrides, *where, "monitor.progress=off"]))
    results: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        codes = pool.map(start, [job[3] for job in jobs], [job[4] for job in jobs])
        for (name, seed, run_folder, *_), code in zip(jobs, codes, strict=True):
            assert code == 0, (name, code)
            log = list(read_log(run_folder / "metrics.jsonl"))
            last = [record for record in log if record["kind"] == "validation"][-1]
            stages = [record["parameters"] for record in log if record["kind"] == "stage"]
            row = {"arm": name, "seed": seed, "parameters": stages, "bits_per_byte": last["bits_per_byte"]}
            results.append(row | {key: last[key] for key in ("tokens", "flops")})
            curves[f"{name}, seed {seed}"] = log
            print(
                f"{name:24} seed {seed}: {stages[-1]:>8,} parameters, {last['bits_per_byte']:.4f} bits/byte", flush=True
            )
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = {
        "flops": flops,
        "corpus": "stdlib",
        "machine": hardware.environment("cpu", torch.float32, 1) | {"cores": os.cpu_count()},
        "results": results,
    }
    (RESULTS / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = {}
    for grown in (True, False):
        mine = [row for row in results if row["arm"].startswith("grown") == grown]
        if mine:
            best = min(mine, key=lambda row: row["bits_per_byte"])
            shown[f"{best['arm']}"] = curves[f"{best['arm']}, seed {best['seed']}"]
    draw_curves([History.of(name, log) for name, log in shown.items()], RESULTS / "quickstart.png")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
