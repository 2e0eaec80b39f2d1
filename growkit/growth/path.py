"""From a source and a target configuration to an ordered chain of operators. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growkit.errors import ConfigError
from growkit.growth.operator import OPERATORS, Exactness, GrowthOperator
from growkit.growth.operators import (
    altup,
    consolidate,
    dense,
    depth,
    experts,
    head_dim,
    mamba,
    param_tokens,
    rope,
    vocab,
    width,
)
from growkit.models.config import ModelConfig, is_masked, to_json, unmasked
from growkit.registry import closest

# Deep before wide: what is then appended to inserted layers is drawn for them, not copied, and a zero that keeps a step
# exact (an inserted layer's values, say) is not copied into a place where another zero would make it dead.
ORDER = (
    "depth", "width", "altup", "mlp", "experts", "heads", "head_dim", "inner", "state", "dt_rank", "conv",
    "consolidate", "param_tokens", "vocab", "rope",
)  # fmt: skip
_LOADED = (altup, consolidate, dense, depth, experts, head_dim, mamba, param_tokens, rope, vocab, width)
assert set(ORDER) <= set(OPERATORS), _LOADED


@dataclass(frozen=True)
class Link:
    """One step of a chain."""

    operator: str
    method: str
    source: ModelConfig
    target: ModelConfig

    @property
    def exactness(self) -> Exactness:
        return operator(self.operator).exactness(self.source, self.target, self.method)


def order() -> tuple[str, ...]:
    """The operators as a chain runs them; those that were registered elsewhere come last."""
    return (*ORDER, *(name for name in OPERATORS if name not in ORDER))


def operator(name: str) -> GrowthOperator:
    return OPERATORS.get(name, key="operator")


def grown_config(config: ModelConfig, fields: Mapping[str, Any], methods: Mapping[str, str]) -> ModelConfig:
    """The target that a stage's ``grow: fields`` means for ``config``, without the masks of its last growth. Raises
    ConfigError, also where the ramp of that is not through."""
    known = {field: name for name in order() for field in (*operator(name).fields, *operator(name).options)}
    for field, value in fields.items():
        if field not in known:
            raise ConfigError(
                "cannot-grow",
                "is not something that grows",
                key=f"grow.{field}",
                value=value,
                mend=closest(field, known),
            )
    for name, method in methods.items():
        OPERATORS.get(name, key=f"methods.{name}").check_method(method, f"methods.{name}")
    config = target = unmasked(config)
    for name in order():
        mine = {field: value for field, value in fields.items() if known[field] == name}
        if mine:
            target = operator(name).target(target, mine, methods.get(name) or operator(name).default_method(target))
        elif name in methods:
            raise ConfigError(
                "unused-method",
                "names a method for something that does not grow here",
                key=f"methods.{name}",
                value=methods[name],
                mend=f"grow {' or '.join(operator(name).fields)} as well, or drop it",
            )
    if fields and target == config:
        mend = "name a larger size, or leave grow out"
        raise ConfigError("nothing-grows", "is what the model already is", key="grow", value=dict(fields), mend=mend)
    return dataclasses.replace(target, ramp=0.0) if is_masked(target) else target


def path(source: ModelConfig, target: ModelConfig, methods: Mapping[str, str]) -> list[Link]:
    """The chain of links from ``source``, without the masks of its last growth, to ``target``, in canonical order.
    Raises ConfigError if there is none, or the ramp of the last growth is not through."""
    links: list[Link] = []
    config = unmasked(source)
    for name in order():
        step = operator(name).advance(config, target)
        if step != config:
            step = dataclasses.replace(step, ramp=target.ramp) if is_masked(step) else step
            method = methods.get(name) or operator(name).default_method(config)
            links.append(Link(name, operator(name).check_method(method, f"methods.{name}"), config, step))
            config = step
    if config != target:
        raise ConfigError(
            "unreachable-target",
            f"no chain of operators leads there; what is left: {', '.join(_differences(config, target))}",
            key="grow",
            mend="growth enlarges sizes and keeps everything else",
        )
    return links


def _differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    left, right = to_json(a), to_json(b)
    names = [field.name for field in dataclasses.fields(ModelConfig) if left[field.name] != right[field.name]]
    return names or ["nothing"]
