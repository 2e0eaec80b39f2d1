"""Rotary angles beyond the context trained on: transformers' own, of every kind, and what wider heads do to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from growkit.growth.engine import lazy_states
from growkit.growth.logits import stream_logits
from growkit.growth.operator import EXACT_FLOAT64
from growkit.growth.path import grown_config, path
from growkit.models.config import ModelConfig, from_json, to_json
from growkit.models.decoder import Cache, build
from growkit.models.layers import rope_table
from growkit.models.rope import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    ProportionalRope,
    RopeScaling,
    YarnRope,
    inverse_frequencies,
)
from tests.support import model_config, probe, trained_like

FLOAT32 = 2e-6  # relative: transformers takes the powers in float32, of 1e4 to the last pair's
HEAD_DIM, BASE, CONTEXT = 16, 1e4, 24
FACTORS = [1.0 + 0.25 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]

# ours, theirs, lengths to compare at, whether wider heads keep the angles
KINDS: dict[str, tuple[RopeScaling, dict[str, Any], tuple[int, ...], bool]] = {
    "linear": (LinearRope(4.0), {"factor": 4.0}, (8,), True),
    "dynamic": (DynamicRope(4.0, 32), {"factor": 4.0}, (8, 32, 33, 100), False),
    "yarn": (
        YarnRope(4.0, CONTEXT, 1.1, 8.0, 0.3),
        {
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
            "attention_factor": 1.1,
            "beta_fast": 8.0,
            "beta_slow": 0.3,
        },
        (8,),
        False,
    ),
    "yarn-exactly": (
        YarnRope(4.0, CONTEXT, 1.0, 3.0, 0.01, truncate=False),
        {
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
            "attention_factor": 1.0,
            "beta_fast": 3.0,
            "beta_slow": 0.01,
            "truncate": False,
        },
        (8,),
        True,
    ),
    "longrope": (
        LongRope(tuple(FACTORS[0]), tuple(FACTORS[1]), CONTEXT, 1.25),
        {
            "short_factor": FACTORS[0],
            "long_factor": FACTORS[1],
            "original_max_position_embeddings": CONTEXT,
            "attention_factor": 1.25,
        },
        (8, CONTEXT, CONTEXT + 1),
        True,
    ),
    "llama3": (
        Llama3Rope(8.0, CONTEXT, 0.25, 2.0),
        {
            "factor": 8.0,
            "original_max_position_embeddings": CONTEXT,
            "low_freq_factor": 0.25,
            "high_freq_factor": 2.0,
        },
        (8,),
        True,
    ),
    "proportional": (ProportionalRope(0.5, 2.0), {"factor": 2.0, "partial_rotary_factor": 0.5}, (8,), True),
}


def config_of(kind: str, **fields: Any) -> ModelConfig:
    return model_config("transformer", head_dim=HEAD_DIM, rope_scaling=KINDS[kind][0], **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_the_angles_are_those_of_transformers(kind: str) -> None:
    ours, fields, lengths, _ = KINDS[kind]
    name = kind.partition("-")[0]
    their_config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=32,
        rope_parameters={"rope_type": name, "rope_theta": BASE} | fields,
    )
    plain = inverse_frequencies(None, BASE, HEAD_DIM, 8)
    for length in lengths:
        theirs, factor = ROPE_INIT_FUNCTIONS[name](their_config, torch.device("cpu"), seq_len=length)
        mine = torch.tensor(inverse_frequencies(ours, BASE, HEAD_DIM, length))
        assert float(((mine - theirs) / theirs.clamp(min=1e-30)).abs().max()) <= FLOAT32
        assert factor == pytest.approx(ours.attention_factor, rel=1e-12)
        if (name, length) not in {("dynamic", 8), ("dynamic", 32)}:
            assert mine.tolist() != pytest.approx(plain), "a scaling that does nothing"


def test_the_table_has_the_angles_and_the_factor() -> None:
    mixer = config_of("yarn").layers[0].mixer
    cos, sin = rope_table(mixer, torch.arange(5), torch.float64)
    angles = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor(
        inverse_frequencies(mixer.rope_scaling, mixer.rope_base, HEAD_DIM, 5), dtype=torch.float64
    )
    torch.testing.assert_close(cos[0, :, 0], 1.1 * angles.cos(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(sin[0, :, 0], 1.1 * angles.sin(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_whole_sequence_says_which_angles(kind: str) -> None:
    """Cached positions count: what is decoded beyond the context turns as in a long sequence, and keys that were
    cached before it do not turn again."""
    config = config_of(kind)
    scaling = KINDS[kind][0]
    model, context = build(config, trained_like(config).params).eval(), scaling.context  # type: ignore[union-attr]
    tokens = probe(config, rows=1, context=context + 3)[:, : context + 2]
    with torch.no_grad():
        cache = Cache(config)
        within = model(tokens[:, :context], cache=cache)
        torch.testing.assert_close(within, model(tokens[:, :context]), rtol=0, atol=1e-12)
        beyond, whole = model(tokens[:, context:], cache=cache), model(tokens)[:, context:]
    table = rope_table(config.layers[0].mixer, torch.arange(context, context + 2), torch.float64)
    short = rope_table(config.layers[0].mixer, torch.arange(context, context + 2), torch.float64, length=context)
    assert not torch.equal(table[0], short[0])
    assert float((beyond - whole).abs().max()) > 1e-6  # keys of the short angles under queries of the long ones


@pytest.mark.parametrize("kind", KINDS)
def test_wider_heads_keep_the_angles_or_say_that_they_do_not(kind: str) -> None:
    source, kept = config_of(kind), KINDS[kind][3]
    target = grown_config(source, {"head_dim": 3 * HEAD_DIM}, {})
    (link,) = path(source, target, {})
    assert link.exactness.kind == ("exact" if kept else "not")
    assert kept or KINDS[kind][0].kind in link.exactness.reason
    state = trained_like(source)
    grown = lazy_states(state, [link], torch.Generator().manual_seed(0))[-1]
    tokens = probe(source, context=40)  # beyond every context above
    before = stream_logits(source, state.params, tokens, torch.float64)
    moved = float((stream_logits(target, grown.params, tokens, torch.float64) - before).norm() / before.norm())
    assert moved <= EXACT_FLOAT64 if kept else moved > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaling_survives_json(kind: str) -> None:
    config = config_of(kind)
    assert from_json(to_json(config)) == config


def test_older_manifests_say_nothing_of_what_is_new() -> None:
    config = model_config("transformer")
    old = to_json(config)
    for layer in old["layers"]:
        del layer["parallel"], layer["mixer"]["rope_scaling"], layer["mlp"]["bias"]
        for part in "qkvo":
            del layer["mixer"][part]["bias"]
    assert from_json(old) == config == dataclasses.replace(config)
