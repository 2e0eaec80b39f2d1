"""What training runs on, in the figures a plan needs: speed, memory, price, power. No torch here.

Peaks are dense (without sparsity) and come from the makers' data sheets and white papers: with matrix units for bf16,
without them for fp32, since growkit leaves float32 products in full precision. Memory is the nominal size in 10^9
bytes; drivers and the allocator take some of it. Watts are the board's limit. Prices are examples only: round figures
within what public on-demand lists asked in spring 2026, which are several times apart from each other; say your own.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.config.recipe import HardwareConfig, TrainerConfig
from growkit.errors import ConfigError, cannot_write
from growkit.registry import Registry, closest

THIS_MACHINE = "this-machine"
GB = 1e9
# Of the peak that a well-filled GPU trains at (PaLM reports 46 % on its chips, arXiv 2204.02311, table 3). A small
# model reaches a fraction of it: there, measure.
EXPECTED = {"bf16": 0.4, "fp32": 0.5}


@dataclass(frozen=True)
class Hardware:
    """One device. ``peaks``: precision → FLOP/s; ``utilisations``: precision → expected share of the peak.

    ``memory_bytes``, ``price_per_hour`` (US dollars) and ``watts`` are None where unknown. ``source``: where the
    figures are from. ``automatic``: the precision that trainer.precision=auto means there.
    """

    name: str
    peaks: Mapping[str, float]
    utilisations: Mapping[str, float]
    memory_bytes: float | None
    price_per_hour: float | None
    watts: float | None
    source: str
    cuda: bool = True
    automatic: str = "bf16"

    def precision(self, trainer: TrainerConfig) -> str:
        """``bf16`` or ``fp32``."""
        return trainer.precision if trainer.precision != "auto" else self.automatic

    def flops_per_second(self, precision: str) -> float:
        """What training is expected to reach on one device. Raises ConfigError where there is no such figure."""
        if precision not in self.peaks:
            mend = f"use trainer.precision={next(iter(self.peaks))}, or say hardware.peak_flops_per_second"
            if self.name == THIS_MACHINE:
                mend = f"run growkit plan RECIPE trainer.precision={precision} --measure"
            problem = f"has no {precision} figure for {self.name}"
            raise ConfigError("no-peak", problem, key="trainer.precision", value=precision, mend=mend)
        return self.peaks[precision] * self.utilisations[precision]


HARDWARE: Registry[Hardware] = Registry("hardware")


def _preset(
    name: str,
    bf16: float | None,
    fp32: float,
    memory: float,
    watts: float,
    price: float,
    source: str,
) -> None:
    """Registers a preset: teraFLOP/s, GB, watts, dollars an hour."""
    peaks = {"fp32": fp32 * 1e12} | ({"bf16": bf16 * 1e12} if bf16 is not None else {})
    automatic = "bf16" if bf16 is not None else "fp32"
    made = Hardware(name, peaks, EXPECTED, memory * GB, price, watts, source, automatic=automatic)
    HARDWARE.register(name)(made)


_preset("t4", None, 8.1, 16, 70, 0.35, "NVIDIA T4 data sheet")
_preset("v100", None, 15.7, 16, 300, 0.60, "NVIDIA V100 data sheet, SXM2")
_preset("a100-40gb", 312, 19.5, 40, 400, 1.30, "NVIDIA A100 data sheet, SXM4")
_preset("a100-80gb", 312, 19.5, 80, 400, 1.50, "NVIDIA A100 data sheet, SXM4")
_preset("a10", 125, 31.2, 24, 150, 0.75, "NVIDIA A10 data sheet")
_preset("l4", 121, 30.3, 24, 72, 0.70, "NVIDIA L4 data sheet")
_preset("l40s", 362, 91.6, 48, 350, 1.10, "NVIDIA L40S data sheet")
_preset("rtx-3090", 71, 35.6, 24, 350, 0.30, "NVIDIA GA102 white paper, bf16 with float32 sums")
_preset("rtx-4090", 165.2, 82.6, 24, 450, 0.45, "NVIDIA Ada white paper, bf16 with float32 sums")
_preset("rtx-5090", 209.5, 104.8, 32, 575, 0.70, "NVIDIA RTX Blackwell white paper, bf16 with float32 sums")
_preset("h100-pcie", 756, 51, 80, 350, 2.20, "NVIDIA H100 data sheet, PCIe")
_preset("h100-sxm", 989, 67, 80, 700, 2.95, "NVIDIA H100 data sheet, SXM5")
_preset("h200", 989, 67, 141, 700, 3.80, "NVIDIA H200 data sheet, SXM")
_preset("b200", 2250, 75, 180, 1000, 5.50, "NVIDIA HGX B200 data sheet")
_preset("mi300x", 1307, 163.4, 192, 750, 3.00, "AMD Instinct MI300X data sheet")


def measurement_file() -> Path:
    """Where ``growkit plan --measure`` keeps what it found."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "growkit" / "hardware.json"


def this_machine() -> Hardware | None:
    """The machine at hand as it was measured; None if it was not. Raises ConfigError for a file that is damaged."""
    path = measurement_file()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    try:
        found = json.loads(text)
        peaks, shares = (_figures(found[name]) for name in ("peaks", "utilisations"))
        if peaks.keys() != shares.keys() or found["automatic"] not in ("bf16", "fp32"):
            raise ValueError("its precisions do not go together")
        return Hardware(
            THIS_MACHINE,
            peaks,
            shares,
            float(found["memory_bytes"]),
            price_per_hour=None,
            watts=None,
            source=str(found["source"]),
            cuda=bool(found["cuda"]),
            automatic=found["automatic"],
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _figures(found: Any) -> dict[str, float]:
    figures = {str(name): float(value) for name, value in found.items()}
    if not figures or not all(value > 0 for value in figures.values()):
        raise ValueError("its figures are not above zero")
    return figures


def _damaged(path: Path, why: str) -> ConfigError:
    mend = "delete it, and run growkit plan RECIPE --measure"
    return ConfigError("bad-measurement", f"is not a measurement of this machine ({why})", key=str(path), mend=mend)


def keep(measured: Hardware) -> Path:
    """Writes what ``this_machine`` reads back, whole or not at all; a precision measured earlier on the same device
    stays. Raises CheckpointError."""
    path = measurement_file()
    record = {
        "peaks": dict(measured.peaks),
        "utilisations": dict(measured.utilisations),
        "memory_bytes": measured.memory_bytes,
        "cuda": measured.cuda,
        "automatic": measured.automatic,
        "source": measured.source,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".writing-{os.getpid()}")
        beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def hardware(config: HardwareConfig, name: str | None = None) -> Hardware | None:
    """What a recipe's ``hardware`` section means; ``name`` stands in the place of its preset. None if nothing is said
    and this machine was not measured. Raises ConfigError."""
    key = "--hardware" if name is not None else "hardware.preset"
    wanted = name if name is not None else config.preset
    if wanted in (None, THIS_MACHINE):
        base = this_machine()
        if base is None and wanted is not None:
            mend = "run growkit plan RECIPE --measure"
            raise ConfigError("not-measured", "has not been measured", key=key, value=wanted, mend=mend)
    elif wanted in HARDWARE:
        base = HARDWARE.get(wanted, key=key)
    else:
        mend = closest(wanted, [*HARDWARE, THIS_MACHINE])
        raise ConfigError("unknown-choice", "is not a known hardware", key=key, value=wanted, mend=mend)
    if base is None:
        if config.peak_flops_per_second is None:
            return None
        base = Hardware("hardware of the recipe", {}, EXPECTED, None, None, None, "the recipe")
    return _overridden(base, config)


def _overridden(base: Hardware, config: HardwareConfig) -> Hardware:
    peak, share = config.peak_flops_per_second, config.utilisation
    both = ("bf16", "fp32")
    return dataclasses.replace(
        base,
        peaks=dict.fromkeys(both, peak) if peak is not None else base.peaks,
        utilisations=dict.fromkeys(both, share) if share is not None else EXPECTED | dict(base.utilisations),
        memory_bytes=config.memory_gb * GB if config.memory_gb is not None else base.memory_bytes,
        price_per_hour=config.price_per_hour if config.price_per_hour is not None else base.price_per_hour,
        watts=config.watts if config.watts is not None else base.watts,
    )
