"""The selective scan on a CPU beside mamba.py's parallel scan and the slow path of Hugging Face's Mamba.

    python scripts/bench_scan.py [--rounds 3] [--only "memory on 1"]

One sequence of 2,048 tokens, 1,536 channels, 16 states, float32, on one core, in a process bound to it. In every round
each arm goes forward (no gradients asked for), and forward and backward to x, dt, A, B, C and D, one arm after the
other; arms that take less than a second do so five times and give their median. The median of the rounds counts, and
so does that of the rounds' ratios; the reference and transformers may take a minute and are in the first round only.
Peers run as they are written: ``MambaBlock.selective_scan`` of mambapy, and ``mamba_selective_scan`` of transformers
without kernels. A peer that is not installed comes from PyPI into a folder that is deleted at the end.

Beside it: bfloat16, the gate, two threads, one step of decoding, how long the kernel takes to build and to load, and
the peak memory of a training step at 16,384 tokens and 1,024 channels, over the inputs' size, which it includes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from growkit import __version__  # noqa: E402
from growkit.ops.native import find_compiler  # noqa: E402
from growkit.ops.selective_scan import PATHS, native  # noqa: E402

PEERS = {"mambapy": "mambapy==1.2.0", "transformers": "transformers>=5"}
GOALS = {"mambapy": 8, "transformers": 30}  # times faster, forward and backward
LOOP_GOAL = 3  # of the loop, over mambapy
BUILD_GOAL = 30  # seconds
MEMORY_GOAL = 4.0
TOKENS, CHANNELS, STATES = 2048, 1536, 16
LONG, FEWER = 16384, 1024  # tokens and channels of the step whose memory is measured
AGREE = 1e-4  # relative; float32, and peers that sum in an order of their own
WITHOUT = "BENCH_SCAN_WITHOUT"
SLOW = ("reference", "transformers")  # minutes each: in the first round only
MEASURED = (("build", 1), ("peers", 1), ("ways", 1), ("ways", 2), ("memory", 1))  # and on how many cores
SHORT = 1.0  # seconds: what takes less is repeated

Arm = Callable[[], tuple[Tensor, list[Tensor]]]  # y and what to differentiate it by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all arms (default: 3)")
    parser.add_argument("--without", choices=list(PEERS), help="leave a peer out; the results then say so")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "bench_scan.json")
    parser.add_argument("--only", nargs="+", choices=[f"{part} on {n}" for part, n in MEASURED], help="keep the others")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a process of its own measures
    options = parser.parse_args()
    if options.without:
        os.environ[WITHOUT] = options.without  # for the processes that measure, too
    if options.part:
        print(json.dumps(PARTS[options.part](options.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        missing = [package for name, package in PEERS.items() if find_spec(name) is None]
        if missing:  # without what they depend on: torch is here
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *missing]
            subprocess.run(command, check=True)
        report: dict[str, Any] = json.loads(options.output.read_text()) if options.only else {}
        report["machine"] = machine(folder)
        report["sizes"] = {"sequences": 1, "tokens": TOKENS, "channels": CHANNELS, "states": STATES}
        report["goals"] = {**GOALS, "loop over mambapy": LOOP_GOAL, "build": BUILD_GOAL, "memory": MEMORY_GOAL}
        for part, cores in MEASURED:
            if not options.only or f"{part} on {cores}" in options.only:
                report[f"{part} on {cores}"] = found = measured(part, cores, options.rounds, folder)
                print(part, cores, json.dumps(found, indent=1), flush=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def machine(folder: str) -> dict[str, Any]:
    paths = [folder, *sys.path]
    versions = {"growkit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in PEERS:
        versions[name] = next(iter(importlib.metadata.distributions(name=name, path=paths))).version
    compiler = find_compiler()
    assert compiler is not None, "this benchmark needs a C++ compiler"
    said = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    cores = len(os.sched_getaffinity(0))
    instructions = torch.backends.cpu.get_cpu_capability()
    found = {"machine": platform.machine(), "instructions": instructions, "cores": cores}
    return versions | {"compiler": said.splitlines()[0]} | found | {"load_when_it_began": round(os.getloadavg()[0], 1)}


def measured(part: str, cores: int, rounds: int, folder: str) -> Any:
    """What a process bound to ``cores`` prints, with as many threads."""
    bound = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    command = ["taskset", "-c", bound, sys.executable, __file__, "--part", part, "--rounds", str(rounds)]
    paths = os.pathsep.join(path for path in (folder, os.environ.get("PYTHONPATH")) if path)
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(cores)}
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


def leaves(dtype: torch.dtype = torch.float32, tokens: int = TOKENS, channels: int = CHANNELS) -> dict[str, Tensor]:
    """As in a model that has just been made: A = −(1 … N), Δ of about 0.02."""
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(1, tokens, width, generator=generator)

    given = {"x": draw(channels), "dt": draw(channels) / 2 - 4, "A": -torch.arange(1.0, STATES + 1).repeat(channels, 1)}
    given |= {"B": draw(STATES), "C": draw(STATES), "D": torch.ones(channels), "z": draw(channels)}
    narrow = {name: tensor.to(dtype) if tensor.dim() == 3 else tensor for name, tensor in given.items()}
    return {name: tensor.requires_grad_() for name, tensor in narrow.items()}


def ours(way: str, dtype: torch.dtype = torch.float32, *, gated: bool = False) -> Arm:
    """``way``: reference, loop or kernel."""
    given = leaves(dtype)
    z = given.pop("z") if gated else None
    wanted = [tensor for name, tensor in given.items() if name != "z"]
    kernel = native.kernel
    assert kernel() is not None

    def arm() -> tuple[Tensor, list[Tensor]]:
        native.kernel = kernel if way == "kernel" else lambda: None  # type: ignore[assignment]
        y, _ = PATHS["reference" if way == "reference" else "compiled"](*wanted[:6], z_BLD=z)
        return y, wanted if z is None else [*wanted, z]

    return arm


def mamba_py() -> Arm:
    from mambapy.mamba import MambaBlock

    given = leaves()
    x, dt, A, B, C, D = wanted = [given[name] for name in ("x", "dt", "A", "B", "C", "D")]
    return lambda: (MambaBlock.selective_scan(None, x, F.softplus(dt), A, B, C, D), wanted)


def hugging_face() -> Arm:
    """Channels before tokens, as its mixer calls it."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    given = leaves()
    x, _, A, B, C, D = (given[name] for name in ("x", "dt", "A", "B", "C", "D"))
    dt = given["dt"].detach().transpose(1, 2).contiguous().requires_grad_()

    def arm() -> tuple[Tensor, list[Tensor]]:
        turned = (tensor.transpose(1, 2) for tensor in (B, C))
        y = mamba_selective_scan(x.transpose(1, 2), dt, A, *turned, D=D, delta_softplus=True)
        return y.transpose(1, 2), [x, dt, A, B, C, D]

    return arm


def seconds(arm: Arm, upstream: Tensor) -> tuple[float, float]:
    """Forward alone, and forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            arm()

    def both() -> None:
        y, wanted = arm()
        torch.autograd.grad(y, wanted, upstream.to(y.dtype))

    def timed(run: Callable[[], None]) -> float:
        took: list[float] = []
        while not took or (took[0] < SHORT and len(took) < 5):
            began = time.perf_counter()
            run()
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    return timed(forward), timed(both)


def in_turns(arms: dict[str, Arm], rounds: int) -> dict[str, Any]:
    """Milliseconds of each arm, medians of the rounds, and each round's."""
    upstream = torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1))
    for arm in arms.values():  # what is done once only: imports, caches
        with torch.no_grad():
            arm()
    each: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name, arm in arms.items():
            if turn == 0 or name not in SLOW:
                each[name].append(seconds(arm, upstream))
                print(name, each[name][-1], file=sys.stderr, flush=True)
    return {
        name: {
            "forward": milliseconds(statistics.median(took[0] for took in of)),
            "forward_and_backward": milliseconds(statistics.median(took[1] for took in of)),
            "rounds": [[milliseconds(value) for value in took] for took in of],
        }
        for name, of in each.items()
    }


def milliseconds(value: float) -> float:
    return round(1000 * value, 1)


def ratio(found: dict[str, Any], slow: str, fast: str) -> float:
    """Median of the rounds' ratios, forward and backward."""
    pairs = zip(found[slow]["rounds"], found[fast]["rounds"])
    return round(statistics.median(mine[1] / other[1] for mine, other in pairs), 1)


def peers(rounds: int) -> dict[str, Any]:
    arms = {"kernel": ours("kernel"), "loop": ours("loop"), "reference": ours("reference")}
    left_out = os.environ.get(WITHOUT)
    arms |= {name: make() for name, make in (("mambapy", mamba_py), ("transformers", hugging_face)) if name != left_out}
    with torch.no_grad():
        wanted = arms["reference"]()[0]
        for name, arm in arms.items():
            apart = float((arm()[0] - wanted).norm() / wanted.norm())
            assert apart <= AGREE, f"{name} computes something else: {apart}"
    found = in_turns(arms, rounds)
    faster = {
        name: {"times": ratio(found, name, "kernel"), "goal": goal} for name, goal in GOALS.items() if name in arms
    }
    if "mambapy" in arms:
        faster["mambapy, by the loop"] = {"times": ratio(found, "mambapy", "loop"), "goal": LOOP_GOAL}
    faster["loop"] = {"times": ratio(found, "loop", "kernel")}
    return {
        "milliseconds": found,
        "faster": faster,
        "met": all(f["times"] >= f.get("goal", 0) for f in faster.values()),
    }


def ways(rounds: int) -> dict[str, Any]:
    arms = {"float32": ours("kernel"), "float32, gated": ours("kernel", gated=True)}
    arms |= {"bfloat16": ours("kernel", torch.bfloat16), "bfloat16, gated": ours("kernel", torch.bfloat16, gated=True)}
    found = in_turns(arms | {"loop, float32": ours("loop")}, rounds)
    return {"milliseconds": found, "microseconds_of_a_step": step_microseconds()}


def step_microseconds() -> dict[str, float]:
    """One token with a state, as in decoding."""
    given = {name: tensor.detach() for name, tensor in leaves(tokens=1).items()}
    z, h = given.pop("z"), torch.zeros(1, CHANNELS, STATES)
    found, kernel = dict[str, float](), native.kernel
    for way in ("kernel", "loop", "reference"):
        native.kernel = kernel if way == "kernel" else lambda: None  # type: ignore[assignment]
        path, took = PATHS["reference" if way == "reference" else "compiled"], []
        for _ in range(500):
            began = time.perf_counter()
            path(*given.values(), z_BLD=z, h0_BDN=h)
            took.append(time.perf_counter() - began)
        found[way] = round(1e6 * statistics.median(took))
    native.kernel = kernel
    return found


def build(rounds: int) -> dict[str, Any]:
    """Seconds with an empty cache, and with a full one."""
    found: dict[str, list[float]] = {"empty": [], "full": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            for cache in found:
                native.kernel.cache_clear()
                began = time.perf_counter()
                assert native.kernel() is not None
                found[cache].append(time.perf_counter() - began)
    medians = {cache: round(statistics.median(took), 3) for cache, took in found.items()}
    return {"seconds": medians, "met": medians["empty"] <= BUILD_GOAL}


def memory(rounds: int) -> dict[str, Any]:
    """Peak of resident memory over a training step's inputs, themselves included; weights (A, D) not. Every time in a
    process of its own: what one has freed may still be its own, or not, and the next one begins with it."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        each = {way: list(pool.map(peak, [way] * rounds)) for way in ("kernel", "loop")}
    met = max(map(max, each.values())) <= MEMORY_GOAL
    return {"tokens": LONG, "channels": FEWER, "of_inputs": each, "met": met}


def peak(way: str) -> float:
    if way == "loop":
        native.kernel = lambda: None  # type: ignore[assignment]
    training_step(64)  # what is loaded once only
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = resident("VmRSS")
    size = training_step(LONG)
    return round((resident("VmHWM") - before) / size, 2)


def training_step(tokens: int) -> int:
    """Bytes of its inputs."""
    given = leaves(tokens=tokens, channels=FEWER)
    size = sum(tensor.nbytes for tensor in given.values() if tensor.dim() == 3)
    z = given.pop("z")
    y, _ = PATHS["compiled"](*given.values(), z_BLD=z)
    y.sum().backward()
    return size


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"build": build, "peers": peers, "ways": ways, "memory": memory}

if __name__ == "__main__":
    main()
