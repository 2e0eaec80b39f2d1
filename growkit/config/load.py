"""Reads a recipe strictly: defaults ← YAML ← ``key=value``. Every mistake is one ConfigError that names the key."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from growkit.config.recipe import Recipe, StageConfig
from growkit.errors import ConfigError
from growkit.registry import Registry, closest


def load_recipe(path: Path, overrides: Sequence[str], presets: Registry[type[Any]]) -> Recipe:
    """The recipe at ``path`` with ``overrides`` on top. Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        mend = "name a YAML file, or one of `growkit recipes list`"
        raise ConfigError("recipe-unreadable", f"cannot be read ({error})", key=str(path), mend=mend) from error
    return parse_recipe(text, overrides, presets, name=str(path))


def parse_recipe(text: str, overrides: Sequence[str], presets: Registry[type[Any]], *, name: str) -> Recipe:
    try:
        raw = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError("recipe-not-yaml", f"is not valid YAML ({error})", key=name) from error
    if not isinstance(raw, DictConfig) or raw._is_none():
        mend = "write sections such as model, data and stages"
        raise ConfigError("recipe-not-mapping", "is not a mapping of sections", key=name, mend=mend)
    for override in overrides:
        apply_override(raw, override)
    preset_name = _model_preset(raw)
    preset = presets.get(preset_name, key="model.preset")
    model_raw = raw.pop("model")
    _check(raw, Recipe, "")
    _check(model_raw, preset, "model")
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), raw))
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(preset), model_raw))
    except OmegaConfBaseException as error:
        raise _translate(error) from error
    assert isinstance(merged, Recipe)
    merged.model = model
    return merged


def apply_override(raw: DictConfig, override: str) -> None:
    """Sets ``a.b.0.c=value`` in place; list items must exist. Raises ConfigError."""
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        mend = "write key=value, such as optim.lr=1e-3 or stages.0.duration='20 steps'"
        raise ConfigError("bad-override", "is not key=value", key=override, mend=mend)
    try:
        parsed = OmegaConf.create(f"value: {value}").value if value.strip() else ""
    except (yaml.YAMLError, OmegaConfBaseException):
        parsed = value
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig):
            if not part.isdigit() or int(part) >= len(node):
                mend = f"the list has {len(node)} items: use 0..{len(node) - 1}"
                raise ConfigError("bad-override", f"{part!r} is not an item of the list", key=key, mend=mend)
            if depth < len(parts) - 1:
                node = node[int(part)]
        elif isinstance(node, DictConfig):
            node = node.get(part)
            if node is None:
                break
        elif depth < len(parts):
            raise ConfigError("bad-override", f"{'.'.join(parts[:depth])} has no parts", key=key, value=value)
    OmegaConf.update(raw, key, parsed, force_add=True)


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; reading it back gives the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))


def _model_preset(raw: DictConfig) -> str:
    model = raw.get("model")
    if not isinstance(model, DictConfig):
        raise ConfigError("no-model", "is missing or not a mapping", key="model", mend="write model.preset and sizes")
    name = model.get("preset")
    if not isinstance(name, str):
        raise ConfigError("no-model", "is missing", key="model.preset", value=name, mend="name a preset")
    return name


def _check(node: Any, kind: type, prefix: str) -> None:
    """Unknown keys and sections of the wrong shape, found before OmegaConf merges, so that the error can help."""
    if not isinstance(node, DictConfig):
        raise ConfigError("not-a-section", "must be a mapping of keys", key=prefix, value=_plain(node))
    hints = typing.get_type_hints(kind)
    for key in node:
        full = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            raise ConfigError("unknown-key", "is not a key growkit knows", key=full, mend=closest(str(key), hints))
        child = node._get_node(key)
        if dataclasses.is_dataclass(hints[key]) and isinstance(hints[key], type):
            _check(node[key], hints[key], full)
        elif hints[key] == list[StageConfig]:
            if not isinstance(node[key], ListConfig):
                raise ConfigError("not-a-list", "must be a list", key=full, value=_plain(node[key]))
            for i, item in enumerate(node[key]):
                _check(item, StageConfig, f"{full}.{i}")
                for needed in ("name", "duration"):
                    if item.get(needed) is None:
                        mend = "every stage has a name and a duration"
                        raise ConfigError("missing-key", "is missing", key=f"{full}.{i}.{needed}", mend=mend)
        elif isinstance(hints[key], type) and hints[key] is float:
            value = None if child is None else _plain(node[key])
            if isinstance(value, str):  # YAML 1.1 reads 3e-4 as text; the user means the number
                try:
                    node[key] = float(value)
                except ValueError:
                    raise ConfigError("wrong-type", "must be a number", key=full, value=value) from None


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def _translate(error: OmegaConfBaseException) -> ConfigError:
    first = str(error.msg or error).splitlines()[0]
    return ConfigError("wrong-type", first[:1].lower() + first[1:], key=str(error.full_key or "recipe"))
