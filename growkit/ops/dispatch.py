"""Which path of an op runs: said by name, logged once, never guessed silently.

| backend | |
|---|---|
| reference | the definition, everywhere |
| compiled | the fast path of torch calls or C++, everywhere |
| triton | kernels for GPUs of NVIDIA and AMD; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1), for tests |
| auto | compiled; triton for tensors on a GPU, where there is one, once ``PROVEN`` |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch

from growkit.errors import ConfigError
from growkit.ops.tiling import PROVEN

BACKENDS = ("auto", "triton", "compiled", "reference")
OLDEST = (8, 0)  # compute capability of the GPUs of NVIDIA that Triton is made for
KEY = "trainer.backend"
Path = TypeVar("Path", bound=Callable[..., Any])
log = logging.getLogger(__name__)


def choose(op: str, backend: str, paths: Mapping[str, Path], triton: Callable[[], Path]) -> Path:
    """The path of ``op`` that ``backend`` means: one of ``paths``, or what ``triton`` loads. Raises ConfigError."""
    chosen = resolve_backend(op, backend)
    if chosen != "triton":
        return paths[chosen]
    kernels, compiled = triton(), paths["compiled"]
    if backend == "triton":
        return kernels

    @wraps(kernels)
    def by_device(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """A machine with a GPU also runs small things on its CPU."""
        return (kernels if x.is_cuda else compiled)(x, *rest, **named)

    return cast(Path, by_device)


@cache
def resolve_backend(op: str, backend: str) -> str:
    """The path that ``backend`` means for ``op``; ``auto`` is the fastest one present. Raises ConfigError."""
    if backend not in BACKENDS:
        mend = f"allowed: {', '.join(BACKENDS)}"
        raise ConfigError("unknown-choice", "is not a backend", key=KEY, value=backend, mend=mend)
    chosen, why = backend, ""
    if backend == "auto":
        missing = triton_lacks()
        chosen = "triton" if PROVEN and not missing else "compiled"
        if chosen == "triton":
            why = " for tensors on a GPU, on the compiled path for others"
        elif not missing:
            why = f"; Triton's kernels, which have not been tried on a GPU yet, run with {KEY}=triton"
    elif backend == "triton":
        missing = None if interpreted() else triton_lacks()
        if missing:
            problem, mend = missing
            others = f"or take {KEY}=auto, compiled or reference"
            raise ConfigError("no-triton", problem, key=KEY, value=backend, mend=f"{mend}, {others}")
    log.info("op %s runs on the %s path%s", op, chosen, why)
    return chosen


def triton_lacks() -> tuple[str, str] | None:
    """What stands in the way of Triton's kernels here, and the mend; None where they run."""
    if find_spec("triton") is None:
        return "needs the package triton", "install it: pip install 'growkit[gpu]'"
    if not torch.cuda.is_available():  # which ROCm answers too
        return "needs a GPU of NVIDIA or AMD, and torch sees none", "run where torch.cuda.is_available() is true"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < OLDEST:
        found = ".".join(map(str, capability))
        return f"needs compute capability 8.0, and this GPU has {found}", "run on a later GPU"
    return None


def interpreted() -> bool:
    """Whether kernels that are loaded now run in Triton's interpreter, on a CPU."""
    if not os.environ.get("TRITON_INTERPRET") or find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
