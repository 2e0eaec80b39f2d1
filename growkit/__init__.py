"""growkit: train a language model by growing it.

In a training loop of your own: ``from growkit import grow`` (growth/loop.py). In transformers, once growkit is
imported: ``AutoModelForCausalLM.from_pretrained`` reads what ``growkit export`` wrote (checkpoint/hf/auto.py).
"""

from typing import Any

from growkit.checkpoint.hf.register import register as _register

__version__ = "0.1.0"
_register()


def __getattr__(name: str) -> Any:
    """``grow`` loads torch, which most commands do without."""
    if name == "grow":
        from growkit.growth.loop import grow

        return grow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
