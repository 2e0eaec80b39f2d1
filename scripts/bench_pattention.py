"""Pattention's compiled path on a CPU beside the formula as one would write it in PyTorch.

    python scripts/bench_pattention.py [--rounds 7]

Float32 and bfloat16 autocast, on one core, in a process bound to it. The peer is linear, vector_norm, gelu and matmul
in eager mode, differentiated by autograd. In every round each arm goes forward and backward, to x, keys and values,
four times in a row, the fastest of which counts; of the rounds' ratios
the median does. Where elementwise passes are
the larger part of the peer's time, measured by its matrix products alone, the goal is higher.

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
from functools import partial
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
NARROW = [(2048, 32, 512), (2048, 32, 1024), (2048, 64, 1024)]
SHAPES = [*NARROW, (2048, 128, 512), (2048, 192, 768), (1024, 768, 768), (1024, 768, 3072)]
MEMORY = [(8192, 64, 2048), (8192, 192, 2048), (8192, 768, 3072)]
# Times as fast as the peer: where its six matrix products alone take less than half of its time, and elsewhere.
ELEMENTWISE_GOAL, GOAL = 1.3, 1.0
MEMORY_GOAL = 0.5  # of the peer's
AGREE = {"float32": 1e-5, "bfloat16": 3e-2}  # relative; each rounds in places of its own
# Of the C library, for speed: freed memory is kept. Else every arm pays for what the one before it gave back.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
IN_A_ROW = 4  # of which the fastest counts: the first has to find memory where the other arm left it
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
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (KEPT if part == "speed" else {})
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

    def products(self) -> list[Tensor]:
        """The matrix products alone."""
        dtype = torch.bfloat16 if self.narrow else torch.float32
        x, keys, values, grad = (t.detach().to(dtype) for t in (*self.leaves, self.upstream))
        scores = x @ keys.T
        return [scores @ values, grad @ values.T, scores @ keys, scores.T @ x, scores.T @ grad]

    def both(self, path: Op) -> list[Tensor]:
        out = self.forward(path)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream.to(out.dtype))]


def speed(rounds: int) -> list[dict[str, Any]]:
    found = []
    for shape in SHAPES:
        for narrow in (False, True):
            step, precision = Step(*shape, narrow), "bfloat16" if narrow else "float32"
            results = [step.both(path) for path in ARMS.values()]
            for a, b in zip(*results, strict=True):
                apart = float((a.float() - b.float()).norm() / a.float().norm())
                assert apart <= AGREE[precision], f"{shape}, {precision}: something else is computed: {apart}"
            arms = {name: partial(step.both, path) for name, path in ARMS.items()} | {"products": step.products}
            took: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(rounds):
                for name, arm in arms.items():
                    took[name].append(min(seconds(arm) for _ in range(IN_A_ROW)))
            ratios = [a / b for a, b in zip(took["eager"], took["compiled"], strict=True)]
            medians = {name: round(1000 * statistics.median(of), 1) for name, of in took.items()}
            goal = ELEMENTWISE_GOAL if medians["products"] < medians["eager"] / 2 else GOAL
            times = round(statistics.median(ratios), 2)
            row = {"shape": shape, "precision": precision, "milliseconds": medians, "times": times}
            spread = [round(min(ratios), 2), round(max(ratios), 2)]
            found.append(row | {"of_rounds": spread, "goal": goal, "met": times >= goal})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def seconds(arm: Callable[[], object]) -> float:
    began = time.perf_counter()
    arm()
    return time.perf_counter() - began


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
