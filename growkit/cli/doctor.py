"""``growkit doctor``: what this machine has, what is missing, and what to do about each."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit import __version__
from growkit.config.recipe import TrainerConfig
from growkit.duration import quantity
from growkit.ops.dispatch import resolve_backend
from growkit.ops.native import find_compiler
from growkit.ops.pattention import native as pattention
from growkit.ops.selective_scan import native as scan
from growkit.train import hardware

FINE, NOTE, PROBLEM = "ok", "note", "problem"
LEAST_DISK, LEAST_MEMORY = 2e9, 2e9  # bytes: a few checkpoints of a small model; torch, data and a small model
REQUIRED = ("lightning", "datasets", "omegaconf", "safetensors", "matplotlib", "plotly", "wandb")
# What does without it: the extra that brings it, and what it is for.
OPTIONAL = {
    "transformers": ("hf", "data.tokenizer and models of other libraries"),
    "tensorboard": ("tensorboard", "logger.kind=tensorboard"),
    "wandb-workspaces": ("workspaces", "the prepared W&B workspace"),
}


@dataclass(frozen=True)
class Finding:
    """``state``: ok, note (works, could be better) or problem. ``mend``: what to do, empty if nothing."""

    about: str
    found: str
    state: str = FINE
    mend: str = ""


def examine(folder: Path, *, as_json: bool) -> int:
    """Prints what there is; the exit code is 1 if anything is a problem."""
    findings = [*_software(), *_processor(), *_graphics(), *_room(folder), *_logging()]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        table = Table("", "what", "found", "what to do")
        signs = {FINE: "[green]ok[/green]", NOTE: "[yellow]note[/yellow]", PROBLEM: "[red]problem[/red]"}
        for finding in findings:
            table.add_row(signs[finding.state], finding.about, escape(finding.found), escape(finding.mend))
        Console(highlight=False).print(table)
    return int(any(finding.state == PROBLEM for finding in findings))


def _software() -> Iterator[Finding]:
    yield Finding("growkit", f"{__version__}, Python {platform.python_version()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", f"{torch.__version__}, {build}")
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    yield Finding("libraries", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    for name in (name for name, version in versions.items() if version is None):
        if name in REQUIRED:
            yield Finding(name, "missing", PROBLEM, "install growkit again: pip install growkit")
        else:
            extra, use = OPTIONAL[name]
            yield Finding(name, "not installed", NOTE, f"for {use}: pip install 'growkit[{extra}]'")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> Iterator[Finding]:
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere: macOS has none
    cores, threads = len(affinity(0)) if affinity else os.cpu_count() or 1, torch.get_num_threads()
    state, mend = FINE, ""
    if threads > cores:
        state, mend = NOTE, f"set run.threads={cores}: more threads than cores are slower"
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("processor", f"{cores} cores, {threads} threads, {capability}", state, mend)
    speeds = {dtype: hardware.measure_peak_flops("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)}
    chosen = hardware.training_dtype(TrainerConfig(accelerator="cpu"))
    found = ", ".join(f"{_name(dtype)} {quantity(speed)}FLOP/s" for dtype, speed in speeds.items())
    found += f"; precision auto takes {_name(chosen)} on the CPU"
    best = max(speeds, key=lambda dtype: speeds[dtype])
    if best != chosen and speeds[best] > 1.5 * speeds[chosen]:
        short = "bf16" if best == torch.bfloat16 else "fp32"
        yield Finding("matrix products", found, NOTE, f"try trainer.precision={short}")
    else:
        yield Finding("matrix products", found)
    paths = (f"{op}: auto takes {resolve_backend(op, 'auto')}" for op in ("pattention", "selective_scan"))
    yield Finding("kernels", "; ".join(paths))
    yield _cpu_kernels()


def _cpu_kernels() -> Finding:
    """Whether the kernels for the CPU are there, which are built here if they never were."""
    about = "kernels for the CPU"
    slower = "torch calls, several times slower for Mamba's scan and a little for Pattention"
    compiler = find_compiler()
    if compiler is None:
        return Finding(about, slower, NOTE, "install a C++ compiler (g++ or clang++), or name one in $CXX")
    if None in (scan.kernel(), pattention.kernel()):
        mend = f"{compiler} cannot build them: the log above says why; name another in $CXX"
        return Finding(about, slower, NOTE, mend)
    return Finding(about, f"built by {compiler}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _graphics() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found = f"{device.name}, {quantity(device.total_memory)}B, compute capability {device.major}.{device.minor}"
            yield Finding(f"GPU {index}", found)
        return
    if shutil.which("nvidia-smi"):
        mend = "install a CUDA build of torch (pytorch.org says which fits the driver)"
        yield Finding("GPU", "a driver is installed, but torch sees no GPU", PROBLEM, mend)
    else:
        yield Finding("GPU", "none", NOTE, "small models train on the CPU; recipes run unchanged on a GPU")


def _available_memory() -> int | None:
    """Bytes that programs can still have, as Linux tells it; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _logging() -> Iterator[Finding]:
    if _version("wandb") is None:  # said above
        return
    from growkit.train.loggers.wandb import has_key

    if has_key():
        yield Finding("Weights & Biases", "a key is there: logger.kind=wandb goes online")
    else:
        mend = "to go online: wandb login; `growkit sync RUN` sends a run later"
        yield Finding("Weights & Biases", "no key, or told to stay offline: logger.kind=wandb writes files", NOTE, mend)


def _writable(place: Path) -> bool:
    """Tried, not asked: of /proc or a read-only disk, permissions say nothing to root."""
    try:
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


def _room(folder: Path) -> Iterator[Finding]:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _available_memory()
    found = f"{quantity(whole)}B" if available is None else f"{quantity(available)}B free of {quantity(whole)}B"
    if available is not None and available < LEAST_MEMORY:
        yield Finding("memory", found, NOTE, "close something, or use trainer.checkpoint_layers and small batches")
    else:
        yield Finding("memory", found)
    place = folder.absolute()
    while not place.exists():  # as a run would, the folder may still have to be made
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{quantity(free)}B free at {place}"
    if not _writable(place):
        mend = "name a folder with run.folder that can be written to"
        yield Finding("disk", f"{place} cannot be written to", PROBLEM, mend)
    elif free < LEAST_DISK:
        mend = "free space, or set run.folder; trainer.keep_last says how many checkpoints stay"
        yield Finding("disk", found, PROBLEM, mend)
    else:
        yield Finding("disk", found)
