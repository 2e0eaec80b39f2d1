"""What growkit costs beside a bare PyTorch loop: tokens per second of both, taken in turns.

    python scripts/bench_overhead.py [--quick]

Both train the same DecoderLM on the same batches with the same fused AdamW and gradient clipping. growkit runs as
``growkit train`` does (Lightning, its callback, metrics log, plain display); the bare loop does nothing else. Timing
starts after a warm-up and ends at the last step: start-up, validation and the save at the end are outside. Arms take
turns, so that whatever else the machine does hits both; a ratio is of two neighbours.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from growkit.checkpoint.metrics_log import Record
from growkit.checkpoint.run_folder import RunFolder
from growkit.config.load import parse_recipe, to_yaml
from growkit.config.recipe import Recipe
from growkit.data.stream import Batches
from growkit.models.decoder import build, init_params
from growkit.models.presets import PRESETS
from growkit.models.spec import param_specs
from growkit.optim.groups import param_groups
from growkit.schedule.plan import growth_schedule
from growkit.schedule.stage import GrowthSchedule
from growkit.train import hardware
from growkit.train.data import RunData, prepare_data
from growkit.train.display import Display
from growkit.train.run import Run

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.95
CONTEXT = 128  # tokens
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "3M": {
        "tokenformer": {"embed_dim": 256, "num_layers": 3, "num_heads": 4, "attention_tokens": 256, "mlp_tokens": 1024},
        "transformer": {"embed_dim": 256, "num_layers": 4, "num_heads": 4},
    },
    "30M": {
        "tokenformer": {"embed_dim": 512, "num_layers": 7, "num_heads": 8, "attention_tokens": 512, "mlp_tokens": 2048},
        "transformer": {"embed_dim": 512, "num_layers": 10, "num_heads": 8},
    },
}
MEASURED_STEPS = {"3M": 40, "30M": 10}
LOG_EVERY = 5  # steps; twice as often as the default; also the warm-up


@dataclass(frozen=True)
class Timing:
    """``seconds``: wall clock, ``cpu_seconds``: of all threads of this process, which other processes disturb less."""

    tokens: int
    seconds: float
    cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Stopwatch:
    """Between ``start`` and ``stop``."""

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, tokens: int) -> Timing:
        return Timing(tokens, time.perf_counter() - self._wall, time.process_time() - self._cpu)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments.add_argument("--rounds", type=int, default=5, help="of bare, growkit (default: 5)")
    arguments.add_argument("--batch-tokens", type=int, default=1024, help="per step (default: 1024)")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    arguments.add_argument("--quick", action="store_true", help="a minute: 3M, three rounds of ten small steps")
    arguments.add_argument("--output", type=Path, default=ROOT / "docs/results/bench_overhead.json")
    options = arguments.parse_args()
    if options.quick:
        options.sizes, options.rounds, options.batch_tokens = ["3M"], 3, 512
    torch.set_num_threads(options.threads)

    rows = []
    print(f"{'':<30}{'tokens per second':>24}{'growkit / bare':>30}{'cpu time':>10}")
    print(f"{'model':<18}{'parameters':>12}{'bare':>12}{'growkit':>12}{'min':>12}{'median':>9}{'max':>9}{'median':>10}")
    for size in options.sizes:
        for preset, fields in SIZES[size].items():
            steps = 2 * LOG_EVERY if options.quick else MEASURED_STEPS[size]
            row = {"size": size, "preset": preset} | measure(preset, fields, steps, options)
            rows.append(row)
            ratio = row["ratio"]
            print(
                f"{preset + ' ' + size:<18}{row['parameters']:>12,}"
                f"{statistics.median(row['bare_tokens_per_second']):>12,.0f}"
                f"{statistics.median(row['growkit_tokens_per_second']):>12,.0f}"
                f"{ratio['min']:>12.3f}{ratio['median']:>9.3f}{ratio['max']:>9.3f}{row['cpu_ratio']['median']:>10.3f}",
                flush=True,
            )
    worst = min(row["ratio"]["median"] for row in rows)
    print(f"goal: a median of {GOAL:.2f} or more everywhere; the lowest is {worst:.3f}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "goal": GOAL,
        "reached": worst >= GOAL,
        "rounds": options.rounds,
        "batch_tokens": options.batch_tokens,
        "context_length": CONTEXT,
        "warmup_steps": LOG_EVERY,
        "log_every_steps": LOG_EVERY,
        "quick": options.quick,
        "machine": {"cores": os.cpu_count(), "usable_cores": len(os.sched_getaffinity(0))}
        | hardware.environment(device, torch.float32, 1),
        "models": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.output}")


def measure(preset: str, fields: dict[str, Any], steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of both arms, round by round, and their ratio."""
    recipe = recipe_of(preset, fields, LOG_EVERY + steps, options)
    schedule = growth_schedule(recipe)
    data = prepare_data(recipe, schedule)
    timings: dict[Callable[..., Timing], list[Timing]] = {bare: [], growkit: []}
    for _ in range(options.rounds):
        for arm, taken in timings.items():
            taken.append(arm(recipe, schedule, data))
    pairs = list(zip(timings[bare], timings[growkit], strict=True))
    return {
        "parameters": schedule.stages[0].model.num_params(),
        "measured_steps": steps,
        "bare_tokens_per_second": [round(b.tokens_per_second, 1) for b, _ in pairs],
        "growkit_tokens_per_second": [round(g.tokens_per_second, 1) for _, g in pairs],
        "ratio": spread([g.tokens_per_second / b.tokens_per_second for b, g in pairs]),
        "overhead_ms_per_step": spread([1e3 * (g.seconds - b.seconds) / steps for b, g in pairs]),
        "cpu_ratio": spread([b.cpu_seconds / g.cpu_seconds for b, g in pairs]),
    }


def recipe_of(preset: str, fields: dict[str, Any], steps: int, options: argparse.Namespace) -> Recipe:
    sections = {
        "run": {"threads": options.threads},
        "model": {"preset": preset} | fields,
        "trainer": {"precision": "fp32", "save_every": f"{steps} steps"},
        "monitor": {
            "log_every": LOG_EVERY,
            "validation_tokens": CONTEXT,
            "ngram_order": 0,
            "sample_tokens": 0,
            "peak_flops_per_second": 1e12,
        },
        "stages": [
            {
                "name": "only",
                "duration": f"{steps} steps",
                "context_length": CONTEXT,
                "global_batch_tokens": options.batch_tokens,
            }
        ],
    }
    return parse_recipe(yaml.safe_dump(sections), [], PRESETS, name="bench")


def growkit(recipe: Recipe, schedule: GrowthSchedule, data: RunData) -> Timing:
    """As ``growkit train`` does it."""
    stage, watch, taken = schedule.stages[0], Stopwatch(), []

    def listener(record: Record) -> None:  # a step's record is written before its validation and its save
        if record["kind"] == "step" and record["step"] == LOG_EVERY:
            watch.start()
        elif record["kind"] == "step" and record["step"] == stage.steps:
            taken.append(watch.stop((stage.steps - LOG_EVERY) * stage.global_batch_tokens))

    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, schedule, RunFolder.create(Path(folder) / "run", to_yaml(recipe)), data)
        with Display(lambda: run.schedule, "plain", Console(file=io.StringIO())) as display:
            run.log.listeners += [display, listener]
            run.train()
        run.folder.unlock()
    return taken[0]


def bare(recipe: Recipe, schedule: GrowthSchedule, data: RunData) -> Timing:
    """The same training and nothing else."""
    stage, optim, watch = schedule.stages[0], recipe.optim, Stopwatch()
    device = hardware.accelerator(recipe.trainer)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    params = init_params(stage.model, torch.Generator().manual_seed(recipe.run.seed))
    model = build(stage.model, params).to(device).train()
    parameters = dict(model.named_parameters())
    groups = param_groups(
        param_specs(stage.model), {}, 0, weight_decay=optim.weight_decay, decay_embedding=False, lr_scale={}
    )
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[name] for name in g.names], "weight_decay": g.weight_decay} for g in groups],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    stream = data.source(recipe, schedule)
    batches = iter(Batches(stream, stream.begin(), stage.shape, accumulate=stage.accumulate))
    for step in range(stage.steps):
        if step == LOG_EVERY:
            synchronize()
            watch.start()
        batch = next(batches)
        loss = model(batch.tokens.to(device), batch.targets.to(device)).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
    synchronize()
    return watch.stop((stage.steps - LOG_EVERY) * stage.global_batch_tokens)


def spread(values: list[float]) -> dict[str, float]:
    numbers = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 4) for name, value in numbers.items()}


if __name__ == "__main__":
    main()
