"""Checkpoints of other families: their logits are ours, both ways, and what cannot be said is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growkit.checkpoint.hf.folder import INDEX, WEIGHTS, Cast, ModelFolder, read_folder, write_folder
from growkit.checkpoint.hf.source import ADAPTERS
from growkit.errors import CheckpointError, ConfigError
from growkit.growth.path import grown_config
from growkit.models.config import ModelConfig, Norm
from growkit.models.decoder import Cache, DecoderLM, build
from tests import hugging_face
from tests.hugging_face import YARN, logits, model, reloaded, save, tokens
from tests.support import model_config, trained_like

# Relative, float32: two implementations of some ten layers' sums; measured at most 1e-6.
PARITY = 1e-5
FACTORS = [1.0, 1.5, 2.0, 3.0], [2.0, 3.0, 4.0, 6.0]
LONG = {"original_max_position_embeddings": 16}
NEOX_LONG = {"short_factor": FACTORS[0][:2], "long_factor": FACTORS[1][:2]}

# family, what differs from tests.hugging_face
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama-one-kv": ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama-older-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0}),
    "llama-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-said": (
        "llama",
        {"rope_parameters": YARN | {"beta_fast": 4, "beta_slow": 0.5, "truncate": False, "attention_factor": 0.9}},
    ),
    "llama-yarn-mscale": ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    "llama-longrope": (
        "llama",
        {"rope_parameters": LONG | {"rope_type": "longrope", "short_factor": FACTORS[0], "long_factor": FACTORS[1]}},
    ),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": LONG
            | {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 0.5,
                "high_freq_factor": 3.0,
            }
        },
    ),
    "llama-proportional": (
        "llama",
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "mistral": ("mistral", {}),
    "mistral-window-beyond": ("mistral", {"sliding_window": 64, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "gpt_neox-no-attention-bias": ("gpt_neox", {"attention_bias": False, "hidden_act": "gelu_new"}),
    "gpt_neox-whole-heads": ("gpt_neox", {"rotary_pct": 1.0, "hidden_act": "gelu_fast", "rotary_emb_base": 500}),
    "gpt_neox-linear": ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "gpt_neox-longrope": ("gpt_neox", {"rope_parameters": LONG | NEOX_LONG | {"rope_type": "longrope"}}),
    "gpt_neox-yarn": ("gpt_neox", {"rope_parameters": YARN}),
}


def ours(folder: ModelFolder) -> DecoderLM:
    return build(folder.manifest.model, folder.state.params).eval()


def moved(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_same_both_ways(case: str, tmp_path: Path) -> None:
    """Read: the same logits, also of rows padded at the right and at the left, and in decoding with a cache. Written:
    transformers' own class has every tensor bitwise as it was, and the same logits; the model that is read back is the
    same."""
    family, fields = CASES[case]
    theirs = model(family, **fields)
    folder = read_folder(save(theirs, tmp_path / "in"))
    decoder, text = ours(folder), tokens()
    wanted = logits(theirs, text)
    with torch.no_grad():
        assert moved(decoder(text), wanted) <= PARITY
        mask = torch.ones_like(text)
        mask[0, 25:] = mask[1, :7] = 0  # what comes later is not seen, here by causality
        padded = logits(theirs, text, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        if "dynamic" not in case and "longrope" not in case:  # whose angles depend on the length of the row
            assert moved(decoder(text[:1, :25]), padded[:1, :25]) <= PARITY
            assert moved(decoder(text[1:2, 7:]), padded[1:2, 7:]) <= PARITY
        cache, their_cache = Cache(folder.manifest.model), None
        for part in (text[:, :12], *text[:, 12:24].unbind(1)):
            step = part if part.dim() == 2 else part[:, None]
            out = theirs(step, past_key_values=their_cache, use_cache=True)
            their_cache = out.past_key_values
            assert moved(decoder(step, cache=cache), out.logits) <= PARITY
    said, tensors = folder.adapter.to_hf(folder.manifest.model, folder.state.params)
    kept = {key: value for key, value in folder.config.items() if key not in folder.adapter.older}
    write_folder(tmp_path / "out", kept | said, tensors)
    back = reloaded(family, tmp_path / "out")
    assert back.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    again = tokens()
    assert moved(logits(back, again), logits(model(family, **fields), again)) <= PARITY
    assert read_folder(tmp_path / "out").manifest.model == folder.manifest.model


def native_models() -> dict[str, ModelConfig]:
    plain: dict[str, Any] = {"preset": "transformer", "head_dim": 12, "mlp_dim": 40}
    norm = {"norm": "layernorm", "mlp": "gelu_tanh", "bias": True}
    return {
        "llama": model_config(**plain, num_kv_heads=1, bias=True),
        "mistral": model_config(**plain, tied_head=False),
        "qwen3": model_config(**plain, qk_norm=True, tied_head=False),
        "gpt_neox": model_config(**plain | norm, parallel=True, rope_fraction=0.5),
        "mamba": model_config("mamba", d_state=5, dt_rank=3, expand=3, d_conv=3, conv_bias=False),
        "falcon_mamba": normed_inside(model_config("mamba", d_state=5, tied_head=False, bias=True), 1e-4),
    }


def normed_inside(config: ModelConfig, eps: float) -> ModelConfig:
    """``config`` with FalconMamba's norms in its mixers."""
    mixers = [dataclasses.replace(layer.mixer, inner_norm=eps) for layer in config.layers]  # type: ignore[type-var]
    pairs = zip(config.layers, mixers, strict=True)
    return dataclasses.replace(config, layers=tuple(dataclasses.replace(layer, mixer=mixer) for layer, mixer in pairs))


@pytest.mark.parametrize("family", hugging_face.CLASSES)
def test_a_model_of_ours_is_one_of_theirs(family: str, tmp_path: Path) -> None:
    """From the recipe's side, with nothing but what an adapter says; in bfloat16 a folder of half the size."""
    config = native_models()[family]
    state = trained_like(config, dtype=torch.float32)
    adapter = next(adapter for adapter in ADAPTERS.values() if adapter.name == family)
    fields, tensors = adapter.to_hf(config, state.params)
    write_folder(tmp_path / "whole", fields, tensors)
    text = tokens() % config.vocab_size
    with torch.no_grad():
        assert moved(build(config, state.params)(text), logits(reloaded(family, tmp_path / "whole"), text)) <= PARITY
    assert read_folder(tmp_path / "whole").manifest.model == config
    write_folder(tmp_path / "half", fields, Cast(tensors, torch.bfloat16))
    half = read_folder(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state.params.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state.params[name].bfloat16().float())
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]


def test_what_we_train_without_is_left_as_it_is(tmp_path: Path) -> None:
    """Older files hold buffers, and tied tables twice; another name of NeoX's head is its head."""
    folder = save(model("gpt_neox"), tmp_path / "neox")
    tensors = load_file(folder / WEIGHTS)
    for i in range(2):
        prefix = f"gpt_neox.layers.{i}.attention"
        tensors[f"{prefix}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(2)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / WEIGHTS)
    with torch.no_grad():
        assert moved(ours(read_folder(folder))(tokens()), logits(model("gpt_neox"), tokens())) <= PARITY
    folder = save(model("llama", tie_word_embeddings=True), tmp_path / "llama")
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / WEIGHTS)
    assert "head.weight" not in read_folder(folder).state.params
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "wrong-tensors", "lm_head.weight of its own")


def refused(folder: Path, code: str, *words: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        read_folder(folder)
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value), caught.value


UNKNOWN: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {"architectures": ["Mamba2ForCausalLM"]}, "unknown-architecture", "known: GrowkitForCausalLM, Llama"),
    ("llama", {"architectures": None}, "unknown-architecture", "architectures"),
    ("llama", {"hidden_act": "gelu"}, "not-supported", "hidden_act"),
    ("gpt_neox", {"hidden_act": "relu"}, "not-supported", "gelu_new"),
    ("llama", {"pretraining_tp": 2}, "not-supported", "pretraining_tp"),
    ("llama", {"quantization_config": {"bits": 4}}, "not-supported", "quantized"),
    ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "not-supported", "code"),
    ("mistral", {"sliding_window": 32}, "not-supported", "a window of 32 positions in sequences of up to 64"),
    ("mistral", {"max_position_embeddings": 8192, "sliding_window": ...}, "not-supported", "a window of 4096"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "not-supported", "layer_types"),
    ("qwen3", {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1}, "not-supported", "sliding"),
    ("llama", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "not-supported", "axial"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "not-supported", "kinds of layers"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "bad-model", "factor"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -1}}, "not-positive", "factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "not-supported", "partial_rotary_factor"),
    ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.4}, "not-supported", "3 dimensions"),
    ("llama", {"rope_parameters": LONG | {"rope_type": "longrope", "short_factor": [1.0]}}, "bad-model", "4 numbers"),
    ("llama", {"hidden_size": "32"}, "bad-model", "hidden_size"),
    ("llama", {"hidden_size": ...}, "bad-model", "is missing"),
    ("llama", {"num_hidden_layers": 0}, "not-positive", "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 10**8}, "too-large", "num_hidden_layers"),
    ("llama", {"hidden_size": 10**30}, "bad-model", "hidden_size"),
    ("llama", {"rope_parameters": {"rope_theta": float("inf")}}, "bad-model", "rope_theta"),
    ("llama", {"rms_norm_eps": float("nan")}, "bad-model", "rms_norm_eps"),
    ("llama", {"num_key_value_heads": 3}, "kv-heads-do-not-divide", "num_key_value_heads"),
    ("gpt_neox", {"num_attention_heads": 5}, "heads-do-not-divide", "hidden_size"),
    ("llama", {"num_hidden_layers": 3}, "wrong-tensors", "lacks the tensor model.layers.2.input_layernorm.weight"),
    ("llama", {"num_hidden_layers": 1}, "wrong-tensors", "does not have"),
    ("llama", {"intermediate_size": 48}, "wrong-tensors", "mlp.gate_proj.weight of shape (40, 32)"),
    ("llama", {"tie_word_embeddings": True}, "wrong-tensors", "lm_head.weight of its own"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {family: save(model(family), root / family) for family in hugging_face.CLASSES}


@pytest.mark.parametrize(("family", "fields", "code", "word"), UNKNOWN, ids=lambda value: str(value)[:40])
def test_what_growkit_does_not_do_is_refused(
    family: str, fields: dict[str, Any], code: str, word: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[family] / "config.json").read_text())
    config = {key: value for key, value in (config | fields).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).symlink_to(folders[family] / WEIGHTS)
    refused(tmp_path, code, word)


def test_damaged_files_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = (folders["llama"] / WEIGHTS).read_bytes()
    config = (folders["llama"] / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    refused(tmp_path, "damaged", "neither model.safetensors nor", "save_pretrained")
    for part in (whole[:-100], whole[:50], b""):
        (tmp_path / WEIGHTS).write_bytes(part)
        refused(tmp_path, "damaged", f"{tmp_path / WEIGHTS}", "cut off")
    (tmp_path / WEIGHTS).unlink()
    tensors = load_file(folders["llama"] / WEIGHTS)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    refused(tmp_path, "wrong-tensors", "as F64", "F32, BF16, F16")
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, "damaged", "config.json")


def test_shards(tmp_path: Path) -> None:
    """Those transformers writes are read, those growkit writes are read by transformers; a wrong index is refused."""
    theirs = model("llama")
    folder = read_folder(save(theirs, tmp_path / "in", max_shard_size="20KB"))
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert moved(ours(folder)(tokens()), logits(theirs, tokens())) <= PARITY
    fields, tensors = folder.adapter.to_hf(folder.manifest.model, folder.state.params)
    write_folder(tmp_path / "out", fields, tensors, shard_bytes=20_000)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(reloaded("llama", tmp_path / "out").state_dict()[name], tensor)
    index = tmp_path / "out" / INDEX
    sound = json.loads(index.read_text())
    names = sorted(sound["weight_map"])
    wrong: list[tuple[dict[str, str], str]] = [
        ({names[0]: "model-9.safetensors"}, "names the shard model-9.safetensors"),
        ({names[0]: f"../in/{WEIGHTS}"}, "names the shard ../in"),
        ({"no.such.tensor": sound["weight_map"][names[0]]}, "no.such.tensor"),
    ]
    for change, word in wrong:
        index.write_text(json.dumps(sound | {"weight_map": sound["weight_map"] | change}))
        refused(tmp_path / "out", "wrong-tensors", word)
    index.write_text(json.dumps({"weights": []}))
    refused(tmp_path / "out", "damaged", "is not an index")


def test_what_the_other_side_cannot_say_is_refused() -> None:
    models = native_models()

    def cannot(family: str, config: ModelConfig, word: str) -> None:
        adapter = next(adapter for adapter in ADAPTERS.values() if adapter.name == family)
        with pytest.raises(ConfigError, match=word) as caught:
            adapter.fields(config)
        assert caught.value.code == "not-expressible"

    llama, neox = models["llama"], models["gpt_neox"]
    first = llama.layers[0]
    cannot("llama", model_config("tokenformer"), "parameter tokens")
    cannot("qwen3", grown_config(models["qwen3"], {"num_experts": 2}, {}), "experts")
    cannot("llama", grown_config(llama, {"embed_dim": 48}, {"width": "clone"}), "logits multiplied by 0.5")
    cannot("llama", dataclasses.replace(llama, final_norm=Norm("rmsnorm", 1e-6)), "two norms")
    cannot("llama", dataclasses.replace(llama, layers=(first, dataclasses.replace(first, parallel=True))), "differ")
    cannot("llama", models["qwen3"], "a QK-norm")
    cannot("qwen3", llama, "no QK-norm")
    cannot("qwen3", grown_config(models["qwen3"], {"head_dim": 24}, {}), "QK-norm with eps 5e-06 beside")
    cannot("mistral", llama, "those biases")
    cannot("llama", neox, "layernorm")
    cannot("gpt_neox", llama, "rmsnorm")
    cannot("gpt_neox", grown_config(neox, {"num_heads": 4}, {}), "4 heads of 12 in a width of 24")
    cannot("llama", grown_config(llama, {"num_heads": 5, "num_kv_heads": 1}, {}), "not divisible by its 5 heads")
    cannot("llama", model_config("transformer", head_dim=12, rope_fraction=0.5), "turn in part")
    cannot("llama", model_config("transformer", mlp="gelu"), "kind gelu")
    cannot("gpt_neox", model_config("transformer", norm="layernorm", mlp="gelu"), "without biases")
    cannot("gpt_neox", model_config("transformer", norm="layernorm", bias=True), "SwiGLU")
