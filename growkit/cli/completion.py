"""What the shell completes."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    from growkit.cli.recipes import built_in

    return [name for name in built_in() if name.startswith(incomplete)]  # files: the shell's own completion


def override_keys(incomplete: str) -> list[str]:
    from growkit.config.load import keys

    return [f"{key}=" for key in keys() if key.startswith(incomplete)]


def hardware_names(incomplete: str) -> list[str]:
    from growkit.planner.hardware import HARDWARE, THIS_MACHINE

    return [name for name in (THIS_MACHINE, *HARDWARE) if name.startswith(incomplete)]
