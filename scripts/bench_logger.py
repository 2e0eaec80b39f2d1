"""What a logger costs a run: step times with and without it, taken in turns.

    python scripts/bench_logger.py [--quick]

Every arm trains the same model as ``growkit train`` does, with log_every 10, after the first stretch between two logs:
wandb offline, TensorBoard, CSV, and none. Arms take turns, so that whatever else the machine does hits all; a ratio is
of two runs of one round. Three figures: the step time relative to the run without a logger; the share of the time that
the training itself spends in the logger's listener, which noise hardly moves; and the CPU time of the logger's own
processes, start and end included, as a share of all cores' time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.checkpoint.metrics_log import Record  # noqa: E402
from growkit.checkpoint.run_folder import RunFolder  # noqa: E402
from growkit.config.load import parse_recipe, to_yaml  # noqa: E402
from growkit.config.recipe import LoggerConfig, Recipe  # noqa: E402
from growkit.data.corpus import Corpus  # noqa: E402
from growkit.models.presets import PRESETS  # noqa: E402
from growkit.schedule.plan import growth_schedule  # noqa: E402
from growkit.train import hardware, loggers  # noqa: E402
from growkit.train.run import Run, prepare_corpus  # noqa: E402

GOAL = 0.01  # of the step time
LOG_EVERY = 10
ARMS = ("none", "wandb", "tensorboard", "csv")
SIZES: dict[str, dict[str, Any]] = {
    "quickstart's last stage": {
        "model": {"embed_dim": 128, "num_layers": 2, "num_heads": 4, "attention_tokens": 64, "mlp_tokens": 256},
        "context_length": 256,
        "global_batch_tokens": 2048,
        "steps": 50,
    },
    "3M": {
        "model": {"embed_dim": 256, "num_layers": 3, "num_heads": 4, "attention_tokens": 256, "mlp_tokens": 1024},
        "context_length": 128,
        "global_batch_tokens": 1024,
        "steps": 30,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "bench_logger.json")
    parser.add_argument("--quick", action="store_true", help="one short round of the smaller model; writes nothing")
    options = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    torch.set_num_threads(1)  # the other cores are for the logger's processes, and for what else a machine does
    results = []
    for name, size in SIZES.items():
        steps = 4 * LOG_EVERY if options.quick else size["steps"]
        recipe = recipe_of(size, steps)
        corpus = prepare_corpus(recipe, growth_schedule(recipe))
        rounds = []
        for _ in range(1 if options.quick else options.rounds):
            rounds.append({kind: measure(recipe, corpus, kind) for kind in ARMS})
            print(name, json.dumps(rounds[-1]), flush=True)
        results.append(summary(name, recipe, rounds))
        if options.quick:
            return
    machine = hardware.environment(hardware.accelerator(recipe.trainer), hardware.training_dtype(recipe.trainer), 1)
    machine["load_average"] = os.getloadavg()  # of the time just past: much above one core's makes ratios noise
    report = {"goal": GOAL, "log_every_steps": LOG_EVERY, "rounds": options.rounds, "cores": os.cpu_count()}
    options.output.write_text(json.dumps(report | {"machine": machine, "models": results}, indent=1) + "\n")


def recipe_of(size: dict[str, Any], steps: int) -> Recipe:
    sections = {
        "model": {"preset": "tokenformer"} | size["model"],
        "trainer": {"precision": "fp32", "save_every": f"{steps} steps"},
        "monitor": {"log_every": LOG_EVERY, "validation_tokens": 256, "ngram_order": 0, "sample_tokens": 0},
        "stages": [{"name": "only", "duration": f"{steps} steps"}],
    }
    sections["monitor"]["peak_flops_per_second"] = 1e12
    for key in ("context_length", "global_batch_tokens"):
        sections["stages"][0][key] = size[key]
    return parse_recipe(yaml.safe_dump(sections), [], PRESETS, name="bench")


def measure(recipe: Recipe, corpus: Corpus, kind: str) -> dict[str, float]:
    """Seconds of a step; the listener's share of the time; the logger's processes' share of all cores' time."""
    marks: list[float] = []
    inside = 0.0
    recipe.logger = LoggerConfig(kind=kind)
    before = _cpu_of_children()
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", to_yaml(recipe))
        run = Run(recipe, growth_schedule(recipe), folder, corpus)
        with loggers.open_logger(recipe.logger, folder, lambda line: None) as logger:

            def listen(record: Record) -> None:
                nonlocal inside
                if record["kind"] == "step":
                    marks.append(time.perf_counter())
                if logger is not None:
                    began = time.perf_counter()
                    logger(record)
                    inside += time.perf_counter() - began

            run.log.listeners.append(listen)
            run.train()
        folder.unlock()
    taken = marks[-1] - marks[0]
    return {
        "step_seconds": taken / (LOG_EVERY * (len(marks) - 1)),
        "listener_seconds": inside / len(marks),
        "listener_share": inside / taken,
        "processes_cpu_share": (_cpu_of_children() - before) / (taken * (os.cpu_count() or 1)),
    }


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(name: str, recipe: Recipe, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    stage = recipe.stages[0]
    arms: dict[str, Any] = {"none": {"step_seconds": _spread([r["none"]["step_seconds"] for r in rounds])}}
    for kind in ARMS[1:]:
        arms[kind] = {
            "step_time_ratio": _spread([r[kind]["step_seconds"] / r["none"]["step_seconds"] for r in rounds]),
            "listener_seconds_per_log": _spread([r[kind]["listener_seconds"] for r in rounds]),
            "listener_share": _spread([r[kind]["listener_share"] for r in rounds]),
            "processes_cpu_share": _spread([r[kind]["processes_cpu_share"] for r in rounds]),
        }
    scale = {"steps": stage.duration, "context_length": stage.context_length, "tokens": stage.global_batch_tokens}
    return {"model": name, "parameters": growth_schedule(recipe).stages[0].model.num_params()} | scale | {"arms": arms}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {key: round(value, 6) for key, value in ordered.items()}


if __name__ == "__main__":
    main()
