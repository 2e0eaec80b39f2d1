"""Which sources a recipe's data come from: one, or a mixture of several."""

from __future__ import annotations

from dataclasses import asdict

from growkit.config.recipe import STDLIB, DataConfig, SourceConfig
from growkit.errors import ConfigError


def sources_of(data: DataConfig) -> list[SourceConfig]:
    """Every source of ``data``: those of its mixture, or the one that ``data.source`` names."""
    if data.mixture:
        return data.mixture
    source = STDLIB if data.source is None else data.source
    return [SourceConfig(source, pattern=data.pattern, split=data.split, text_field=data.text_field)]


def source_key(data: DataConfig, index: int) -> str:
    """What the ``index``-th source is called in the recipe: ``data`` or ``data.mixture.N``."""
    return f"data.mixture.{index}" if data.mixture else "data"


def names_of(data: DataConfig) -> list[str]:
    """A name for each source, no two alike: as the recipe has it, with what tells it from others of that name."""
    sources, found = sources_of(data), []
    for source in sources:
        others = [other for other in sources if other.source == source.source]
        apart = [
            getattr(source, key)
            for key in ("pattern", "split", "text_field")
            if len({getattr(other, key) for other in others}) > 1
        ]
        found.append(f"{source.source} ({', '.join(apart)})" if apart else source.source)
    return found


def require_sources(data: DataConfig) -> None:
    """Raises ConfigError for a source beside a mixture, a source named twice, and a weight that is none."""
    if data.mixture and data.source is not None:
        mend = "write it as one of data.mixture, and leave data.source out (null, over a recipe that has one)"
        raise ConfigError("two-sources", "stands beside data.mixture", key="data.source", value=data.source, mend=mend)
    seen: list[dict[str, object]] = []
    for index, source in enumerate(data.mixture):
        key = source_key(data, index)
        if source.weight <= 0:
            mend = "use a number above zero, or leave the source out"
            raise ConfigError("not-positive", "must be above zero", key=f"{key}.weight", value=source.weight, mend=mend)
        what = {name: value for name, value in asdict(source).items() if name != "weight"}
        if what in seen:
            mend = "name each once, with a larger weight"
            raise ConfigError("two-sources", "is there twice", key=f"{key}.source", value=source.source, mend=mend)
        seen.append(what)
