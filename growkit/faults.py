"""Named points at which a test may kill the process, to show that nothing is lost there.

``GROWKIT_FAULT=before_rename:2`` kills (SIGKILL, no clean-up) the second time ``before_rename`` is reached;
``GROWKIT_FAULT_LOG`` names a file that each kill is appended to, so that a test can count hits.
Unset, a point costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "mid_preparation",
    "mid_shard",
    "before_rename",
    "after_rename",
    "mid_growth",
    "first_step_after_growth",
    "mid_validation",
    "mid_probe",
)
_reached: dict[str, int] = {}


def point(name: str) -> None:
    """Marks the fault point ``name``; dies here when the environment asks for it."""
    assert name in POINTS, name
    wanted = os.environ.get("GROWKIT_FAULT")
    if not wanted:
        return
    target, _, nth = wanted.partition(":")
    if target != name:
        return
    _reached[name] = _reached.get(name, 0) + 1
    if _reached[name] == int(nth or 1):
        log = os.environ.get("GROWKIT_FAULT_LOG")
        if log:
            with open(log, "a") as file:
                file.write(name + "\n")
        os.kill(os.getpid(), signal.SIGKILL)
