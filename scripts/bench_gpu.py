"""The Triton kernels on a GPU: are they right, how fast are they, and which of their targets are met.

    python scripts/bench_gpu.py [--only checks scan pattention] [--sanitize [memcheck …]] [--rounds 7]

Runs on a GPU of NVIDIA or AMD that Triton knows. First, outputs and every gradient against the reference in float64,
over and over, and with --sanitize a few cases under compute-sanitizer. Then the scan, beside its floors, growkit's
loop, the reference under torch.compile (16 tokens at a time: its loop over all of them would compile for hours),
mamba_ssm and flash-linear-attention where they are installed. Then Pattention, forward and backward, beside the two
products as one would write them, under torch.compile and without it, both ways to its norm, and its memory.

All arms of a table take turns in one run; a time is the median of the rounds, the second-level cache written over
before each, launches not counted; a ratio is the median of the rounds' ratios. Prints tables for docs/benchmarks.md,
writes docs/results/bench_gpu.json as it goes, keeps there the parts it was not asked for, and ends with status 1 if a
check fails. --smoke goes through all of it at tiny sizes in Triton's interpreter, where no figure means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from growkit import __version__  # noqa: E402
from growkit.errors import ConfigError, GrowkitError  # noqa: E402
from growkit.ops import tiling  # noqa: E402
from growkit.ops.dispatch import triton_lacks  # noqa: E402
from scripts import gpu_figures as figures  # noqa: E402

PARTS = ("checks", "scan", "pattention")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
AGREE = 2e-2  # relative, bfloat16: of arms of one table; each rounds in places of its own
ARMS_CHUNK = 16  # tokens that the reference is compiled for


class Sizes(NamedTuple):
    scan: tuple[tuple[tuple[int, int, int, int], str, bool], ...]  # shape, dtype, whether slow arms are there too
    pattention: tuple[tuple[int, int, int], ...]  # T, d, n
    norms: tuple[tuple[int, int, int], ...]
    product: int  # n of the n³ product that is the ceiling
    copied: int  # bytes of the copy that is the other one
    chunk: int


FULL = Sizes(
    scan=(
        (figures.GOAL_SHAPE, "bfloat16", True),
        (figures.GOAL_SHAPE, "float32", False),
        ((1, 2048, 1536, 16), "bfloat16", False),
        ((1, 16384, 1024, 16), "bfloat16", False),
        ((32, 512, 768, 16), "bfloat16", False),
        ((8, 2048, 5120, 16), "bfloat16", False),
        ((8, 2048, 1536, 64), "bfloat16", False),
    ),
    pattention=(
        *((16384, d, n) for d, n in ((1024, 4096), (1024, 16384), (1536, 6144), (2048, 4096), (2048, 8192))),
        *((16384, d, n) for d, n in ((2048, 16384), (256, 1024), (256, 4096), (128, 1024), (64, 4096))),
    ),
    norms=tuple((16384, d, ratio * d) for d in (256, 1024, 2048) for ratio in (1, 2, 3, 4, 6, 8)),
    product=8192,
    copied=2**30,
    chunk=ARMS_CHUNK,
)
TINY = Sizes((((1, 4, 3, 2), "bfloat16", True),), ((16, 4, 32),), ((16, 4, 8),), 16, 2**10, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="of all arms of a table (default: 7)")
    parser.add_argument("--repeats", type=int, default=20, help="of every check, for the same bits (default: 20)")
    sanitize = "a few checks under compute-sanitizer, too (default: all its tools)"
    parser.add_argument("--sanitize", nargs="*", choices=SANITIZERS, metavar="TOOL", help=sanitize)
    parser.add_argument("--smoke", action="store_true", help="tiny, in Triton's interpreter, without a GPU")
    parser.add_argument("--output", type=Path, help="default: docs/results/bench_gpu.json; nothing with --smoke")
    parser.add_argument("--few", action="store_true", help=argparse.SUPPRESS)  # what runs under the sanitizer
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except GrowkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    device = chosen_device(options.smoke)
    from scripts import gpu_checks  # kernels are loaded when it is known how they will run

    if options.few:
        few = checked(gpu_checks.cases("few"), device, 0, poison=False, reference_on=torch.device("cpu"))
        return report_failures({"checks": few})
    # The last digits of float32's products are compared, and cuBLAS has a work space that is always the same.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    output = options.output or (None if options.smoke else ROOT / "docs" / "results" / "bench_gpu.json")
    report: dict[str, Any] = {}
    if output and output.exists() and set(options.only) != set(PARTS):
        report = json.loads(output.read_text())
    found = machine(device)
    if report.get("machine", {}).get("device") != found["device"]:
        report = {}  # figures of two machines do not stand in one file
    report["machine"] = found
    sizes = TINY if options.smoke else FULL

    def save() -> None:
        report["targets"] = figures.targets(report)
        if output:
            output.write_text(json.dumps(report, indent=1) + "\n")

    if "checks" in options.only:
        cases = gpu_checks.cases("tiny" if options.smoke else "full")
        report["checks"] = checked(cases, device, options.repeats, poison=True, reference_on=device)
        report.pop("sanitizer", None)
        if options.sanitize is not None:
            report["sanitizer"] = gpu_checks.sanitized(Path(__file__), options.sanitize or SANITIZERS)
        save()
    for part, measure in (("scan", scan), ("pattention", pattention)):
        if part in options.only:
            measure(report, sizes, device, options.rounds, save)
    save()
    print(figures.tables(report))
    for tool, said in report.get("sanitizer", {}).items():
        print(f"\ncompute-sanitizer, {tool}: {json.dumps(said)}")
    return report_failures(report)


def chosen_device(smoke: bool) -> torch.device:
    """Raises ConfigError where the kernels cannot run as they are asked to."""
    if smoke:
        os.environ["TRITON_INTERPRET"] = "1"
        return torch.device("cpu")
    if os.environ.get("TRITON_INTERPRET"):
        mend = "unset it, or add --smoke to go through all of it at tiny sizes"
        problem = "runs kernels in Triton's interpreter, which says nothing of a GPU"
        raise ConfigError("no-triton", problem, key="TRITON_INTERPRET", value=os.environ["TRITON_INTERPRET"], mend=mend)
    missing = triton_lacks()
    if missing:
        problem, mend = missing
        mend += ", or add --smoke to go through all of it at tiny sizes in Triton's interpreter"
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        raise ConfigError("no-triton", problem, key="device", value=here, mend=mend)
    return torch.device("cuda", torch.cuda.current_device())


def machine(device: torch.device) -> dict[str, Any]:
    import triton

    from scripts.gpu_arms import versions

    found = {"growkit": __version__, "torch": torch.__version__, "triton": triton.__version__}
    found |= {"python": platform.python_version(), "interpreted": device.type != "cuda"} | versions()
    if device.type != "cuda":
        return found | {"device": "a CPU: no figure means anything"}
    properties = torch.cuda.get_device_properties(device)
    found |= {"device": properties.name, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found |= {"capability": ".".join(map(str, torch.cuda.get_device_capability(device)))}
    found |= {"multiprocessors": properties.multi_processor_count, "memory_GB": round(properties.total_memory / 1e9)}
    return found | {"nvidia-smi": _smi()}


def _smi() -> str | None:
    """Clocks, power and temperature as the driver has them, before the work."""
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{asked}: {'; '.join(said.splitlines())}"


def checked(
    cases: Sequence[Any], device: torch.device, repeats: int, *, poison: bool, reference_on: torch.device
) -> list[dict[str, Any]]:
    from scripts import gpu_checks

    found = []
    for case in cases:
        found.append(gpu_checks.check(case, device, repeats, poison=poison, reference_on=reference_on))
        said = found[-1]["problem"] or f"the error is {found[-1]['error_over_allowed']:.2f} of what is allowed"
        print(f"{found[-1]['case']}: {said}", file=sys.stderr, flush=True)
    return found


def report_failures(report: dict[str, Any]) -> int:
    found = figures.failures(report)
    for failure in found:
        print(f"failed: {failure}", file=sys.stderr)
    if "checks" in report:
        print(f"{len(report['checks'])} checks, {len(found)} failures", file=sys.stderr)
    return 1 if found else 0


def ceilings(watch: Any, sizes: Sizes, rounds: int) -> tuple[figures.Rates, Callable[[], object]]:
    """What this GPU does at the most, measured; and the product, to go beside other arms."""
    device = watch.device
    size = sizes.copied if device.type != "cuda" else min(sizes.copied, torch.cuda.mem_get_info(device)[0] // 16)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Of zeros, or of ones, a product is faster: fewer bits change.
    a, b = (torch.randn(2, sizes.product, sizes.product, device=device)).to(torch.bfloat16)
    out = torch.empty_like(a)

    def product() -> object:
        return torch.mm(a, b, out=out)

    took, _ = watch.in_turns({"copy": lambda: target.copy_(source), "product": product}, rounds)
    seconds = {name: statistics.median(of) for name, of in took.items()}
    amd, gpu = torch.version.hip is not None, device.type == "cuda"
    clock = watch.tick_rate() if gpu and not amd else None
    processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1
    flops = 2 * sizes.product**3 / seconds["product"]
    return figures.Rates(2 * size / seconds["copy"], flops, clock, processors, "amd" if amd else "nvidia"), product


def scan(report: dict[str, Any], sizes: Sizes, device: torch.device, rounds: int, save: Callable[[], None]) -> None:
    from scripts import gpu_arms as arms

    watch = arms.Stopwatch(device)
    rates, _ = ceilings(watch, sizes, rounds)
    report["scan"], report["scan_ceilings"] = [], rates._asdict()
    for shape, name, slow in sizes.scan:
        dtype = getattr(torch, name)
        inputs = arms.ScanInputs(shape, dtype, device)
        made, without = arms.scan_arms(inputs, sizes.chunk, slow=slow)
        wanted = made["triton"].forward().detach()
        for arm in [arm for arm in made if arm != "triton"]:
            try:
                apart = relative(made[arm].forward().detach(), wanted)
            except torch.OutOfMemoryError:
                without[arm] = "out of memory"
                del made[arm]
                continue
            if not apart <= AGREE:
                without[arm] = f"computes something else: {apart:.2g}"
                del made[arm]
        row: dict[str, Any] = {"shape": shape, "dtype": name, "without": without, "milliseconds": {}, "rounds": {}}
        instructions = {way: instructions_of_a_state(way, shape[3], dtype, device) for way in ("forward", "backward")}
        row["instructions"] = instructions
        row["floors"] = figures.scan_floors(shape, dtype.itemsize, rates, instructions)
        for way in ("forward", "backward"):
            runs = {arm: arms.scan_runs(of, inputs.upstream)[way] for arm, of in made.items()}
            took, missing = watch.in_turns(runs, rounds)
            without |= missing
            row["milliseconds"][way] = {arm: milliseconds(of) for arm, of in took.items()}
            row["rounds"][way] = {arm: [1e3 * value for value in of] for arm, of in took.items()}
        report["scan"].append(row)
        save()  # what is known is kept if the machine is taken away
        print(json.dumps(row), file=sys.stderr, flush=True)
    if rates.clock is not None:
        report["scan_ceilings"]["clock_at_the_end"] = watch.tick_rate()


def instructions_of_a_state(way: str, states: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """Of the machine code for this GPU; None where its loops are not those of N = 16, or cannot be read."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    from tests.kernels.ahead import TARGETS, of_a_state

    target = "sm_" + "".join(map(str, torch.cuda.get_device_capability(device)))
    return of_a_state(way, states, dtype, target, ("starts",)) if target in TARGETS else None


def pattention(
    report: dict[str, Any], sizes: Sizes, device: torch.device, rounds: int, save: Callable[[], None]
) -> None:
    from scripts import gpu_arms as arms

    watch = arms.Stopwatch(device)
    rates, product = ceilings(watch, sizes, rounds)
    report["pattention"], report["norms"], report["pattention_ceilings"] = [], [], rates._asdict()
    for T, d, n in sizes.pattention:
        for theta in ("l2_norm_gelu", "gelu_l2_norm"):
            inputs = arms.PattentionInputs(T, d, n, device)
            made = arms.pattention_arms(inputs, theta)
            report["pattention"].append(pattention_row(watch, inputs, made, product, sizes, (T, d, n), theta, rounds))
            save()
            print(json.dumps(report["pattention"][-1]), file=sys.stderr, flush=True)
    for shape in sizes.norms:
        report["norms"].append(norms_row(watch, shape, rounds))
        save()
        print(json.dumps(report["norms"][-1]), file=sys.stderr, flush=True)


def pattention_row(
    watch: Any, inputs: Any, made: Any, product: Any, sizes: Sizes, shape: tuple[int, int, int], theta: str, rounds: int
) -> dict[str, Any]:
    runs = {arm: inputs.both(forward) for arm, forward in made.items()}
    took, without = watch.in_turns(runs | {"product": product}, rounds)
    peaks = {arm: watch.peak(runs[arm]) for arm in runs if arm in took}
    useful = figures.pattention_flops(*shape)
    rate = [useful / mine / (2 * sizes.product**3 / other) for mine, other in zip(took["triton"], took["product"])]
    counted = figures.pattention_bytes(*shape, tiling.chunk_rows(shape[2]), -(-shape[2] // tiling.COLUMNS["narrow"]))
    ours, formulas = peaks["triton"], peaks.get("formula, compiled")

    def times(arm: str) -> float | None:
        pairs = zip(took.get(arm, ()), took["triton"])
        return statistics.median([a / b for a, b in pairs]) if arm in took else None

    return {
        "shape": shape,
        "theta": theta,
        "without": without,
        "milliseconds": {arm: milliseconds(of) for arm, of in took.items()},
        "rounds": {arm: [1e3 * value for value in of] for arm, of in took.items()},
        "triton_milliseconds": milliseconds(took["triton"]),
        "teraflops": useful / statistics.median(took["triton"]) / 1e12,
        "share_of_matrix_rate": statistics.median(rate),
        "times_formula": times("formula, compiled"),
        "times_eager": times("formula, eager"),
        "peak_bytes": peaks,
        "megabytes": None if ours is None else ours / 1e6,
        "memory_of_formula": None if ours is None or formulas is None else ours / formulas,
        "memory_of_counted": None if ours is None else ours / counted,
    }


def norms_row(watch: Any, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    from growkit.ops.pattention import triton
    from scripts import gpu_arms as arms

    inputs = arms.PattentionInputs(*shape, watch.device)
    took, _ = watch.in_turns(arms.norm_arms(inputs), rounds)
    rule = "gram" if triton._norms_ahead(inputs.x, triton._plan(inputs.x, [shape[2]], [1])) else "squares"
    over = [took[rule][turn] / min(took["squares"][turn], took["gram"][turn]) for turn in range(rounds)]
    each = {way: milliseconds(of) for way, of in took.items()}
    return {"shape": shape, "milliseconds": each, "rule": rule, "rule_over_best": statistics.median(over)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
