"""What a logger costs a run, measured so that it can be told from what else the machine does.

    python scripts/bench_logger.py [--minutes 3]

Weights & Biases runs in processes beside the training. While a model trains, they are stopped and continued in turns,
for one stretch between two logs each (10 steps), and each stretch with them is held against the two beside it without.
What waited while they were stopped is done when they go on: a stretch with them has the work of two, and the step time
of a run that is left alone lies half way between.
TensorBoard and CSV write in the training's own thread: what they cost is the share of its time that it spends in them,
as it is for the look that W&B's listener takes at its process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.checkpoint.metrics_log import Record  # noqa: E402
from growkit.checkpoint.run_folder import RunFolder  # noqa: E402
from growkit.config.load import parse_recipe, to_yaml  # noqa: E402
from growkit.config.recipe import LoggerConfig, Recipe  # noqa: E402
from growkit.models.presets import PRESETS  # noqa: E402
from growkit.schedule.plan import growth_schedule  # noqa: E402
from growkit.train import hardware, loggers  # noqa: E402
from growkit.train.data import prepare_data  # noqa: E402
from growkit.train.run import Run  # noqa: E402

GOAL = 0.01  # of the step time
LOG_EVERY = 10
START_SECONDS = 20.0  # in which wandb starts, which happens once and is not counted
MODELS: dict[str, dict[str, Any]] = {
    "quickstart's first stage": {
        "model": {"embed_dim": 128, "num_layers": 1, "num_heads": 4, "attention_tokens": 20, "mlp_tokens": 76},
        "context_length": 128,
        "global_batch_tokens": 1024,
    },
    "quickstart's last stage": {
        "model": {"embed_dim": 128, "num_layers": 2, "num_heads": 4, "attention_tokens": 64, "mlp_tokens": 256},
        "context_length": 256,
        "global_batch_tokens": 2048,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each of the W&B arms")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "bench_logger.json")
    options = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)  # as a run does: the logger's processes have no core to themselves
    results = []
    for name, size in MODELS.items():
        arms = {"wandb": measure(size, "wandb", options.minutes)}
        arms |= {kind: measure(size, kind, min(0.5, options.minutes)) for kind in ("tensorboard", "csv")}
        results.append({"model": name, "arms": arms})
        print(json.dumps(results[-1], indent=1), flush=True)
    machine = hardware.environment(hardware.accelerator(recipe_of(size, 1).trainer), torch.float32, 1)
    report = {"goal": GOAL, "log_every_steps": LOG_EVERY, "minutes": options.minutes, "cores": cores}
    options.output.write_text(json.dumps(report | {"machine": machine, "models": results}, indent=1) + "\n")


def recipe_of(size: dict[str, Any], minutes: float) -> Recipe:
    stage = {"name": "only", "duration": "10M steps"} | {k: v for k, v in size.items() if k != "model"}
    monitor = {"log_every": LOG_EVERY, "validation_tokens": 256, "ngram_order": 0, "sample_tokens": 0}
    sections = {
        "model": {"preset": "tokenformer"} | size["model"],
        "trainer": {"precision": "fp32", "save_every": "10M steps", "max_minutes": minutes},
        "monitor": monitor | {"peak_flops_per_second": 1e12},
        "stages": [stage],
    }
    return parse_recipe(yaml.safe_dump(sections), [], PRESETS, name="bench")


def measure(size: dict[str, Any], kind: str, minutes: float) -> dict[str, Any]:
    """Trains for ``minutes`` with the logger ``kind``."""
    recipe = recipe_of(size, minutes)
    recipe.logger = LoggerConfig(kind=kind)
    schedule = growth_schedule(recipe)
    turns = Turns()
    inside: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", to_yaml(recipe))
        run = Run(recipe, schedule, folder, prepare_data(recipe, schedule))
        with loggers.open_logger(recipe.logger, folder, lambda line: None) as logger, contextlib.closing(turns):
            assert logger is not None

            def listen(record: Record) -> None:
                began = time.perf_counter()
                logger(record)
                inside.append(time.perf_counter() - began)
                if record["kind"] == "step":
                    turns.next(stop=kind == "wandb")

            run.log.listeners.append(listen)
            run.train()
            turns.close()  # before the logger is: it waits for its process
        folder.unlock()
    steps = len(turns.marks) * LOG_EVERY
    found: dict[str, Any] = {
        "steps": steps,
        "step_seconds": round(float(np.median(np.diff(turns.marks))) / LOG_EVERY, 6),
        "listener_share": round(sum(inside) / (turns.marks[-1] - turns.marks[0]), 6),
    }
    return found | (turns.ratio() if kind == "wandb" else {})


class Turns:
    """Stops and continues all processes below this one, in turns, at every call of ``next``."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.stopped: list[bool] = []  # during the stretch that ends at the mark
        self._now = False

    def next(self, *, stop: bool) -> None:
        self.marks.append(time.perf_counter())
        self.stopped.append(self._now)
        if stop and self.marks[-1] - self.marks[0] > START_SECONDS:
            self._now = not self._now
            _signal_children(signal.SIGSTOP if self._now else signal.SIGCONT)

    def close(self) -> None:
        self._now = False
        _signal_children(signal.SIGCONT)

    def ratio(self) -> dict[str, Any]:
        """Step time with the processes over that without, from every stretch with them and the two beside it: the
        median and its bootstrapped 95 % interval."""
        took, without = np.diff(self.marks), np.array(self.stopped[1:])
        here = [i for i in range(1, len(took) - 1) if not without[i] and without[i - 1] and without[i + 1]]
        ratios = np.array([(1 + 2 * took[i] / (took[i - 1] + took[i + 1])) / 2 for i in here])
        draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
        low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
        return {
            "stretches": len(ratios),
            "step_time_ratio": round(float(np.median(ratios)), 4),
            "interval_95": [round(float(low), 4), round(float(high), 4)],
        }


def _signal_children(number: int) -> None:
    """To every process below this one, the youngest last."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    below = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    for child in below - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


if __name__ == "__main__":
    main()
