"""Which path of an op runs: said by name, logged once, never guessed silently."""

from __future__ import annotations

import logging
from functools import cache

from growkit.errors import ConfigError

BACKENDS = ("auto", "compiled", "reference")
log = logging.getLogger(__name__)


@cache
def resolve_backend(op: str, backend: str) -> str:
    """The path that ``backend`` means for ``op``; ``auto`` is the fastest one present. Raises ConfigError."""
    if backend not in BACKENDS:
        mend = f"allowed: {', '.join(BACKENDS)}"
        raise ConfigError("unknown-choice", "is not a backend", key="trainer.backend", value=backend, mend=mend)
    chosen = "compiled" if backend == "auto" else backend
    log.info("op %s runs on the %s path", op, chosen)
    return chosen
