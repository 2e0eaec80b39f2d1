"""What the machine at hand is and can do."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from typing import Any

import lightning
import torch

from growkit import __version__
from growkit.config.recipe import TrainerConfig
from growkit.errors import ConfigError
from growkit.models.config import FLOPS_CONVENTION


def process_rank() -> int:
    """This process's number in a distributed run, as launchers tell it; 0 alone."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def accelerator(trainer: TrainerConfig) -> str:
    """``cpu`` or ``cuda``. Raises ConfigError for a cuda that is not there."""
    if trainer.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if trainer.accelerator == "cuda" and not torch.cuda.is_available():
        mend = "use cpu or auto, or install a CUDA build of torch"
        raise ConfigError("no-such-device", "is not available", key="trainer.accelerator", value="cuda", mend=mend)
    return trainer.accelerator


def training_dtype(trainer: TrainerConfig) -> torch.dtype:
    """bfloat16 (autocast) or float32; ``auto`` takes bfloat16 where matrix units multiply it."""
    if trainer.precision != "auto":
        return torch.bfloat16 if trainer.precision == "bf16" else torch.float32
    if accelerator(trainer) == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def measure_peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product in ``dtype``: the best of a few, about a tenth of a second on a CPU."""
    size = 8192 if device == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_bytes(device: str) -> int:
    """Largest memory held so far: allocated on the GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: str, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """What bitwise reproduction depends on, recorded in every checkpoint."""
    return {
        "growkit": __version__,
        "flops_convention": FLOPS_CONVENTION,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }
