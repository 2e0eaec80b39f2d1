"""Kernels in C++: built once for this machine by the system's compiler, then loaded from a cache.

The cache is ``growkit/kernels`` in $XDG_CACHE_HOME or ~/.cache. A library's name is a hash of its source, the compiler,
its flags and the processor's features, so that none is ever taken for another. It is written beside and renamed:
processes that build at once each write a whole one, and the last stays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

K = TypeVar("K")
log = logging.getLogger(__name__)
SHARED = Path(__file__).with_name("lanes.h")  # what sources include
COMPILERS = ("c++", "g++", "clang++")
# Nothing of -ffast-math: the polynomials need their roundings, and NaN must stay NaN.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared", "-pthread")


def loaded(source: Path, kernel: Callable[[Path], K], instead: str) -> K | None:
    """``kernel`` of the library made of ``source``, built if this machine has not built it yet; None, and a line in the
    log that says what there is ``instead``, where it cannot be."""
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C++ compiler (%s, or $CXX): %s", ", ".join(COMPILERS), instead)
        return None
    try:
        return _load(compiler, source, kernel)
    except subprocess.CalledProcessError as error:
        log.warning("%s cannot build the kernel: %s. It said: %s", compiler, instead, error.stderr.strip()[-2000:])
    except OSError as error:
        log.warning("the kernel cannot be kept or loaded (%s): %s", error, instead)
    return None


def find_compiler() -> str | None:
    """$CXX, or the first of ``COMPILERS`` that is there."""
    named = os.environ.get("CXX")
    found = (shutil.which(name) for name in ((named,) if named else COMPILERS))
    return next((path for path in found if path), None)


def place(compiler: str, source: Path) -> Path:
    """Where the library is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "growkit" / "kernels"
    return folder / f"{source.parent.name}-{_key(compiler, source)}.so"


def _load(compiler: str, source: Path, kernel: Callable[[Path], K]) -> K:
    """Raises CalledProcessError if the compiler fails, OSError if the disk or the loader does."""
    path = place(compiler, source)
    if path.exists():
        try:
            return kernel(path)
        except (OSError, AttributeError) as error:
            log.warning("%s is damaged (%s): built again", path, error)
    build(compiler, source, path)
    return kernel(path)


def build(compiler: str, source: Path, path: Path) -> None:
    """Compiles into ``path``; whoever looks there finds nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.info("building %s with %s", path.name, compiler)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as beside:
        made = Path(beside) / path.name
        version = _version(compiler)
        command = [compiler, *_flags(version), str(source), *map(str, _openmp(version)), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(path)


def _flags(version: str) -> tuple[str, ...]:
    """For this very processor, whose features are part of the name in the cache."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    openmp = ("-fopenmp", "-Wl,--as-needed") if _openmp(version) else ()
    return (*FLAGS, *openmp, f"-I{SHARED.parent}", "-mcpu=native" if arm else "-march=native")


def _openmp(version: str) -> list[Path]:
    """torch's own OpenMP, where it is GCC's and so is the compiler. It is linked by name: a second one would bring
    threads of its own, which wait for torch's, as those spin between calls."""
    if sys.platform != "linux" or "Free Software Foundation" not in version:
        return []
    return sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))[:1]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def _key(compiler: str, source: Path) -> str:
    version = _version(compiler)
    texts = (text.read_text(encoding="utf-8") for text in (source, SHARED))
    flags = (flag for flag in _flags(version) if not flag.startswith("-I"))  # the same wherever growkit lies
    libraries = (path.name for path in _openmp(version))
    parts = (*texts, compiler, version, *flags, *libraries, platform.machine(), _features())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _features() -> str:
    """What the processor can do, as Linux lists it; elsewhere as torch does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    listed = (line for line in lines if line.lower().startswith(("flags", "features")))
    return next(listed, f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}")
