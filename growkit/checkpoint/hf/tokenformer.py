"""The published TokenFormer weights: a pickle, read for conversion alone (arXiv 2410.23168 and its public code).

The one place in growkit where a pickle is opened, and it is opened with ``weights_only``, which builds tensors and
nothing else. Names are those of GPT-NeoX's sequential layout: layer i is ``sequential.{i + 2}``.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkit.checkpoint.hf.adapter import LaidOut, Rule
from growkit.errors import CheckpointError, ConfigError
from growkit.growth.state import TrainState
from growkit.models.config import Attention, LayerSpec, ModelConfig, Norm, Pattention, PattentionMLP
from growkit.models.presets import initial_tau
from growkit.models.spec import param_specs

EPS = 1e-5
ROTARY_SHARE = 0.25
EMBEDDINGS = ("sequential.0.word_embeddings.weight", "tied_modules.embed.word_embeddings.weight")
PARTS = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.proj", "mlp": "mlp"}
SIDES = {"keys": "key_param_tokens", "values": "value_param_tokens"}
BUFFERS = r"rotary_emb\.inv_freq$|attention\.(masked_)?bias$"


def read_published(file: Path, num_heads: int) -> TrainState:
    """The model in ``file``, its tensors float32. Its sizes are those of its tensors; the number of heads is nowhere in
    it. Raises CheckpointError for a file that is not such a model's, ConfigError for heads that do not fit."""
    tensors = _loaded(file)
    embedding = next((name for name in EMBEDDINGS if name in tensors), None)
    found = (re.fullmatch(r"sequential\.(\d+)\.attention\.query\.key_param_tokens", name) for name in tensors)
    places = sorted(int(match[1]) for match in found if match)
    if embedding is None or places != [*range(2, 2 + len(places))] or not places:
        raise _not_published(file, "has not the names of a published TokenFormer")
    vocab, embed = tensors[embedding].shape
    if num_heads < 1 or embed % num_heads or round(embed // num_heads * ROTARY_SHARE) % 2:
        problem = f"does not cut a width of {embed} into heads of which a quarter turns in pairs"
        mend = "say the published number (150M: 12; 450M, 900M, 1.5B: 16)"
        raise ConfigError("heads-do-not-divide", problem, key="--num-heads", value=num_heads, mend=mend)

    def tokens(place: int, part: str) -> Pattention:
        name = f"sequential.{place}.{PARTS[part]}.{SIDES['keys']}"
        if name not in tensors:
            raise _not_published(file, f"lacks {name}")
        count = len(tensors[name])
        return Pattention((count,), (initial_tau("l2_norm_gelu", count),), "l2_norm_gelu", "shared")

    def layer(place: int) -> LayerSpec:
        mixer = Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=embed // num_heads,
            q=tokens(place, "q"),
            k=tokens(place, "k"),
            v=tokens(place, "v"),
            o=tokens(place, "o"),
            rope_fraction=ROTARY_SHARE,
        )
        return LayerSpec(place - 2, mixer, PattentionMLP(tokens(place, "mlp")))

    head = f"sequential.{len(places) + 4}.final_linear.weight"
    config = ModelConfig(
        vocab_size=vocab,
        embed_dim=embed,
        layers=tuple(layer(place) for place in places),
        norm=Norm("layernorm_gainless", EPS),
        final_norm=Norm("layernorm", EPS),
        tied_head=head not in tensors,
    )
    rules = _rules(config, embedding, head)
    _require_all(file, config, rules, tensors)
    return TrainState(config, LaidOut(rules, tensors, ours=True))


def _loaded(file: Path) -> Mapping[str, Tensor]:
    """Name → tensor, without ``module.`` before it."""
    mend = "name the published pytorch_model.bin"
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError("damaged", "does not exist", key=str(file), mend=mend) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError("damaged", f"is not a file of weights ({first})", key=str(file), mend=mend) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise _not_published(file, "holds something else than named tensors")
    return {str(name).removeprefix("module."): tensor.float() for name, tensor in loaded.items()}


def _rules(config: ModelConfig, embedding: str, head: str) -> list[Rule]:
    last = f"sequential.{len(config.layers) + 3}.norm"
    rules = [Rule(("embedding.weight",), (embedding,))]
    for layer in config.layers:
        for part, theirs in PARTS.items():
            ours = "mlp.tokens" if part == "mlp" else f"attention.{part}"
            for side, name in SIDES.items():
                place = f"sequential.{layer.id + 2}.{theirs}.{name}"
                rules.append(Rule((f"layers.{layer.id}.{ours}.{side}.0",), (place,)))
    rules += [Rule(("final_norm.gain",), (f"{last}.weight",)), Rule(("final_norm.bias",), (f"{last}.bias",))]
    return rules if config.tied_head else [*rules, Rule(("head.weight",), (head,))]


def _require_all(file: Path, config: ModelConfig, rules: list[Rule], tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a tensor that is missing, of another shape, or not the model's."""
    specs = param_specs(config)
    for rule in rules:
        (ours,), (theirs,) = rule.ours, rule.theirs
        if theirs not in tensors:
            raise _not_published(file, f"lacks {theirs}")
        if tuple(tensors[theirs].shape) != specs[ours].shape:
            shapes = f"{tuple(tensors[theirs].shape)} and not {specs[ours].shape}"
            raise _not_published(file, f"holds {theirs} of shape {shapes}")
    known = {rule.theirs[0] for rule in rules} | {*EMBEDDINGS}
    for name in tensors:
        if name not in known and not re.search(BUFFERS, name):
            raise _not_published(file, f"holds {name}, which a published TokenFormer does not have")


def _not_published(file: Path, problem: str) -> CheckpointError:
    mend = "name the published pytorch_model.bin (docs/how-to/hugging-face.md)"
    return CheckpointError("wrong-tensors", problem, key=str(file), mend=mend)
