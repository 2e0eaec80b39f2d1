"""Reads a recipe strictly: defaults ← YAML ← ``key=value``. Every mistake is one ConfigError that names the key."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from growkit.config.mixture import require_sources
from growkit.config.recipe import DataConfig, Recipe
from growkit.errors import ConfigError
from growkit.registry import Registry, closest

_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


class _Loader(yaml.SafeLoader):
    """YAML as a recipe means it: only true and false are truth values (``off`` is a word), 1e-3 is a number, 1:30 and
    2026-01-01 are text, and no key is written twice."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would otherwise not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load_recipe(path: Path, overrides: Sequence[str], presets: Registry[type[Any]]) -> Recipe:
    """The recipe at ``path`` with ``overrides`` on top. Raises ConfigError."""
    return parse_recipe(read_text(path), overrides, presets, name=str(path))


def read_text(path: Path) -> str:
    """The text of a recipe file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        mend = "name a YAML file, or one of `growkit recipes list`"
        raise ConfigError("recipe-unreadable", f"cannot be read ({error})", key=str(path), mend=mend) from error


def parse_recipe(
    text: str,
    overrides: Sequence[str],
    presets: Registry[type[Any]],
    *,
    name: str,
    under: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe ``text`` with ``overrides`` on top; ``name`` is what an error calls it. ``under``: sections that count
    where ``text`` does not say otherwise. Raises ConfigError."""
    raw = read_mapping(text, name)
    if under is not None:
        raw = _over(under, raw)
    for override in overrides:
        apply_override(raw, override)
    raw = _resolved(raw)
    model = None if raw.get("start") is not None else _model(raw.pop("model", None), presets)
    recipe: Recipe = _read(raw, Recipe, "")
    if recipe.start is not None and recipe.model is not None:
        mend = "drop model: the checkpoint's own is trained on; stages.N.grow enlarges it"
        raise ConfigError(
            "model-in-extension",
            "stands in a recipe that extends a checkpoint",
            key="model",
            value=recipe.model,
            mend=mend,
        )
    recipe.model = model
    require_sources(recipe.data)
    return recipe


def parse_data(overrides: Sequence[str]) -> DataConfig:
    """The data section that ``overrides`` alone make. Raises ConfigError."""
    raw: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override)
    recipe: Recipe = _read(_resolved(raw), Recipe, "")
    require_sources(recipe.data)
    return recipe.data


def read_settings(value: Any, kind: type, key: str) -> Any:
    """The mapping ``value`` as the dataclass ``kind``; ``key`` is where it stands. Raises ConfigError."""
    return _section(value, kind, key)


def read_mapping(text: str, name: str) -> dict[str, Any]:
    """A recipe's sections as plain values, not yet checked. Raises ConfigError."""
    try:
        raw = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mend = "mend the YAML there; quote text that has : or # in it"
        raise ConfigError("recipe-not-yaml", f"is not valid YAML ({_place(error)})", key=name, mend=mend) from error
    if not isinstance(raw, dict):
        mend = "write sections such as model, data and stages"
        raise ConfigError("recipe-not-mapping", "is not a mapping of sections", key=name, value=raw, mend=mend)
    return raw


def _over(under: Mapping[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """``under`` with what ``raw`` says in its place, section by section."""
    merged = dict(under)
    for key, value in raw.items():
        below = under.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _model(section: Any, presets: Registry[type[Any]]) -> Any:
    return _read(section, presets.get(_model_preset(section), key="model.preset"), "model")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets ``a.b.0.c=value`` in place: sections are made, list items must exist. Raises ConfigError."""
    key, sign, text = override.partition("=")
    parts = key.split(".")
    if not sign or any(not part or part != part.strip() for part in parts):
        mend = "write key=value, such as optim.lr=1e-3 or stages.0.duration='20 steps'"
        raise ConfigError("bad-override", "is not key=value", key=override, mend=mend)
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        place: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                mend = f"the list has {len(node)} items" + (f": use 0..{len(node) - 1}" if node else "")
                problem = f"{part!r} is not an item of the list"
                raise ConfigError("bad-override", problem, key=key, value=text, mend=mend)
            place = int(part)
        elif not isinstance(node, dict):
            mend = f"write {'.'.join(parts[:depth])}=VALUE"
            raise ConfigError("bad-override", f"{'.'.join(parts[:depth])} has no parts", key=key, value=text, mend=mend)
        elif not last and node.get(part) is None:
            node[part] = {}
        if last:
            node[place] = _value(text)
        else:
            node = node[place]


def keys() -> list[str]:
    """Every ``section.key`` that an override can set, presets and stages apart."""
    return [key for key in _keys(Recipe, "") if "." in key]


def _keys(kind: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; reading it back gives the same recipe."""
    return yaml.dump(_escaped(dataclasses.asdict(recipe)), Dumper=_Dumper, sort_keys=False)


def _value(text: str) -> Any:
    """The right side of an override: YAML, or the text as it stands where that is not YAML, or would become a mapping
    or a list without brackets (``ROMEO:``)."""
    if not text.strip():
        return ""
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return text if isinstance(value, dict | list) and text.lstrip()[0] not in "{[" else value


def _place(error: Exception) -> str:
    """A YAML error in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _resolved(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with its ``${...}`` filled in. Raises ConfigError."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except RecursionError as error:
        raise ConfigError("recipe-not-yaml", "contains itself", key="recipe", mend="drop the YAML alias") from error
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or "")).lstrip(".")
        first = (str(error.msg or error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, InterpolationResolutionError | GrammarParseError):
            mend = "name a key that exists, as ${section.key}, or write \\${ for the characters themselves"
            problem = f"cannot be filled in ({first})"
            raise ConfigError("bad-interpolation", problem, key=key, value=_at(raw, key), mend=mend) from error
        problem = f"cannot be read ({first})"
        raise ConfigError("wrong-type", problem, key=key or "recipe", mend="write plain YAML") from error
    assert isinstance(plain, dict)
    return typing.cast(dict[str, Any], plain)


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node.get(part) if isinstance(node, dict) else None
    return node


def _escaped(value: Any) -> Any:
    """``value`` with every ``${`` in its texts marked as meant literally."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _model_preset(model: Any) -> str:
    if not isinstance(model, dict):
        mend = "write model.preset and sizes; further stages of a run are for `growkit extend`, and --extend of others"
        raise ConfigError("no-model", "is missing or not a mapping", key="model", value=model, mend=mend)
    name = model.get("preset")
    if not isinstance(name, str):
        raise ConfigError("no-model", "is missing or not a name", key="model.preset", value=name, mend="name a preset")
    return name


def _read(value: Any, kind: Any, key: str) -> Any:
    """``value`` as the annotation ``kind`` says. Raises ConfigError naming the full key."""
    if kind is Any:
        return value
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _read(value, arguments[0], key)
    if dataclasses.is_dataclass(kind):
        return _section(value, typing.cast(type, kind), key)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            mend = "write [a, b], or a line with a dash for each"
            raise ConfigError("not-a-list", f"must be a list{_null(value)}", key=key, value=value, mend=mend)
        return [_read(item, arguments[0], f"{key}.{index}") for index, item in enumerate(value)]
    if typing.get_origin(kind) is dict:
        _require_mapping(value, key)
        return {name: _read(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    return _scalar(value, kind, key)


def _section(value: Any, kind: type, key: str) -> Any:
    _require_mapping(value, key)
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in hints:
            full = f"{key}.{name}" if key else name
            whose = f"the preset {value['preset']!r}" if key == "model" else "growkit"
            raise ConfigError("unknown-key", f"is not a key of {whose}", key=full, mend=closest(name, hints))
    for field in dataclasses.fields(kind):
        if field.default == MISSING and value.get(field.name) in (None, ""):
            needed = [field.name for field in dataclasses.fields(kind) if field.default == MISSING]
            mend = f"write {' and '.join(needed)}"
            raise ConfigError("missing-key", "is missing", key=f"{key}.{field.name}", mend=mend)
    return kind(**{name: _read(item, hints[name], f"{key}.{name}" if key else name) for name, item in value.items()})


def _require_mapping(value: Any, key: str) -> None:
    if not isinstance(value, dict):
        mend = "write its keys below it, or leave it out"
        raise ConfigError("not-a-section", f"must be a mapping of keys{_null(value)}", key=key, value=value, mend=mend)


def _scalar(value: Any, kind: Any, key: str) -> Any:
    """A number written as text is that number, a number where text is meant is that text; a truth value is neither."""
    allowed = {bool: bool, int: int | str, float: float | int | str, str: str | int | float}[kind]
    if isinstance(value, allowed) and isinstance(value, bool) == (kind is bool):
        result = _converted(value, kind)
        if result is not None and (kind is not float or math.isfinite(result)):
            return result
    raise ConfigError("wrong-type", f"must be {_KINDS[kind]}{_null(value)}", key=key, value=value)


def _converted(value: Any, kind: Any) -> Any:
    """``kind(value)``, or None where that is not possible."""
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return None


def _null(value: Any) -> str:
    return ", not null" if value is None else ""
