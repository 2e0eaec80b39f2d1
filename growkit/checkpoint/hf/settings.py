"""What a config.json says, value by value: wrong types and what growkit does not do are refused by name. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from growkit.errors import CheckpointError, ConfigError

T = TypeVar("T")
CONFIG = "config.json"
LARGEST = 1 << 30  # of whole numbers: two of a tensor's sizes make fewer bytes than can be counted
_REQUIRED: Any = object()


class Settings:
    """The values of one mapping of a config.json; ``where``: what to call it in an error."""

    def __init__(self, values: Mapping[str, Any], where: str = CONFIG) -> None:
        self.values, self.where = values, where

    def get(self, name: str, kind: type[T], default: T = _REQUIRED) -> T:
        """The value of ``name``, or ``default`` where it is missing or null. Raises ConfigError for another type."""
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(
                    "bad-model",
                    **self.at(name),
                    problem="is missing",
                    mend="use the config.json that came with the weights",
                )
            return default
        number = kind is float and isinstance(value, int | float)
        if isinstance(value, bool) != (kind is bool) or not (number or isinstance(value, kind)):
            raise ConfigError("bad-model", **self.at(name), problem=f"is no {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):  # of which JSON knows nothing, and Python's does
            raise ConfigError("bad-model", **self.at(name), problem="is no finite number")
        if kind is int and not isinstance(value, bool) and abs(value) > LARGEST:
            raise ConfigError("bad-model", **self.at(name), problem=f"must be at most {LARGEST}")
        return float(value) if number else value  # type: ignore[return-value]

    def positive(self, name: str, kind: type[T], default: T = _REQUIRED) -> T:
        value = self.get(name, kind, default)
        if not value > 0:  # type: ignore[operator]
            raise ConfigError("not-positive", **self.at(name), problem="must be above zero")
        return value

    def section(self, name: str) -> Settings | None:
        """The mapping ``name``; None where it is missing, null or empty."""
        found: dict[str, Any] = self.get(name, dict, {})
        return Settings(found, f"{self.where}: {name}") if found else None

    def refuse(self, name: str, problem: str, mend: str = "") -> ConfigError:
        """The error for a value that is sound but beyond growkit."""
        return ConfigError("not-supported", problem, **self.at(name), mend=mend)

    def at(self, name: str) -> dict[str, Any]:
        """Key and value of an error about ``name``."""
        return {"key": f"{self.where}: {name}", "value": self.values.get(name)}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in ``folder``. Raises CheckpointError."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        mend = "check its permissions and its disk"
        raise CheckpointError("unreadable", f"cannot be read ({error})", key=str(path), mend=mend) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("damaged", f"is not JSON ({error})", key=str(path), mend="fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError("damaged", "is not a mapping", key=str(path), mend="fetch it again")
    return config
