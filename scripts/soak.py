"""Kills training runs again and again, resumes them, and holds what comes out against runs that never stopped.

    python scripts/soak.py [--kills 100] [--seed 0]

A run trains a small recipe (accumulation, shuffling, dropout; growth of parameter tokens, then of depth with a longer
context). It is killed (SIGKILL) at a random moment or at a fault point of growkit/faults.py, resumed, killed again,
until it completes; then a run with another seed begins. Every step, validation and growth record, and the final
weights and moments, must be bitwise those of the uninterrupted run, and no kill may cost more than one save interval.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # the fork server starts here and finds tests/ by it

from growkit import faults  # noqa: E402
from growkit.checkpoint import manifest as manifests  # noqa: E402
from growkit.checkpoint import run_folder, store  # noqa: E402
from growkit.checkpoint.metrics_log import Record, read_log  # noqa: E402
from growkit.checkpoint.run_folder import RunFolder  # noqa: E402
from growkit.checkpoint.store import Checkpoint  # noqa: E402
from growkit.train import hardware  # noqa: E402
from tests import support  # noqa: E402

SAVE_EVERY = 4  # steps
STAGE_DURATION = "10 steps"  # so that most runs are killed several times
# Of the machine, not of the run:
MEASURED = {"seconds", "tokens_per_second", "flops_per_second", "utilisation", "memory_bytes"}
AT_FAULT, AT_TIME, LEFT_ALONE = "fault point", "time", "none"
# A share is left alone, so that every run ends however unlucky it is.
PLANS = {AT_FAULT: 0.45, AT_TIME: 0.45, LEFT_ALONE: 0.1}
STUCK_SECONDS = 300.0


class Difference(Exception):
    """The run did something that the run which never stopped did not do."""


@dataclass
class Tally:
    """``kills``: by phase, ``fault_kills``: by fault point, ``recomputed``: optimizer steps lost by each kill."""

    runs: int = 0
    attempts: int = 0
    restarts: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    fault_kills: Counter[str] = field(default_factory=Counter)
    recomputed: list[int] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=100, help="at least this many (default: 100)")
    arguments.add_argument("--seed", type=int, default=0, help="of what is killed when, and of the first run")
    arguments.add_argument("--output", type=Path, default=ROOT / "docs/results/soak.json")
    options = arguments.parse_args()

    torch.set_num_threads(1)
    rng, tally = random.Random(options.seed), Tally()
    folder = Path(tempfile.mkdtemp(prefix="growkit-soak-"))
    began = time.monotonic()
    assert support.in_child("--version") == 0  # the fork server imports torch now, not in the first run's time
    try:
        while tally.killed < options.kills:
            soak(folder / f"seed-{options.seed + tally.runs}", options.seed + tally.runs, rng, tally)
            print(f"run {tally.runs}: identical after {tally.killed} kills in all", flush=True)
    except Difference as difference:
        print(f"FAILED in run {tally.runs + 1}, after {tally.killed} kills: {difference}", file=sys.stderr)
        print(f"what it left: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    report(tally, time.monotonic() - began, options.seed, options.output)
    return 0


def soak(folder: Path, seed: int, rng: random.Random, tally: Tally) -> None:
    """One run, killed until it completes, held against one that is left alone. Raises Difference."""
    recipes = []
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
        run = {"folder": str(folder / name / "runs"), "seed": seed}
        trainer = {"save_every": f"{SAVE_EVERY} steps", "accelerator": "cpu"}
        recipe = support.recipe_dict(folder, run=run, trainer=trainer)
        for stage in recipe["stages"]:
            stage |= {"duration": STAGE_DURATION, "validate_every": "3 steps"}
        recipes.append(support.write_recipe(folder / name, recipe))
    whole, killed = (RunFolder(folder / name / "runs" / "run") for name in ("whole", "killed"))
    started = time.monotonic()
    if (code := support.in_child("train", recipes[0])) != 0:
        raise Difference(f"the uninterrupted run ended with exit code {code}")
    seconds = time.monotonic() - started
    while not attempt(killed, recipes[1], rng, seconds, tally):
        pass
    compare(whole, killed)
    tally.runs += 1
    shutil.rmtree(folder)


def attempt(run: RunFolder, recipe: Path, rng: random.Random, seconds: float, tally: Tally) -> bool:
    """Starts or resumes the run and perhaps kills it. True once it has completed."""
    step = newest(run)
    if run.path.exists() and not (run.path / run_folder.MARK).exists():
        clear_away(run)
    words = ("resume", run.path) if run.path.exists() else ("train", recipe)
    tally.restarts += step is None and run.path.exists()
    base = manifests.read(run.checkpoint(step)).log_bytes if step is not None else 0
    before = unfinished(run)

    plan = rng.choices(list(PLANS), weights=list(PLANS.values()))[0]
    rarely = [1 / (1 + tally.fault_kills[point]) for point in faults.POINTS]  # so that every point gets its share
    wait, fault = rng.uniform(0, seconds / 2), f"{rng.choices(faults.POINTS, rarely)[0]}:{rng.randint(1, 2)}"
    environment = {"GROWKIT_FAULT": fault} if plan == AT_FAULT else {}
    logged = run.metrics.stat().st_mtime_ns if run.metrics.exists() else None
    child = support.start_child(*words, env=environment)
    child.join(wait if plan == AT_TIME else STUCK_SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        if plan != AT_TIME:
            raise Difference(f"`growkit {words[0]}` was still running after {STUCK_SECONDS:.0f} s")
    tally.attempts += 1
    check_steps(run, step)
    if child.exitcode == 0:
        return True
    if child.exitcode != -signal.SIGKILL:
        raise Difference(f"`growkit {words[0]}` ended with exit code {child.exitcode}")
    if plan == AT_FAULT:
        tally.fault_kills[fault.partition(":")[0]] += 1
    untouched = logged == (run.metrics.stat().st_mtime_ns if run.metrics.exists() else None)
    tally.kills[phase(run, untouched, base, unfinished(run) - before)] += 1
    lost = (last_step(run) or 0) - (newest(run) or 0)
    tally.recomputed.append(max(0, lost))
    if lost > SAVE_EVERY:
        raise Difference(f"a kill costs {lost} steps, more than the {SAVE_EVERY} between two checkpoints")
    return False


def clear_away(run: RunFolder) -> None:
    """Killed before its folder got its mark, a run is none yet: growkit must say so, and the folder must go. Marked but
    without a checkpoint, it starts again where it is when it is resumed."""
    code, _, errors = support.cli("resume", run.path)
    if code != 2 or "[not-a-run]" not in errors:
        raise Difference(f"resuming a folder without a mark ended with exit code {code}: {errors}")
    shutil.rmtree(run.path)


def newest(run: RunFolder) -> int | None:
    return max(run.steps(), default=None)


def last_step(run: RunFolder) -> int | None:
    return max((r["step"] for r in log(run) if r["kind"] == "step"), default=None)


def log(run: RunFolder) -> list[Record]:
    return list(read_log(run.metrics)) if run.metrics.exists() else []


def unfinished(run: RunFolder) -> set[tuple[str, int]]:
    """Checkpoints that are being written, told apart by when they were begun."""
    if not run.checkpoints.is_dir():
        return set()
    found = run.checkpoints.glob(f"{store.WRITING}*")
    return {(path.name, path.stat().st_mtime_ns) for path in found}


def check_steps(run: RunFolder, resumed_from: int | None) -> None:
    """The log holds every step once, whatever was rewound. Raises Difference."""
    steps = [record["step"] for record in log(run) if record["kind"] == "step"]
    if steps != list(range(1, len(steps) + 1)) or len(steps) < (resumed_from or 0):
        raise Difference(f"the log's steps are {steps} after going on from {resumed_from}")


def phase(run: RunFolder, untouched: bool, base: int, writing: set[tuple[str, int]]) -> str:
    """What the process was doing when it died, as far as its folder shows."""
    if writing:
        return "saving"
    if untouched or not run.metrics.exists() or run.metrics.stat().st_size <= base:
        return "starting" if newest(run) is None else "resuming"
    last = log(run)[-1:]
    if not last or last[0]["kind"] == "ngram":
        return "starting"
    names = ("first", "tokens", "deeper")
    stage = names[last[0]["stage"]]
    return f"training, stage {stage}" if last[0]["kind"] in ("step", "validation") else f"entering stage {stage}"


def compare(whole: RunFolder, killed: RunFolder) -> None:
    """Every record, the final manifest, weights and moments, bitwise. Raises Difference naming the first one."""
    expected, got = ([{k: v for k, v in r.items() if k not in MEASURED} for r in log(run)] for run in (whole, killed))
    for one, other in zip(expected, got):
        for key in one.keys() | other.keys():
            if one.get(key) != other.get(key):
                at = f"{one['kind']} record of step {one['step']}"
                raise Difference(f"{at}: {key} is {other.get(key)!r} instead of {one.get(key)!r}")
    if len(expected) != len(got):
        raise Difference(f"the log has {len(got)} records instead of {len(expected)}")
    if newest(whole) != newest(killed):
        raise Difference(f"the last checkpoint is of step {newest(killed)} instead of {newest(whole)}")
    compare_checkpoints(whole.load(), killed.load())


def compare_checkpoints(expected: Checkpoint, got: Checkpoint) -> None:
    one, other = expected.manifest, got.manifest
    for name in ("model", "progress", "born", "adam_steps", "lineage", "rng", "corpus", "environment"):
        if getattr(one, name) != getattr(other, name):
            raise Difference(f"the final manifest: {name} is {getattr(other, name)} instead of {getattr(one, name)}")
    tables = (
        (expected.state.params, got.state.params),
        (store.flat_moments(expected.state.moments), store.flat_moments(got.state.moments)),
    )
    for wanted, held in tables:
        if list(wanted) != list(held):
            raise Difference("the final checkpoint holds other tensors")
        for name in wanted:
            a, b = wanted[name], held[name]
            if a.dtype != b.dtype or a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes():
                raise Difference(f"the final checkpoint: {name} differs")


def report(tally: Tally, seconds: float, seed: int, output: Path) -> None:
    def table(title: str, counts: Counter[str], keys: list[str]) -> None:
        print(f"\n{title:<36}{'kills':>6}")
        for key in keys:
            print(f"  {key:<34}{counts[key]:>6}")

    print(f"\n{tally.killed} kills, {tally.runs} runs, {tally.attempts} processes, {seconds:.0f} s")
    print("every record, weight and moment is bitwise that of the uninterrupted run")
    table("phase", tally.kills, sorted(tally.kills))
    table("fault point", tally.fault_kills, list(faults.POINTS))
    worst, mean = max(tally.recomputed, default=0), sum(tally.recomputed) / max(1, len(tally.recomputed))
    print(f"\nsteps recomputed after a kill: {worst} at most, {mean:.1f} on average; save interval {SAVE_EVERY}")
    print(f"times a run started again, killed before its first checkpoint: {tally.restarts}")
    result = {
        "identical": True,
        "kills": tally.killed,
        "runs": tally.runs,
        "processes": tally.attempts,
        "started_again": tally.restarts,
        "seed": seed,
        "seconds": round(seconds, 1),
        "kills_by_phase": dict(sorted(tally.kills.items())),
        "kills_by_fault_point": {point: tally.fault_kills[point] for point in faults.POINTS},
        "save_interval_steps": SAVE_EVERY,
        "steps_recomputed": {"max": worst, "mean": round(mean, 2)},
        "environment": hardware.environment("cpu", torch.float32, 1),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    sys.exit(main())
