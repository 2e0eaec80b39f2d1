"""Pattention's compiled path on a CPU beside the formula as one would write it in PyTorch.

    python scripts/bench_pattention.py [--rounds 7]

Float32 and bfloat16 autocast, on one core, in a process bound to it. The peer is linear, vector_norm, gelu and matmul
in eager mode, differentiated by autograd. In every round each arm goes forward and backward, to x, keys and values,
one after the other; the median of the rounds' ratios counts. Of narrow shapes elementwise passes are the larger part:
there the goal is higher.

Beside it: the peak of resident memory of a training step over its inputs and weights, in a process of its own for
every measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from growkit import __version__  # noqa: E402
from growkit.ops.pattention import PATHS, Tokens  # noqa: E402

# Tokens, width (in and out), parameter tokens.
ELEMENTWISE = [(2048, 32, 1024), (2048, 64, 1024)]
OTHERS = [(2048, 128, 512), (2048, 192, 768), (1024, 768, 768), (1024, 768, 3072)]
MEMORY = [(8192, 64, 2048), (8192, 192, 2048), (8192, 768, 3072)]
ELEMENTWISE_GOAL, GOAL = 1.3, 1.0  # times as fast as the peer
MEMORY_GOAL = 0.5  # of the peer's
AGREE = {"float32": 1e-5, "bfloat16": 3e-2}  # relative; each rounds in places of its own
THETA = "l2_norm_gelu"
Op = Callable[[Tensor, Sequence[Tokens]], list[Tensor]]


def eager(x: Tensor, projections: Sequence[Tokens]) -> list[Tensor]:
    """The published layer, of one bank."""
    (tokens,) = projections
    (keys,), (values,), (tau,) = tokens.keys, tokens.values, tokens.taus
    a = F.linear(x, keys)
    return [F.gelu(a * (tau / torch.linalg.vector_norm(a, dim=-1, keepdim=True))) @ values]


ARMS: dict[str, Op] = {"eager": eager, "compiled": PATHS["compiled"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of all arms (default: 7)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "bench_pattention.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a process of its own measures
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.rounds)))
        return
    report: dict[str, Any] = {"machine": machine()}
    report["goals"] = {"elementwise-bound": ELEMENTWISE_GOAL, "others": GOAL, "memory": MEMORY_GOAL}
    for part in PARTS:
        report[part] = found = measured(part, options.rounds)
        print(part, json.dumps(found, indent=1), flush=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    versions = {"growkit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    instructions = torch.backends.cpu.get_cpu_capability()
    found = {"machine": platform.machine(), "instructions": instructions, "cores": len(os.sched_getaffinity(0))}
    return versions | found | {"load_when_it_began": round(os.getloadavg()[0], 1)}


def measured(part: str, rounds: int) -> Any:
    """What a process bound to one core prints."""
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, sys.executable, __file__, "--part", part, "--rounds", str(rounds)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


class Step:
    """A training step's inputs: scores of the size that a model which has just been made gives."""

    def __init__(self, tokens: int, width: int, n: int, narrow: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(rows, width, generator=generator)

        self.x, keys, values = draw(tokens), draw(n, 0.02), draw(n, 0.02)
        self.leaves = [tensor.requires_grad_() for tensor in (self.x, keys, values)]
        self.tokens = Tokens([keys], [values], [n**0.5], THETA, "bank")
        self.narrow, self.upstream = narrow, draw(tokens)

    def forward(self, path: Op) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            (out,) = path(self.x, [self.tokens])
        return out

    def both(self, path: Op) -> list[Tensor]:
        out = self.forward(path)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream.to(out.dtype))]


def speed(rounds: int) -> list[dict[str, Any]]:
    found = []
    for shape in (*ELEMENTWISE, *OTHERS):
        for narrow in (False, True):
            step, precision = Step(*shape, narrow), "bfloat16" if narrow else "float32"
            results = [step.both(path) for path in ARMS.values()]
            for a, b in zip(*results, strict=True):
                apart = float((a.float() - b.float()).norm() / a.float().norm())
                assert apart <= AGREE[precision], f"{shape}, {precision}: something else is computed: {apart}"
            took: dict[str, list[float]] = {name: [] for name in ARMS}
            for _ in range(rounds):
                for name, path in ARMS.items():
                    began = time.perf_counter()
                    step.both(path)
                    took[name].append(time.perf_counter() - began)
            ratios = [a / b for a, b in zip(took["eager"], took["compiled"], strict=True)]
            times, goal = round(statistics.median(ratios), 2), ELEMENTWISE_GOAL if shape in ELEMENTWISE else GOAL
            medians = {name: round(1000 * statistics.median(of), 1) for name, of in took.items()}
            row = {"shape": shape, "precision": precision, "milliseconds": medians, "times": times}
            spread = [round(min(ratios), 2), round(max(ratios), 2)]
            found.append(row | {"of_rounds": spread, "goal": goal, "met": times >= goal})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def memory(rounds: int) -> list[dict[str, Any]]:
    """Each time in a process of its own: what one has freed may still be its own, or not. Megabytes, the most."""
    found = []
    for shape in MEMORY:
        for narrow in (False, True):
            peaks = {name: max(in_processes(name, shape, narrow, min(rounds, 2))) for name in ARMS}
            share = round(peaks["compiled"] / peaks["eager"], 2)
            row = {"shape": shape, "precision": "bfloat16" if narrow else "float32", "megabytes": peaks}
            found.append(row | {"share": share, "met": share <= MEMORY_GOAL})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def in_processes(name: str, shape: tuple[int, int, int], narrow: bool, count: int) -> list[float]:
    found = []
    for _ in range(count):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found.append(pool.submit(peak, name, shape, narrow).result())
    return found


def peak(name: str, shape: tuple[int, int, int], narrow: bool) -> float:
    Step(64, *shape[1:], narrow).both(ARMS[name])  # what is loaded once only
    step = Step(*shape, narrow)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = resident("VmRSS")
    step.both(ARMS[name])
    return round((resident("VmHWM") - before) / 2**20, 1)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


PARTS: dict[str, Callable[[int], Any]] = {"speed": speed, "memory": memory}

if __name__ == "__main__":
    main()
