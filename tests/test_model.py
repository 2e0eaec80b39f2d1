"""The model: its table of parameters, its formulas against PyTorch's own counter, decoding, causality, the loss in
chunks, recomputation, compilation, and the same logits as Hugging Face's models from the same weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode

from growkit.errors import ConfigError
from growkit.growth.path import grown_config
from growkit.models.config import (
    MLP_KINDS,
    NORM_KINDS,
    STREAM_ORDERS,
    THETAS,
    DenseMLP,
    Linear,
    ModelConfig,
    Norm,
    Pattention,
    PattentionMLP,
    from_json,
    to_json,
)
from growkit.models.decoder import Cache, DecoderLM, build, init_params
from growkit.models.layers import rope_table
from growkit.models.loss import chunked_cross_entropy
from growkit.models.presets import PRESETS
from growkit.models.spec import INIT_STD, param_specs
from growkit.ops.elementwise import rotate
from tests.contract import FAMILIES
from tests.support import model_config, probe, trained_like

ROUNDING = 1e-12  # relative, float64: the same sums in another order or in pieces
PARITY = 1e-5  # absolute, float32 logits of size 1 from another implementation: a few hundred roundings of 6e-8


def mixed_config() -> ModelConfig:
    """Every layer different: dense and token projections, banks, inserted layers whose ids are out of order."""
    config = model_config("transformer", num_layers=4, num_heads=4, num_kv_heads=2, tied_head=False, qk_norm=True)
    tokens = Pattention((6, 3), (2.0, 1.5), "gelu_l2_norm", "bank")
    first, second, third, fourth = config.layers
    layers = (
        dataclasses.replace(first, mixer=dataclasses.replace(first.mixer, q=tokens, o=tokens)),
        dataclasses.replace(fourth, origin=0, mlp=PattentionMLP(Pattention((5,), (3.0,), "softmax", "shared"))),
        dataclasses.replace(second, mlp=DenseMLP(7, "gelu"), mixer=dataclasses.replace(second.mixer, qk_norm=None)),
        dataclasses.replace(third, mixer=dataclasses.replace(third.mixer, rope_fraction=0.0, v=tokens, k=Linear())),
    )
    return dataclasses.replace(config, layers=layers, logit_scale=0.7, final_norm=Norm("layernorm", 1e-3))


CONFIGS: dict[str, ModelConfig] = {
    **{name: model_config(**fields) for name, fields in FAMILIES.items()},
    "mixed": mixed_config(),
    "grown": grown_config(
        model_config("tokenformer"),
        {"attention_tokens": 15, "mlp_tokens": 20, "num_layers": 4, "insert_at": "middle"},
        {},
    ),
    "one-head": model_config("transformer", num_heads=1, num_layers=1, norm="layernorm_gainless", dropout=0.5),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def trained(config: ModelConfig, dtype: torch.dtype = torch.float64, **options: Any) -> DecoderLM:
    return build(config, trained_like(config, dtype=dtype).params, **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def gradients(model: DecoderLM) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        found[name] = p.grad
    return found


@every_config
def test_the_table_is_the_module(config: ModelConfig) -> None:
    """Names, order, shapes and the count."""
    module = DecoderLM(config)
    table = [(name, spec.shape) for name, spec in param_specs(config).items()]
    assert table == [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    assert config.num_params() == sum(p.numel() for p in module.parameters())
    assert list(module.state_dict()) == [name for name, _ in table], "nothing besides parameters is saved"
    assert {spec.layer for spec in param_specs(config).values()} - {None} == {layer.id for layer in config.layers}


def test_counts_by_hand() -> None:
    """Width 24, two layers, two heads, vocabulary 48."""
    # q, k, v, o of 24², gate, up and down of 24·20, two gains; final gain and embedding.
    assert model_config("transformer", mlp_dim=20).num_params() == 2 * (4 * 576 + 3 * 480 + 2 * 24) + 24 + 48 * 24
    # q, k, v, o: keys and values of 10 tokens, MLP: of 14.
    tokens = 2 * (4 * 2 * 240 + 2 * 336 + 2 * 24) + 24 + 48 * 24
    assert model_config("tokenformer").num_params() == tokens
    assert model_config("tokenformer", tied_head=False).num_params() == tokens + 48 * 24
    # Two FLOPs a weight and 4·16·24 a layer for both products of attention; three times that with the backward pass.
    forward = 2 * (2 * (4 * 2 * 240 + 2 * 336) + 48 * 24) + 2 * 4 * 16 * 24
    assert model_config("tokenformer").forward_flops_per_token(16) == forward
    assert model_config("tokenformer").flops_per_token(16) == 3 * forward
    assert model_config("tokenformer", tied_head=False).flops_per_token(16) == 3 * forward


@every_config
def test_flops_are_pytorchs(config: ModelConfig) -> None:
    """Exactly, forward and with the backward pass, of rows that strides divide, but for Mamba's scans and taps, which
    are no products. The math backend of attention is made of products that the counter sees; it counts fused attention
    on a CPU as nothing."""
    model = trained(dataclasses.replace(config, dropout=0.0), torch.float32)
    tokens = probe(config, rows=2, context=12)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(tokens[:, :-1], tokens[:, 1:]).total
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert forward.get_total_flops() == 2 * 12 * (config.forward_flops_per_token(12) - config.scan_flops_per_token())
    assert forward.get_total_flops() + backward.get_total_flops() == 2 * 12 * (
        config.flops_per_token(12) - 3 * config.scan_flops_per_token()
    )


def test_init_is_the_tables() -> None:
    """Drawn from the generator alone, with the table's standard deviations; constants are constants."""
    config = model_config("tokenformer", embed_dim=64, attention_tokens=50, mlp_tokens=90, final_norm="layernorm")
    first, again, other = (init_params(config, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert list(first) == list(param_specs(config))
    for name, spec in param_specs(config).items():
        tensor = first[name]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, again[name])
        if spec.init_std is None:
            assert (tensor == (1 if spec.role == "gain" else 0)).all()
        else:
            assert not torch.equal(tensor, other[name])
            # A sample's standard deviation is off by 1/√(2n): five of those.
            assert math.isclose(float(tensor.std()), spec.init_std, rel_tol=5 / math.sqrt(2 * spec.numel)), name
    assert param_specs(config)["embedding.weight"].init_std == INIT_STD == 0.02


def test_build_copies_and_is_strict() -> None:
    config = model_config("transformer")
    params = init_params(config, torch.Generator().manual_seed(0))
    model, view = build(config, params), build(config, params, copy=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(params[name], p) for name, p in view.named_parameters()), "the state was written to"
    assert all(p.requires_grad for p in view.parameters())
    assert all(p.data_ptr() == params[name].data_ptr() for name, p in view.named_parameters())
    params.pop("final_norm.gain")
    with pytest.raises(RuntimeError, match=r"final_norm\.gain"):
        build(config, params)


@every_config
def test_decoding_with_a_cache_is_the_full_forward(config: ModelConfig) -> None:
    """In pieces of odd sizes, over several doublings of the buffers, two rows at once."""
    model = trained(config).eval()
    tokens = probe(config, rows=2, context=200)
    cache, parts, start = Cache(config), [], 0
    with torch.no_grad():
        whole = model(tokens)
        for size in (1, 1, 7, 1, 53, 2, 1, 65, 70):
            parts.append(model(tokens[:, start : start + size], cache=cache))
            start += size
            assert cache.length == start
    assert start == tokens.shape[1]
    assert relative(torch.cat(parts, 1), whole) <= ROUNDING


@every_config
def test_no_token_sees_a_later_one(config: ModelConfig) -> None:
    model = trained(config).eval()
    tokens = probe(config, rows=2, context=20)
    before = model(tokens).detach()
    for at in (1, 7, 20):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % config.vocab_size
        after = model(changed).detach()
        # Not bitwise: how many tokens an expert gets decides in which order a product adds.
        assert relative(after[:, :at], before[:, :at]) <= ROUNDING, "an earlier logit changed"
        assert (after[:, at:] != before[:, at:]).any(-1).all(), "a later logit did not"


def test_dropout_is_for_training() -> None:
    config = model_config("transformer", dropout=0.5)
    model = trained(config)
    tokens = probe(config)
    assert torch.equal(model.eval()(tokens), model(tokens))
    assert relative(model.train()(tokens), model.eval()(tokens)) > 0.1


def test_logit_scale_reaches_logits_and_loss() -> None:
    config = model_config("transformer")
    scaled = dataclasses.replace(config, logit_scale=0.25)
    params = trained_like(config).params
    tokens = probe(config)
    logits = build(scaled, params)(tokens[:, :-1])
    assert torch.equal(logits, 0.25 * build(config, params)(tokens[:, :-1]))
    loss = build(scaled, params)(tokens[:, :-1], tokens[:, 1:])
    wanted = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert relative(loss.cross_entropy, wanted) <= ROUNDING
    assert loss.total is loss.cross_entropy


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [0, 1, 7, 62, 63, 1000])
def test_loss_in_chunks_is_the_whole(chunk: int, z_loss: float) -> None:
    """63 tokens: value and both gradients against the definition, and never more logits kept than a chunk has."""
    generator = torch.Generator().manual_seed(0)
    h, head = (torch.randn(n, 17, generator=generator, dtype=torch.float64).requires_grad_() for n in (63, 48))
    targets = torch.randint(48, (63,), generator=generator)
    logits = 0.7 * linear(h, head)
    ce = cross_entropy(logits, targets)
    wanted = ce + z_loss * logits.logsumexp(-1).square().mean()
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = chunked_cross_entropy(h, head, targets, logit_scale=0.7, z_loss=z_loss, chunk_tokens=chunk)
    assert relative(loss.total, wanted) <= ROUNDING and relative(loss.cross_entropy, ce) <= ROUNDING
    for ours, theirs in zip(torch.autograd.grad(loss.total, (h, head)), torch.autograd.grad(wanted, (h, head))):
        assert relative(ours, theirs) <= ROUNDING
    if 0 < chunk < 63:
        assert max(kept) <= max(h.numel(), head.numel()), "logits were kept"
    else:
        assert max(kept) == 63 * 48


def test_loss_sums_in_float32() -> None:
    """bfloat16 logits are summed in float32: a mean over 4096 tokens would otherwise stop growing at 256."""
    h, head = torch.zeros(4096, 8, dtype=torch.bfloat16), torch.zeros(48, 8, dtype=torch.bfloat16)
    targets = torch.zeros(4096, dtype=torch.long)
    for chunk in (0, 512):
        loss = chunked_cross_entropy(h, head, targets, logit_scale=1.0, z_loss=0.0, chunk_tokens=chunk)
        assert loss.total.dtype == torch.float32
        assert math.isclose(float(loss.total), math.log(48), rel_tol=1e-5)  # float32 sums of 4096 equal terms


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("name", ["tokenformer", "transformer-gqa", "transformer-moe", "mixed"])
def test_recomputing_layers_changes_no_bit(name: str, chunk: int) -> None:
    """Dropout included: the second pass draws what the first one drew."""
    config = dataclasses.replace(CONFIGS[name], dropout=0.3)
    tokens = probe(config)
    results, passes = [], []
    for recompute in (False, True):
        model = trained(config, torch.float32, checkpoint_layers=recompute).train()
        count = [0]
        for layer in model.layers.values():
            layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        torch.manual_seed(0)
        loss = model(tokens[:, :-1], tokens[:, 1:], z_loss=1e-2, chunk_tokens=chunk)
        loss.total.backward()
        results.append({"loss": loss.total.detach(), **gradients(model)})
        passes.append(count[0])
    assert passes == [len(config.layers), 2 * len(config.layers)], "nothing was recomputed"
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(("name", "backend"), [("mixed", "auto"), ("tokenformer", "reference")])
def test_compiled_in_place(name: str, backend: str) -> None:
    """As a trainer does it: names stay, the loss is one graph without a break, and its gradients are the eager ones."""
    torch.compiler.reset()
    config = CONFIGS[name]
    tokens = probe(config)
    results = []
    for compiled in (False, True):
        model = trained(config, backend=backend)
        if compiled:
            model.compile(backend="eager", fullgraph=True)
        assert [n for n, _ in model.named_parameters()] == list(param_specs(config)) == list(model.state_dict())
        loss = model(tokens[:, :-1], tokens[:, 1:], z_loss=1e-2)
        loss.total.backward()
        results.append({"loss": loss.total.detach(), **gradients(model)})
    for key, tensor in results[0].items():
        assert relative(results[1][key], tensor) <= ROUNDING, key


@given(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 5000), st.sampled_from([1e2, 1e4]))
def test_rope_turns_pairs_by_their_position(fraction: float, start: int, base: float) -> None:
    """Complex multiplication by exp(i·position·base^(−2j/rotated)); the rest of the head passes; a score depends on the
    distance alone."""
    mixer = dataclasses.replace(
        model_config("transformer", head_dim=8).layers[0].mixer, rope_base=base, rope_fraction=fraction
    )
    rotated = int(8 * fraction)
    half = rotated // 2
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(start), dtype=torch.float64)
    turned = rotate(x, *rope_table(mixer, torch.arange(start, start + 6), x.dtype))
    assert torch.equal(turned[..., rotated:], x[..., rotated:])
    for t, j in itertools.product(range(6), range(half)):
        angle = torch.tensor((start + t) * base ** (-2 * j / rotated), dtype=torch.float64)
        z = torch.complex(x[:, t, :, j], x[:, t, :, j + half]) * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(turned[:, t, :, j], z.real, rtol=0, atol=1e-11)  # angles to 5000: 5000 · 1e-16
        torch.testing.assert_close(turned[:, t, :, j + half], z.imag, rtol=0, atol=1e-11)
    q, k = x[:, :1].expand_as(x), x[:, 1:2].expand_as(x)
    near = rope_table(mixer, torch.arange(6), x.dtype)
    far = rope_table(mixer, torch.arange(start, start + 6), x.dtype)
    scores = [torch.einsum("bthd,bshd->bhts", rotate(q, *rope), rotate(k, *rope)) for rope in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-10)


# Hugging Face: the same weights under their names.


def hugging_face_names(config: ModelConfig, params: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "attention_norm.gain": "input_layernorm.weight",
        "attention.q.weight": "self_attn.q_proj.weight",
        "attention.k.weight": "self_attn.k_proj.weight",
        "attention.v.weight": "self_attn.v_proj.weight",
        "attention.o.weight": "self_attn.o_proj.weight",
        "attention.q_norm.gain": "self_attn.q_norm.weight",
        "attention.k_norm.gain": "self_attn.k_norm.weight",
        "mlp_norm.gain": "post_attention_layernorm.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
    }
    state = {"model.embed_tokens.weight": params["embedding.weight"], "model.norm.weight": params["final_norm.gain"]}
    state["lm_head.weight"] = params["embedding.weight" if config.tied_head else "head.weight"]
    for name, spec in param_specs(config).items():
        prefix = f"model.layers.{spec.layer}"
        if spec.local == "mlp.gate_up.weight":
            gate, up = params[name].chunk(2)
            state |= {f"{prefix}.mlp.gate_proj.weight": gate, f"{prefix}.mlp.up_proj.weight": up}
        elif spec.layer is not None:
            state[f"{prefix}.{names[spec.local]}"] = params[name]
    return state


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_hugging_faces(family: str, kv_heads: int, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": kv_heads, "head_dim": 10, "mlp_dim": 28, "norm_eps": 1e-3}
    config = model_config("transformer", **sizes, rope_base=500.0, qk_norm=family == "qwen3", tied_head=tied)
    fields: dict[str, Any] = dict(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=10,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    if family == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**fields))
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**fields))
    params = dict(trained_like(config, dtype=torch.float32).params)
    theirs.load_state_dict(hugging_face_names(config, params), strict=True)
    tokens = probe(config, rows=2, context=40)
    with torch.no_grad():
        ours, logits = build(config, params).eval()(tokens), theirs.eval()(tokens).logits
    scale = float(logits.std())
    assert scale >= 0.5, "logits too small to compare"
    assert float((ours - logits).abs().max()) <= PARITY * max(1.0, scale)


# Configurations as JSON.

_SMALL = st.integers(1, 4)
_COMMON: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.integers(1, 300),
    "num_layers": st.integers(1, 3),
    "norm": st.sampled_from(NORM_KINDS),
    "final_norm": st.none() | st.sampled_from(NORM_KINDS),
    "norm_eps": st.floats(1e-9, 1e-2),
    "rope_base": st.floats(1.0, 1e6),
    "rope_fraction": st.sampled_from([0.0, 0.5, 1.0]),
    "qk_norm": st.booleans(),
    "tied_head": st.booleans(),
    "dropout": st.floats(0, 0.99),
    "altup_variant": st.sampled_from(["recycled", "full"]),
    "altup_active": st.sampled_from(["alternating", "same"]),
}
_OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "tokenformer": {
        "attention_tokens": _SMALL,
        "mlp_tokens": _SMALL,
        **{name: st.none() | _SMALL for name in ("q_tokens", "k_tokens", "v_tokens", "o_tokens")},
        "theta": st.sampled_from(THETAS),
        "token_norm": st.sampled_from(["bank", "shared"]),
    },
    "transformer": {
        "mlp_dim": st.none() | st.integers(1, 50),
        "mlp": st.sampled_from(MLP_KINDS),
        "num_experts": st.none() | st.integers(3, 9),
        "experts_per_token": st.integers(2, 3),
        "balance_loss": st.floats(0, 1),
        "bias": st.booleans(),
        "parallel": st.booleans(),
    },
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Whatever a preset can say."""
    preset = draw(st.sampled_from(sorted(_OWN)))
    kv_heads, group, quarter = draw(_SMALL), draw(_SMALL), draw(_SMALL)
    sizes = {"num_heads": kv_heads * group, "num_kv_heads": draw(st.sampled_from([None, kv_heads]))}
    if draw(st.booleans()):
        sizes |= {"head_dim": 4 * quarter, "embed_dim": draw(st.integers(1, 40))}
    else:
        sizes |= {"embed_dim": kv_heads * group * 4 * quarter}
    fields = {name: draw(values) for name, values in {**_COMMON, **_OWN[preset]}.items()}
    if fields.get("num_experts") is not None:  # experts are plain blocks
        fields |= {"bias": False, "mlp": "gelu" if fields["mlp"] == "gelu_tanh" else fields["mlp"]}
    if draw(st.booleans()):
        fields |= {"altup_blocks": 1, "altup_stride": draw(_SMALL), "altup_order": draw(st.sampled_from(STREAM_ORDERS))}
        fields["altup_coefficients"] = "static"
    else:
        fields |= {"altup_blocks": draw(st.integers(2, 5)), "altup_stride": 1}
        fields["altup_coefficients"] = draw(st.sampled_from(["static", "routed"]))
        orders = STREAM_ORDERS if fields["altup_coefficients"] == "static" else ("gemma", "paper")
        fields["altup_order"] = draw(st.sampled_from(orders))
        if fields["altup_order"] == "round_robin":  # over as many layers
            fields["num_layers"] = 5
    kind = PRESETS.get(preset, key="preset")
    said = {"preset", "embed_dim", "num_heads", "num_kv_heads", "head_dim", *fields}
    assert said == {field.name for field in dataclasses.fields(kind)}, "a field has no strategy"
    return kind(**sizes, **fields).written_out()


@given(configs())
def test_json_round_trip(config: ModelConfig) -> None:
    """Equal, hashable, with the same table; what JSON says twice it says alike."""
    text = json.dumps(to_json(config))
    back = from_json(json.loads(text))
    assert back == config and hash(back) == hash(config)
    assert json.dumps(to_json(back)) == text
    assert list(param_specs(back).items()) == list(param_specs(config).items())
    assert config.num_params() == sum(spec.numel for spec in param_specs(config).values()) > 0


@pytest.mark.parametrize("name", ["mixed", "grown"])
def test_json_round_trip_of_grown_models(name: str) -> None:
    assert from_json(json.loads(json.dumps(to_json(CONFIGS[name])))) == CONFIGS[name]


def nodes(data: Any, key: str = "model") -> Iterator[tuple[str, Any, Any]]:
    """(key, container, place) of everything inside ``data``."""
    for place in data if isinstance(data, dict) else range(len(data)):
        yield f"{key}.{place}", data, place
        if isinstance(data[place], dict | list):
            yield from nodes(data[place], f"{key}.{place}")


def refused(data: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(data)
    assert caught.value.code == "bad-model"
    assert caught.value.key == key, caught.value


WRONG: dict[type, list[Any]] = {
    bool: [1, 0.0, "true", None, [], {}],
    int: [1.5, "1", True, None, [], {}],
    float: ["1.0", True, None, [], {}],
    str: [1, True, None, [], {}, "nonsense"],
    list: [{}, "abc", 3, None],
    dict: [[], "abc", 3, True],
}
OPTIONAL = ("origin", "qk_norm", "mlp")


def test_json_is_strict_everywhere() -> None:
    """Whatever is put in the place of any value, and any unknown field in any mapping, is refused by name."""
    data = to_json(CONFIGS["mixed"])
    data = json.loads(json.dumps(data))
    tried = 0
    for key, container, place in list(nodes(data)):
        kept = container[place]
        for wrong in WRONG[type(kept)] if kept is not None else ["x", 1.5, True, []]:
            if (wrong is None and place in OPTIONAL) or (wrong == [] and place == "tau_from"):  # of any length
                continue
            container[place] = wrong
            holder = key.rpartition(".")[0]  # blamed where its kind was to say which of several it is
            told_apart = place == "kind" and holder.rpartition(".")[2] in ("q", "k", "v", "o", "mlp", "mixer")
            refused(data, holder if told_apart else key)
            tried += 1
        container[place] = kept
        if isinstance(kept, dict):
            kept["surprise"] = 1
            refused(data, key)
            del kept["surprise"]
    assert tried > 500
    assert from_json(data) == CONFIGS["mixed"], "the data were left as they were"
    for wrong in ([], None, "model", 3):
        refused(wrong, "model")


def test_json_missing_fields() -> None:
    """A field without default is missed by name; one with a default takes it, as older manifests need."""
    data = json.loads(json.dumps(to_json(CONFIGS["mixed"])))
    missed = set()
    for key, container, place in list(nodes(data)):
        if isinstance(container, list):
            continue
        kept = dict(container)
        del container[place]
        holder = key.rpartition(".")[0]
        try:
            from_json(data)
        except ConfigError as error:
            assert error.code == "bad-model" and error.key == holder, error
            assert place == "kind" or repr(place) in error.problem, error
            missed.add(place)
        container.clear()
        container.update(kept)
    required = {"vocab_size", "embed_dim", "layers", "id", "mixer", "mlp", "num_heads", "num_kv_heads", "head_dim"}
    assert missed == required | {"q", "k", "v", "o", "dim", "projection", "banks", "taus", "kind"}


@pytest.mark.parametrize(
    ("fields", "code", "key"),
    [
        ({"embed_dim": 25}, "heads-do-not-divide", "embed_dim"),
        ({"num_kv_heads": 3, "num_heads": 4}, "kv-heads-do-not-divide", "num_kv_heads"),
        ({"rope_fraction": 0.25, "head_dim": 12}, "odd-rotation", "rope_fraction"),
        ({"rope_fraction": 1.5}, "out-of-range", "rope_fraction"),
        ({"dropout": 1.0}, "out-of-range", "dropout"),
        ({"norm": "batchnorm"}, "unknown-choice", "norm"),
        ({"final_norm": "none"}, "unknown-choice", "final_norm"),
        ({"num_layers": 0}, "not-positive", "num_layers"),
        ({"vocab_size": -1}, "not-positive", "vocab_size"),
        ({"mlp_dim": 0}, "not-positive", "mlp_dim"),
        ({"mlp": "relu"}, "unknown-choice", "mlp"),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], code: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config("transformer", **fields)
    assert (caught.value.code, caught.value.key) == (code, f"model.{key}")


def test_a_share_of_a_head_is_rounded_as_it_is_meant() -> None:
    """0.28 · 50 is 14.000000000000002."""
    assert model_config("transformer", head_dim=50, rope_fraction=0.28).layers[0].mixer.rope_fraction == 0.28
