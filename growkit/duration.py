"""Durations carry a unit: ``20M tokens``, ``500 steps``, ``3e15 flops``; spans may also be a share: ``2%``.

Wall-clock time is not a unit: it may stop a run, it never shapes one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from growkit.errors import ConfigError

UNITS = ("tokens", "steps", "flops")
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}
_PATTERN = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kMGBTP]?)\s*(tokens?|steps?|flops?|%)\s*$")
_MOST = 1e18  # tokens or steps: positions in the data are 64-bit integers
_MEND = "write an amount and a unit, such as '20M tokens', '500 steps' or '3e15 flops'"


@dataclass(frozen=True)
class Duration:
    """An amount of training. ``unit`` is one of UNITS, or ``share`` (amount in 0..1 of a whole)."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: object, *, key: str, share: bool = False) -> Duration:
        """Reads ``text``; ``share`` also admits per cent. Raises ConfigError naming ``key``."""
        mend = _MEND + (", or a share such as '2%'" if share else "")
        match = _PATTERN.match(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError("bad-duration", "is not a duration", key=key, value=text, mend=mend)
        number, scale, unit = match.groups()
        amount = float(number) * _SCALE[scale]
        if unit == "%":
            if not share or scale:
                raise ConfigError("bad-duration", "a share is not allowed here", key=key, value=text, mend=mend)
            if amount > 100:
                raise ConfigError("bad-duration", "is more than the whole", key=key, value=text, mend="use 0%..100%")
            return cls(amount / 100, "share")
        unit = unit if unit.endswith("s") else unit + "s"
        if not math.isfinite(amount) or (unit != "flops" and amount > _MOST):
            mend = "use a smaller amount"
            raise ConfigError("bad-duration", "is more than can be counted", key=key, value=text, mend=mend)
        if unit != "flops":
            if not math.isclose(amount, round(amount), rel_tol=1e-15):  # 16.1 · 1e3 is 16100.000000000002
                raise ConfigError("bad-duration", f"is not a whole number of {unit}", key=key, value=text, mend=mend)
            amount = float(round(amount))
        return cls(amount, unit)

    def steps(self, *, tokens_per_step: float, flops_per_step: float, whole: int = 0) -> int:
        """Optimizer steps that cover the duration: rounded up for tokens, to the nearest for FLOPs and shares."""
        if self.unit == "steps":
            return int(self.amount)
        if self.unit == "tokens":
            return math.ceil(self.amount / tokens_per_step)
        if self.unit == "flops":
            return round(self.amount / flops_per_step)
        return round(self.amount * whole)

    def __str__(self) -> str:
        """What ``parse`` reads back as the same duration."""
        if self.unit == "share":
            return f"{self.amount * 100:.15g}%"
        return f"{str(self.amount).removesuffix('.0')} {self.unit}"


def quantity(value: float) -> str:
    """1234567 → ``1.23M``."""
    for limit, suffix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"
