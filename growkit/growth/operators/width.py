"""A wider residual stream: padded with zeros, or every dimension cloned.

Padding is exact because what writes the new dimensions is zero, or under a mask, so what reads them sees zeros and may
be random.
Cloning is exact because what reads the clones of a dimension adds up to what read the one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from growkit.errors import ConfigError
from growkit.growth.expand import expand
from growkit.growth.operator import OPERATORS, Exactness, Grown, TensorGrowth, not_smaller, whole_number
from growkit.growth.operators.dense import Dense
from growkit.models.config import ModelConfig, Norm

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 0.5  # clone_noise: standard deviation, as a share of the weights' own root mean square
SPREAD = 0.5  # clone_split: standard deviation of the logarithm of a share
PADDED = ("pad", "masked")  # the methods that clone nothing


class Width(Dense):
    name = "width"
    fields = ("embed_dim",)
    methods = {
        "pad": "new residual dimensions start at zero; norm gains ×√(d/d′), eps ×d/d′",
        "clone": "every residual dimension n times, what reads them divided by n; the clones stay alike for ever",
        "clone_noise": "clone, and noise on what reads them that sums to zero over the clones",
        "clone_split": "clone, and what reads them divided unevenly, in shares of its own for every weight",
        "masked": "as pad, but what writes the new dimensions is random, and comes in over the stage's grow_time",
    }
    source = (
        "pad: Net2WiderNet's sense with growkit's RMSNorm correction (docs/operators/width.md); clone, clone_noise: "
        "HyperCloning, arXiv 2409.12903; clone_split: LEMON, arXiv 2310.07999; masked: MSG, arXiv 2305.02869"
    )
    axes = frozenset({"embed"})
    zero_side = "out"

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        width = whole_number(fields["embed_dim"], "embed_dim")
        not_smaller(width, config.embed_dim, "embed_dim")
        ratio = config.embed_dim / width
        if method not in PADDED:
            if width % config.embed_dim:
                mend = f"use {2 * config.embed_dim}, or the method pad"
                problem = f"is not a multiple of {config.embed_dim}"
                raise ConfigError("bad-target", problem, key="grow.embed_dim", value=width, mend=mend)
            scale = config.logit_scale * (ratio if config.tied_head else 1.0)  # a tied head cannot be divided
            return dataclasses.replace(config, embed_dim=width, logit_scale=scale)
        if method == "masked" and _norms(config) != {"rmsnorm"}:
            problem = "needs RMSNorm everywhere: the zeros of a mask shift a LayerNorm's mean"
            mend = "use a clone method, which is exact, or pad"
            raise ConfigError("method-does-not-fit", problem, key="methods.width", value=method, mend=mend)
        steady = config.embed_dim if method == "masked" and width > config.embed_dim else None
        return dataclasses.replace(
            config,
            embed_dim=width,
            steady_dim=steady,
            norm=padded_norm(config.norm, ratio),
            final_norm=padded_norm(config.final_norm, ratio),
        )

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        return dataclasses.replace(
            config,
            embed_dim=target.embed_dim,
            steady_dim=target.steady_dim,
            norm=dataclasses.replace(config.norm, eps=target.norm.eps),
            final_norm=dataclasses.replace(config.final_norm, eps=target.final_norm.eps),
            logit_scale=target.logit_scale,
        )

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        if method not in PADDED:
            reason = "what reads the clones adds up to what read the one, and clones leave mean and variance alone"
            return Exactness("exact", reason, rescales=True)
        if _norms(source) == {"rmsnorm"}:
            zeros = "padding with zeros" if method == "pad" else "padding with what a mask at 0 hides"
            return Exactness("exact", f"{zeros} scales the mean square by d/d′, which gain and eps undo", rescales=True)
        return Exactness("not", "zero padding shifts a LayerNorm's mean and variance")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        if growth.method not in PADDED:
            return _cloned(growth)
        if growth.spec.role not in ("gain", "bias") or not growth.spec.axes[0].names >= self.axes:
            return super().grow_tensor(growth)
        assert growth.old is not None and growth.old_spec is not None
        if growth.spec.role == "bias":
            return Grown(expand(growth.old, growth.old_spec.axes, growth.fresh().zero_(), growth.spec.axes))
        scale = math.sqrt(growth.source.embed_dim / growth.target.embed_dim)
        new = growth.fresh().fill_(scale)
        return Grown(expand(growth.old * scale, growth.old_spec.axes, new, growth.spec.axes), gradient=1 / scale)


def _norms(config: ModelConfig) -> set[str]:
    return {config.norm.kind, config.final_norm.kind}


def _cloned(growth: TensorGrowth) -> Grown:
    """One tensor under the clone methods. With n clones, what reads one of them has the gradient it had; what writes
    one has the readers' share of it: 1/n, but for noise and splits, which have no common factor."""
    spec, old, old_spec = growth.spec, growth.old, growth.old_spec
    assert old is not None and old_spec is not None, "width adds no parameters"
    wide = next((dim for dim, axis in enumerate(spec.axes) if "embed" in axis.names), None)
    if wide is None:
        return Grown(old)
    width, clones = growth.source.embed_dim, spec.shape[wide] // old.shape[wide]
    placement = {"embed": [i % width for i in range(growth.target.embed_dim)]}
    value = expand(old, old_spec.axes, old.new_empty(spec.shape), spec.axes, placement)
    if wide == spec.out_dim or spec.role in ("gain", "bias"):  # a tied embedding too: its head has the logit scale
        return Grown(value, gradient=1 / clones, placement=placement)
    if growth.method == "clone":
        return Grown(value / clones, placement=placement)
    return Grown(_uneven(growth, old, value, wide, clones), placement=placement)


def _uneven(growth: TensorGrowth, old: Tensor, value: Tensor, wide: int, clones: int) -> Tensor:
    """What reads the clones along dimension ``wide``, divided so that no two clones are read alike."""
    assert growth.spec.init_std is not None
    width = growth.source.embed_dim
    shape = (*old.shape[:wide], old.shape[wide] // width, clones, width, *old.shape[wide + 1 :])  # in every part
    drawn = (growth.fresh() / growth.spec.init_std).view(shape)
    if growth.method == "clone_split":
        return value * (SPREAD * drawn).softmax(wide + 1).flatten(wide, wide + 2)
    noise = (drawn - drawn.mean(wide + 1, keepdim=True)).flatten(wide, wide + 2)
    return (value + NOISE * old.square().mean().sqrt() * noise) / clones


def padded_norm(norm: Norm, ratio: float) -> Norm:
    """The norm after padding, ``ratio`` = d/d′: a mean over more zeros is smaller by it, so eps is too."""
    return dataclasses.replace(norm, eps=norm.eps * ratio) if norm.kind == "rmsnorm" else norm


OPERATORS.register("width")(Width())
