"""Mamba and FalconMamba of transformers: logits, padding and recurrent decoding both ways, grown and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from growkit.checkpoint.hf.auto import GrowkitForCausalLM
from growkit.checkpoint.hf.folder import WEIGHTS, read_folder, write_folder
from growkit.checkpoint.hf.source import ADAPTERS
from growkit.checkpoint.hf.tokenizer import write
from growkit.data.tokenizer import Tokenizer
from growkit.errors import CheckpointError, ConfigError
from growkit.growth.operator import OPERATORS
from growkit.growth.path import grown_config
from growkit.models.config import AltUp, Linear, Mamba, ModelConfig, Norm
from growkit.models.decoder import Cache, DecoderLM, build
from tests.hugging_face import logits, model, reloaded, save, tokens
from tests.support import cli, model_config

# Relative, float32: two implementations of two layers' sums and scans; measured at most 2.1e-6.
PARITY = 1e-5
CHANGED = 1e-2  # what is not exact moves the logits by far more

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba-untied": ("mamba", {"tie_word_embeddings": False, "residual_in_fp32": False}),
    "mamba-biases": ("mamba", {"use_bias": True}),
    "mamba-no-conv-bias": ("mamba", {"use_conv_bias": False, "rescale_prenorm_residual": True}),
    "mamba-auto-rank": ("mamba", {"time_step_rank": "auto", "hidden_size": 40, "expand": 3, "hidden_act": "swish"}),
    "mamba-one-state": ("mamba", {"state_size": 1, "time_step_rank": 1, "conv_kernel": 2, "expand": 1}),
    "mamba-said-size": ("mamba", {"expand": 16, "intermediate_size": 64}),  # which is what transformers builds
    "falcon": ("falcon_mamba", {}),
    "falcon-untied-biases": ("falcon_mamba", {"tie_word_embeddings": False, "use_bias": True}),
    "falcon-no-conv-bias": ("falcon_mamba", {"use_conv_bias": False, "conv_kernel": 7, "time_step_rank": "auto"}),
}


def moved(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def ours(folder: Path) -> DecoderLM:
    read = read_folder(folder)
    return build(read.manifest.model, read.state.params).eval()


def mixer_of(config: ModelConfig) -> Mamba:
    (mixer,) = {layer.mixer for layer in config.layers}
    assert isinstance(mixer, Mamba)
    return mixer


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_same_both_ways(case: str, tmp_path: Path) -> None:
    """Read: the same logits, and token by token with a recurrent state. Written: transformers' own class has every
    tensor bitwise as it was; the model that is read back is the same."""
    family, fields = CASES[case]
    theirs = model(family, **fields)
    decoder, text = ours(save(theirs, tmp_path / "in")), tokens()
    with torch.no_grad():
        assert moved(decoder(text), logits(theirs, text)) <= PARITY
        cache, their_cache = Cache(decoder.config), None
        for part in (text[:, :12], *text[:, 12:24].split(1, dim=1)):
            out = theirs(part, cache_params=their_cache, use_cache=True)
            their_cache = out.cache_params
            assert moved(decoder(part, cache=cache), out.logits) <= PARITY
    folder = read_folder(tmp_path / "in")
    said, tensors = folder.adapter.to_hf(folder.manifest.model, folder.state.params)
    write_folder(tmp_path / "out", dict(folder.config) | said, tensors)
    back = reloaded(family, tmp_path / "out")
    assert back.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert moved(logits(back, text), logits(model(family, **fields), text)) <= PARITY
    assert read_folder(tmp_path / "out").manifest.model == folder.manifest.model
    assert back.config.residual_in_fp32 == theirs.config.residual_in_fp32, "of half precision: it stays as it was"
    assert not back.config.rescale_prenorm_residual, "transformers would do it again to weights it loads"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["mamba", "mamba-biases", "mamba-no-conv-bias", "falcon", "falcon-untied-biases"])
def test_padding(case: str, side: str, tmp_path: Path) -> None:
    """Ours is not seen: a padded row is as it is alone. transformers sets what goes into a mixer to zero at padding,
    which is the same, except at the left under a bias of in_proj: there its convolution reads that bias."""
    family, fields = CASES[case]
    theirs, text = model(family, **fields), tokens(20)
    decoder = ours(save(theirs, tmp_path / "in"))
    wrapped, mask = GrowkitForCausalLM.around(decoder), torch.ones_like(text)
    real = slice(7, None) if side == "left" else slice(0, 13)
    mask[1] = 0
    mask[1, real] = 1
    found = logits(wrapped, text, attention_mask=mask)
    wanted = logits(theirs, text, attention_mask=mask)
    with torch.no_grad():
        assert moved(found[1:, real], decoder(text[1:, real])) <= PARITY
    assert moved(found[0], wanted[0]) <= PARITY
    same = moved(found[1, real], wanted[1, real])
    assert same >= CHANGED if side == "left" and fields.get("use_bias") else same <= PARITY


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_generation_is_theirs(family: str, tmp_path: Path) -> None:
    theirs, text = model(family), tokens(20)
    wrapped = GrowkitForCausalLM.around(ours(save(theirs, tmp_path / "in")))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(text)
    mask[0, :6] = 0
    wanted = theirs.generate(text, attention_mask=mask, **options)
    assert torch.equal(wrapped.generate(text, attention_mask=mask, **options), wanted)
    assert len(set(wanted[0, 20:].tolist())) > 2, "a row of one token would show little"
    beams = [made.generate(text, num_beams=3, **options) for made in (theirs, wrapped)]
    assert torch.equal(*beams)


def test_names_of_the_original_checkpoints_are_read(tmp_path: Path) -> None:
    theirs = model("mamba")
    folder = save(theirs, tmp_path / "in")
    tensors = load_file(folder / WEIGHTS)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"d_model": 32, "d_inner": 64, "n_layer": 2, "ssm_cfg": {}}  # words of theirs that stay behind
    config |= {"time_step_min": 1e-5}  # what new channels start at
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert moved(ours(folder)(tokens()), logits(theirs, tokens())) <= PARITY
    write(folder, Tokenizer())
    assert cli("grow", folder, "expand=3", "-o", tmp_path / "out")[0] == 0
    grown = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"d_model", "d_inner", "n_layer", "ssm_cfg"} & grown.keys()
    assert (grown["expand"], grown["intermediate_size"], grown["time_step_rank"]) == (3, 96, 3)
    assert (grown["time_step_min"], grown["time_step_max"]) == (1e-5, 0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    made = {family: save(model(family), root / family) for family in ("mamba", "falcon_mamba")}
    for folder in made.values():
        write(folder, Tokenizer())
    untied = save(model("mamba", tie_word_embeddings=False), root / "untied")
    write(untied, Tokenizer())
    return made | {"untied": untied}


GROWTHS: list[tuple[list[str], bool, bool]] = [  # words, exact in Mamba, and in FalconMamba
    (["d_state=9"], True, False),
    (["dt_rank=6"], True, False),
    (["d_inner=96"], True, True),
    (["expand=4"], True, True),
    (["d_conv=6"], True, True),
    (["num_layers=4"], True, True),
    (["embed_dim=64"], True, True),  # the channels are then as many as it is wide
    (["embed_dim=48", "d_inner=96"], True, True),
    (["vocab_size=320"], True, True),
    (["d_conv=5", "num_layers=3", "d_inner=96"], True, True),
    (["num_layers=4", "methods.depth=stack"], False, False),
]


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize(("words", "in_mamba", "in_falcon"), GROWTHS, ids=str)
def test_grown_folders_are_transformers_own(
    family: str, words: list[str], in_mamba: bool, in_falcon: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """By transformers' own class: the logits of before where the operators say so, and only there."""
    exact = in_mamba if family == "mamba" else in_falcon
    code, shown, err = cli("grow", folders[family], *words, "-o", tmp_path / "grown")
    assert code == 0, err
    before, after = (logits(reloaded(family, path), tokens()) for path in (folders[family], tmp_path / "grown"))
    delta = moved(after[..., :300], before)
    assert delta <= PARITY if exact else delta >= CHANGED
    assert f"{'exact' if exact else 'not exact'}: " in shown
    with torch.no_grad():
        assert moved(ours(tmp_path / "grown")(tokens()), after) <= PARITY
    (event,) = json.loads((tmp_path / "grown" / "growkit.json").read_text())["lineage"]
    assert event["certificate"]["exact"] == exact and event["source"] == family


def test_cloned_width_needs_a_head_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    words = ["embed_dim=64", "methods.width=clone"]
    code, _, err = cli("grow", folders["mamba"], *words, "-o", tmp_path / "no")
    assert code == 2 and "[not-expressible]" in err and "multiplied by 0.5" in err and not (tmp_path / "no").exists()
    code, shown, err = cli("grow", folders["untied"], *words, "d_state=7", "-o", tmp_path / "grown")
    assert code == 0 and "not exact" not in shown, err
    before, after = (logits(reloaded("mamba", path), tokens()) for path in (folders["untied"], tmp_path / "grown"))
    assert moved(after, before) <= PARITY


def test_falcon_says_why_it_is_not_exact(folders: dict[str, Path]) -> None:
    falcon = read_folder(folders["falcon_mamba"]).manifest.model
    for name, fields, reason in (
        ("state", {"d_state": 9}, "normalised over their states"),
        ("dt_rank", {"dt_rank": 6}, "normalised as a whole"),
    ):
        operator = OPERATORS.get(name, key="operator")
        said = operator.exactness(falcon, grown_config(falcon, fields, {}), next(iter(operator.methods)))
        assert said.kind == "not" and reason in said.reason


def test_channels_that_are_no_multiple_are_refused_before_anything_grows(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for words, mend in ((["d_inner=80"], "d_inner=96"), (["embed_dim=40"], "d_inner=80")):
        code, _, err = cli("grow", folders["mamba"], *words, "-o", tmp_path / "no")
        assert code == 2 and "[not-expressible]" in err and "whole multiples" in err and mend in err, err
        assert not (tmp_path / "no").exists()
        code, _, err = cli("grow", folders["mamba"], *words, "-o", tmp_path / words[0], "--as", "growkit")
        assert code == 0, err


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_run_is_exported_as_theirs(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """growkit's own checkpoint, with --as: what transformers reads has its logits, and generates."""
    source = folders[family]
    assert cli("grow", source, "num_layers=3", "-o", tmp_path / "own", "--as", "growkit")[0] == 0
    assert cli("export", tmp_path / "own", tmp_path / "out", "--as", family)[0] == 0
    back = reloaded(family, tmp_path / "out")
    assert moved(logits(back, tokens()), logits(reloaded(family, source), tokens())) <= PARITY
    assert back.generate(tokens(5), max_new_tokens=3, do_sample=False).shape[1] <= 8
    other = "falcon_mamba" if family == "mamba" else "mamba"
    code, _, err = cli("export", tmp_path / "own", tmp_path / "no", "--as", other)
    assert code == 2 and "[not-expressible]" in err and not (tmp_path / "no").exists()


def test_what_the_other_side_cannot_say_is_refused() -> None:
    plain = model_config("mamba", d_state=5)
    mixer, first = mixer_of(plain), plain.layers[0]

    def with_mixer(**fields: Any) -> ModelConfig:
        changed = dataclasses.replace(mixer, **fields)
        return dataclasses.replace(
            plain, layers=tuple(dataclasses.replace(layer, mixer=changed) for layer in plain.layers)
        )

    def cannot(family: str, config: ModelConfig, word: str) -> None:
        adapter = next(adapter for adapter in ADAPTERS.values() if adapter.name == family)
        with pytest.raises(ConfigError, match=word) as caught:
            adapter.fields(config)
        assert caught.value.code == "not-expressible"

    hybrid = model_config("mamba", pattern="mamba+attention")
    wider = dataclasses.replace(first, mixer=dataclasses.replace(mixer, state=6))
    cannot("mamba", hybrid, "layers that differ")
    cannot("mamba", dataclasses.replace(plain, layers=(first, wider)), "layers that differ")
    cannot("mamba", model_config("transformer"), "attention layers")
    cannot("llama", plain, "Mamba layers")
    cannot("mamba", model_config("mamba", projection="pattention"), "parameter tokens")
    cannot("mamba", model_config("mamba", norm="layernorm"), "a layernorm")
    cannot("mamba", dataclasses.replace(plain, stream=AltUp(2)), "AltUp stream of 2 blocks")
    strided = tuple(dataclasses.replace(layer, stride=2) for layer in plain.layers)
    cannot("mamba", dataclasses.replace(plain, layers=strided), "a stride")
    with_mlp = tuple(dataclasses.replace(layer, mlp=hybrid.layers[1].mlp) for layer in plain.layers)
    cannot("mamba", dataclasses.replace(plain, layers=with_mlp), "an MLP beside the mixer")
    cannot("mamba", dataclasses.replace(plain, logit_scale=0.5), "logits multiplied by 0.5")
    cannot("mamba", dataclasses.replace(plain, final_norm=Norm("rmsnorm", 1e-6)), "two norms")
    cannot("mamba", with_mixer(in_proj=Linear(True)), "biases on in_proj alone")
    cannot("mamba", with_mixer(x_proj=Linear(True)), "biases on x_proj alone")
    cannot("mamba", with_mixer(inner_norm=1e-6), "a norm, with eps 1e-06, of what B, C")
    cannot("falcon_mamba", plain, "no norm of what B, C")
    cannot("mamba", with_mixer(inner=50), "50 channels at a width of 24")


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"hidden_act": "gelu"}, "not-supported", "hidden_act"),
        ({"expand": 1.5, "intermediate_size": None}, "bad-model", "expand"),
        ({"state_size": 0}, "not-positive", "state_size"),
        ({"time_step_rank": "large"}, "bad-model", "time_step_rank"),
        ({"time_step_rank": 4}, "wrong-tensors", "mixer"),
        ({"expand": 3}, "wrong-tensors", ""),
        ({"conv_kernel": 5}, "wrong-tensors", "mixer.conv1d.weight of shape (64, 1, 4)"),
        ({"use_conv_bias": False}, "wrong-tensors", "conv1d.bias, which a MambaForCausalLM"),
        ({"use_bias": True}, "wrong-tensors", "lacks the tensor backbone.layers.0.mixer.in_proj.bias"),
        ({"quantization_config": {"bits": 4}}, "not-supported", "quantized"),
    ],
    ids=str,
)
def test_what_is_no_mamba_is_refused(
    fields: dict[str, Any], code: str, word: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders["mamba"] / "config.json").read_text())
    if "expand" in fields:
        config.pop("intermediate_size", None)
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    (tmp_path / WEIGHTS).symlink_to(folders["mamba"] / WEIGHTS)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        read_folder(tmp_path)
    assert caught.value.code == code and word in str(caught.value), caught.value
