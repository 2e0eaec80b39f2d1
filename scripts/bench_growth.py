"""What growing a checkpoint takes: memory and time of ``growkit grow``, beside the disk's own copy speed.

    python scripts/bench_growth.py --folder /big/disk [--cases 100M:depth 1.3B:mlp]

A checkpoint of the asked size (weights and both moments, float32, random) is written, then grown in a fresh process
with its certificate, then both are removed. Memory is RssAnon of /proc/self/status, read every 10 ms: what the kernel
cannot take back; pages of mapped files are not in it. The disk is measured by copying the grown checkpoint, file by
file, each fsynced and removed; the source's files and those that are copied are dropped from the page cache before (the
kernel's word: it may keep some). A speed is bytes of the grown checkpoint per second, for growing and for copying.
Files that stay what they were are linked, not written: how many bytes that is is said beside it. Growth in depth leaves
most files so, mlp and width none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from growkit.checkpoint import manifest, store
from growkit.checkpoint.manifest import Manifest
from growkit.cli import growing
from growkit.growth.path import grown_config
from growkit.growth.state import Moments, TrainState
from growkit.models.config import ModelConfig
from growkit.models.presets import PRESETS
from growkit.models.spec import INIT_STD, param_specs
from growkit.schedule.progress import Progress

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
GOAL_SHARE = 0.6  # of the disk's copy speed
GOAL_BYTES = 2 << 30  # RssAnon, at its peak
SAMPLE_SECONDS = 0.01
SIZES: dict[str, dict[str, int]] = {
    "10M": {"vocab_size": 8192, "embed_dim": 256, "num_layers": 10, "num_heads": 4},
    "100M": {"vocab_size": 32768, "embed_dim": 640, "num_layers": 16, "num_heads": 10},
    "1.3B": {"vocab_size": 32768, "embed_dim": 2048, "num_layers": 24, "num_heads": 16},
}
GROWTHS: dict[str, Callable[[ModelConfig], list[str]]] = {
    "depth": lambda config: [f"num_layers={2 * len(config.layers)}"],
    "width": lambda config: [f"embed_dim={config.embed_dim * 3 // 2}"],
    "mlp": lambda config: [f"mlp_dim={2 * config.layers[0].mlp.dim}"],  # type: ignore[union-attr]
}
CASES = ["10M:depth", "100M:depth", "1.3B:depth", "1.3B:mlp"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    cases = [f"{size}:{growth}" for size in SIZES for growth in GROWTHS]
    parser.add_argument(
        "--cases", nargs="+", choices=cases, default=CASES, help="SIZE:GROWTH (depth: twice the layers)"
    )
    parser.add_argument("--probe-tokens", type=int, default=64, help="of the certificate (default: growkit grow's)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/bench_growth.json")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_grow_here(options.child)))
        return
    from growkit.train import hardware  # it loads lightning, which `growkit grow` does not

    rows = []
    print(f"{'case':>10}{'parameters':>30}{'GB':>16}{'linked':>9}{'peak MiB':>11}", end="")
    print(f"{'copy GB/s':>14}{'grow':>9}{'of copy':>9}{'seconds':>9}")
    for case in options.cases:
        size, growth = case.split(":")
        config = PRESETS.get("transformer", key="")(**SIZES[size]).written_out()
        row = {"size": size, "growth": growth} | measure(config, growth, options.probe_tokens, options.folder)
        rows.append(row)
        print(
            f"{case:>10}{row['parameters'][0]:>14,} → {row['parameters'][1]:>11,}"
            f"{row['source_bytes'] / 1e9:>7.2f} → {row['grown_bytes'] / 1e9:>5.2f}{row['linked_bytes'] / 1e9:>9.2f}"
            f"{row['peak_anonymous_bytes'] / 2**20:>11.0f}"
            f"{row['copy_bytes_per_second']['before'] / 1e9:>7.2f}{row['copy_bytes_per_second']['after'] / 1e9:>7.2f}"
            f"{row['grow_bytes_per_second'] / 1e9:>9.3f}{row['share_of_copy_speed']:>9.2f}"
            f"{row['seconds']['all']:>9.1f}",
            flush=True,
        )
    result = {
        "goal": {"share_of_copy_speed": GOAL_SHARE, "peak_anonymous_bytes": GOAL_BYTES},
        "probe_tokens": options.probe_tokens,
        "machine": {"cores": os.cpu_count(), "usable_cores": len(os.sched_getaffinity(0))}
        | {"threads": torch.get_num_threads(), "load_of_the_last_minute": os.getloadavg()[0]}
        | hardware.environment("cpu", torch.float32, 1),
        "models": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.output}")


def measure(config: ModelConfig, growth: str, probe_tokens: int, folder: Path) -> dict[str, Any]:
    """One source, one growth; everything that was written is removed."""
    words = GROWTHS[growth](config)
    name, _, value = words[0].partition("=")
    target = grown_config(config, {name: int(value)}, {})
    old, new = config.num_params(), target.num_params()
    largest = max(spec.numel for spec in param_specs(target).values())
    # Source, grown checkpoint, one file of a copy, the signs that the certificate maps; float32 throughout.
    needed = 12 * old + 12 * new + 4 * largest + store.SHARD_BYTES + new
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{folder}: has {free / 1e9:.0f} GB free, this takes up to {needed / 1e9:.0f}")
    with tempfile.TemporaryDirectory(prefix="bench-growth-", dir=folder) as temporary:
        source, grown = Path(temporary) / "source", Path(temporary) / "grown"
        write_source(source, config)
        before = copy_speed(source)
        evict(source)
        found = grow_in_fresh_process(source, grown, words, probe_tokens, Path(temporary))
        linked = sum(path.stat().st_size for path in grown.iterdir() if path.stat().st_nlink > 1)
        after = copy_speed(grown)
        written, seconds = size_of(grown), found["seconds"]["all"]
        return {
            "parameters": [old, new],
            "source_bytes": size_of(source),
            "grown_bytes": written,
            "linked_bytes": linked,
            "largest_tensor_bytes": 4 * largest,
            **found,
            "copy_bytes_per_second": {"before": before, "after": after},
            "grow_bytes_per_second": written / seconds,
            "share_of_copy_speed": written / seconds / after,
        }


def grow_in_fresh_process(
    source: Path, output: Path, targets: list[str], probe_tokens: int, temporary: Path
) -> dict[str, Any]:
    """Peak and baseline of RssAnon (bytes), VmHWM, and seconds of each part."""
    words = [str(source), str(output), str(probe_tokens), *targets]
    command = [sys.executable, __file__, "--child", *words]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}  # and what growkit.cli sets
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _grow_here(words: list[str]) -> dict[str, Any]:
    source, output, probe_tokens, *targets = words
    seconds: dict[str, float] = {}

    def timed(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def run(*given: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = function(*given, **options)
            seconds[part] = time.perf_counter() - begin
            return result

        setattr(owner, name, run)

    timed(manifest, "check_files", "check_of_the_source")
    timed(growing, "growth_report", "certificate")
    timed(store, "write_described", "grow_and_write")
    baseline = status("RssAnon")
    with Peak() as peak:
        begin = time.perf_counter()
        growing.grow_checkpoint(Path(source), targets, Path(output), 0, int(probe_tokens))
        seconds["all"] = time.perf_counter() - begin
    return {
        "peak_anonymous_bytes": peak.bytes,
        "anonymous_bytes_at_start": baseline,
        "peak_resident_bytes": status("VmHWM"),
        "seconds": {part: round(value, 2) for part, value in seconds.items()},
    }


class Peak:
    """Context: the largest RssAnon of this process, sampled by a thread."""

    def __init__(self) -> None:
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, status("RssAnon"))


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def write_source(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of ``config`` as training leaves one, every tensor drawn when it is written."""
    specs = param_specs(config)

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))

    def value(name: str) -> torch.Tensor:
        spec = specs[name]
        start = spec.starts_at() if spec.init_std is None else 0.0
        return torch.empty(spec.shape).normal_(start, spec.init_std or INIT_STD, generator=generator(name))

    def moments(name: str) -> Moments:
        own, shape = generator(f"moments of {name}"), specs[name].shape
        second = torch.empty(shape).normal_(0.0, 1e-4, generator=own).square_().add_(1e-10)
        return Moments(torch.empty(shape).normal_(0.0, 1e-4, generator=own), second, 1000.0)

    state = TrainState(config, Drawn(specs, value), Drawn(specs, moments))
    store.write(folder, state, Manifest(model=config, progress=Progress()))


class Drawn(Mapping[str, T]):
    """Drawn on access."""

    def __init__(self, names: Mapping[str, Any], draw: Callable[[str], T]) -> None:
        self._names, self._draw = names, draw

    def __getitem__(self, name: str) -> T:
        return self._draw(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def evict(folder: Path) -> None:
    """Asks the kernel to drop the files of ``folder`` from its cache."""
    for path in folder.iterdir():
        store.forget(path)


def copy_speed(folder: Path) -> float:
    """Bytes per second of copying the files of ``folder`` beside it, cold, each on the disk before the next."""
    evict(folder)
    copy, seconds = folder.with_name("copy"), 0.0
    for path in sorted(folder.iterdir()):
        begin = time.perf_counter()
        shutil.copyfile(path, copy)
        store.fsync(copy)
        seconds += time.perf_counter() - begin
        copy.unlink()
    return size_of(folder) / seconds


if __name__ == "__main__":
    main()
