"""More tokens: rows of the embedding, and of a head that is not tied to it, behind those that are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from growkit.growth.expand import expand
from growkit.growth.operator import OPERATORS, Exactness, Grown, GrowthOperator, TensorGrowth, not_smaller, whole_number
from growkit.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 0.01  # mean: standard deviation about the mean, as a share of the old rows' own in each dimension


class Vocab(GrowthOperator):
    """What lies along the axis ``vocab`` gets more of it; nothing else changes, so old tokens keep their logits. Rows
    at the mean cannot take much of the softmax: e to a mean of logits is at most the mean of their e's."""

    name = "vocab"
    fields = ("vocab_size",)
    methods = {
        "mean": "new tokens start at the mean of the old ones, with a little of their spread",
        "fresh": "new tokens start as in an untrained model",
    }
    source = (
        "mean: J. Hewitt, Initializing New Word Embeddings for Pretrained Language Models (2021), with the noise that "
        "transformers' mean_resizing gives; fresh: the usual resizing of an embedding"
    )

    def target(self, config: ModelConfig, fields: Mapping[str, Any], method: str) -> ModelConfig:
        size = whole_number(fields["vocab_size"], "vocab_size")
        not_smaller(size, config.vocab_size, "vocab_size")
        return dataclasses.replace(config, vocab_size=size)

    def advance(self, config: ModelConfig, target: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, vocab_size=target.vocab_size)

    def exactness(self, source: ModelConfig, target: ModelConfig, method: str) -> Exactness:
        return Exactness("exact", "old tokens keep their logits; new ones take their share of the softmax")

    def grow_tensor(self, growth: TensorGrowth) -> Grown:
        spec, old, old_spec = growth.spec, growth.old, growth.old_spec
        assert old is not None and old_spec is not None, "vocab adds no parameters"
        if old_spec.shape == spec.shape:
            return Grown(old)
        new = growth.fresh()
        if growth.method == "mean":
            new = _around_the_mean(growth, new)
        return Grown(expand(old, old_spec.axes, new, spec.axes))


def _around_the_mean(growth: TensorGrowth, drawn: Tensor) -> Tensor:
    """``drawn`` from the initial distribution, made a draw around the mean of the old rows."""
    assert growth.old is not None and growth.spec.init_std is not None
    spread = growth.old.std(0, correction=0)
    return drawn.mul_(NOISE * spread / growth.spec.init_std).add_(growth.old.mean(0))


OPERATORS.register("vocab")(Vocab())
