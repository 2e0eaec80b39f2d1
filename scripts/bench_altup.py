"""What AltUp's streams cost: a step's forward and backward pass with K blocks beside the residual stream's.

    python scripts/bench_altup.py [--rounds 7] [--compiled] [--quick]

One transformer (d = 768, 12 layers, 12 heads, vocabulary 4096), bf16 autocast, as growkit/train runs it. Each arm is
that model with another stream. Arms take turns, every second round in reverse order, so that whatever else the machine
does hits all of them; a ratio is to the residual stream of the same round. Memory is of one more step of each arm:
bytes that the forward pass leaves for the backward pass beside the weights, the planner's figure for them, and how far
resident memory rises at its peak in a process of its own. On a machine that others use too, the ratio of the least
times says more than the median ratio.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkit.models.config import ModelConfig
from growkit.models.decoder import DecoderLM, build, init_params
from growkit.models.presets import PRESETS
from growkit.planner.activations import Pass
from growkit.planner.passes import trace
from growkit.train import hardware

ROOT = Path(__file__).resolve().parent.parent
SIZE: dict[str, Any] = {"vocab_size": 4096, "embed_dim": 768, "num_layers": 12, "num_heads": 12}
ROWS, CONTEXT = 4, 256
ONE = "residual"
ARMS: dict[str, dict[str, Any]] = {
    ONE: {},
    "recycled, K = 2": {"altup_blocks": 2},
    "recycled, K = 4": {"altup_blocks": 4},
    "full, K = 2": {"altup_blocks": 2, "altup_variant": "full"},
    "full, K = 4": {"altup_blocks": 4, "altup_variant": "full"},
    "routed, K = 4": {"altup_blocks": 4, "altup_coefficients": "routed"},
    "round robin, K = 4": {"altup_blocks": 4, "altup_order": "round_robin"},
}
GOALS = {"recycled, K = 2": 1.10, "recycled, K = 4": 1.25}
WARM_UP = 1  # steps of each arm, which also compile


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7, help="steps of each arm (default: 7)")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="beside the residual stream")
    arguments.add_argument("--compiled", action="store_true", help="also through torch.compile: minutes for each arm")
    arguments.add_argument("--quick", action="store_true", help="half a minute: narrow, three rounds; shows no cost")
    arguments.add_argument("--output", type=Path, default=ROOT / "docs/results/bench_altup.json")
    options = arguments.parse_args()
    if options.quick:
        options.rounds, SIZE["embed_dim"], SIZE["num_layers"] = 3, 192, 4
    torch.set_num_threads(options.threads)
    arms = dict.fromkeys([ONE, *options.arms])

    configs = {arm: config_of(arm) for arm in arms}
    result: dict[str, Any] = {
        "goals": GOALS,
        "rounds": options.rounds,
        "rows": ROWS,
        "context_length": CONTEXT,
        "model": dict(SIZE),
        "quick": options.quick,
        "machine": {"cores": os.cpu_count(), "usable_cores": len(os.sched_getaffinity(0))}
        | hardware.environment("cpu", torch.bfloat16, 1),
        "arms": {arm: figures(config) for arm, config in configs.items()},
    }
    for how, compiled in (("eager", False), ("compiled", True)):
        if compiled and not options.compiled:
            continue
        for arm, timing in timed(configs, options.rounds, compiled=compiled).items():
            result["arms"][arm][how] = timing
    spawn = multiprocessing.get_context("spawn")
    for arm in arms:
        with spawn.Pool(1) as pool:
            result["arms"][arm]["peak_resident_bytes"] = pool.apply(resident, (SIZE, arm, options.threads))
    reached = {
        arm: result["arms"][arm]["eager"]["ratio"]["median"] <= most for arm, most in GOALS.items() if arm in arms
    }
    result["reached"] = reached
    show(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.output}")


def config_of(arm: str) -> ModelConfig:
    preset = PRESETS.get("transformer", key="preset")
    config: ModelConfig = preset(**SIZE, **ARMS[arm]).written_out()
    return config


def made(config: ModelConfig) -> DecoderLM:
    return build(config, init_params(config, torch.Generator().manual_seed(0)), copy=False).train()


def tokens() -> tuple[Tensor, Tensor]:
    """A step's tokens and targets."""
    drawn = torch.randint(0, SIZE["vocab_size"], (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:]


def step(model: DecoderLM) -> tuple[float, float, float]:
    """Seconds of the forward pass, of both passes, and of all cores in both."""
    inputs, targets = tokens()
    model.zero_grad()
    cpu, begin = time.process_time(), time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs, targets).total
    half = time.perf_counter()
    loss.backward()
    return half - begin, time.perf_counter() - begin, time.process_time() - cpu


def timed(configs: dict[str, ModelConfig], rounds: int, *, compiled: bool) -> dict[str, dict[str, Any]]:
    models = {arm: made(config) for arm, config in configs.items()}
    for model in models.values():
        if compiled:
            model.compile(dynamic=False)
        for _ in range(WARM_UP):
            step(model)
        model.zero_grad()
    taken: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in models}
    for index in range(rounds):
        for arm, model in list(models.items())[:: -1 if index % 2 else 1]:
            taken[arm].append(step(model))
            model.zero_grad()
        print(f"round {index + 1}: " + ", ".join(f"{arm} {of[-1][1]:.2f} s" for arm, of in taken.items()), flush=True)
    ones = taken[ONE]
    return {
        arm: {
            "seconds": [round(both, 4) for _, both, _ in of],
            "median_seconds": round(statistics.median(both for _, both, _ in of), 4),
            "ratio_of_least": round(min(both for _, both, _ in of) / min(one for _, one, _ in ones), 4),
            "ratio": spread([both / one for (_, both, _), (_, one, _) in zip(of, ones, strict=True)]),
            "forward_ratio": spread([half / one for (half, _, _), (one, _, _) in zip(of, ones, strict=True)]),
            "cpu_ratio": spread([cpu / one for (_, _, cpu), (_, _, one) in zip(of, ones, strict=True)]),
        }
        for arm, of in taken.items()
    }


def figures(config: ModelConfig) -> dict[str, Any]:
    """What does not depend on the clock."""
    at = Pass(rows=ROWS, context=CONTEXT, bf16=True)
    return {
        "parameters": config.num_params(),
        "flops_per_token": config.flops_per_token(CONTEXT),
        "saved_bytes": saved_bytes(config),
        "planned_saved_bytes": round(trace(config, at, {}).forward.change),
    }


def saved_bytes(config: ModelConfig) -> int:
    """What a forward pass leaves for the backward pass, each storage once, the weights themselves not."""
    model = made(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage takes the place of another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    inputs, targets = tokens()
    give_back: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back), torch.autocast("cpu", dtype=torch.bfloat16):
        model(inputs, targets)
    return sum(saved.values())


def resident(size: dict[str, Any], arm: str, threads: int) -> int:
    """How far this process's resident memory rises, at its peak, in one step of a model that is there."""
    SIZE.update(size)
    torch.set_num_threads(threads)
    model = made(config_of(arm))
    before = status("VmRSS")
    step(model)
    return status("VmHWM") - before


def status(field: str) -> int:
    """A size of this process, in bytes, as Linux has it; unlike getrusage's, its peak is not the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def spread(values: list[float]) -> dict[str, float]:
    numbers = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 4) for name, value in numbers.items()}


def show(result: dict[str, Any]) -> None:
    hows = [how for how in ("eager", "compiled") if how in result["arms"][ONE]]
    heads = "".join(f"{how + ' s':>12}{'ratio':>8}{'min':>7}{'max':>7}{'least':>7}{'cpu':>7}" for how in hows)
    print(f"{'stream':<20}{heads}{'saved':>9}{'planned':>9}{'peak':>9}  MB")
    for arm, of in result["arms"].items():
        row = "".join(
            f"{timing['median_seconds']:>12.3f}{timing['ratio']['median']:>8.3f}{timing['ratio']['min']:>7.2f}"
            f"{timing['ratio']['max']:>7.2f}{timing['ratio_of_least']:>7.3f}{timing['cpu_ratio']['median']:>7.3f}"
            for timing in (of[how] for how in hows)
        )
        sizes = (of["saved_bytes"], of["planned_saved_bytes"], of["peak_resident_bytes"])
        print(f"{arm:<20}{row}" + "".join(f"{size / 1e6:>9.0f}" for size in sizes))
    for arm, reached in result["reached"].items():
        print(f"goal: {arm} at most {GOALS[arm]:.2f}: {'reached' if reached else 'missed'}")


if __name__ == "__main__":
    main()
