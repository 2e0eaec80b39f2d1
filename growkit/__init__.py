"""growkit: train a language model by growing it.

In a training loop of your own: ``from growkit import grow`` (growth/loop.py).
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``grow`` loads torch, which most commands do without."""
    if name == "grow":
        from growkit.growth.loop import grow

        return grow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
