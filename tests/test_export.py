"""`growkit export`: what transformers makes of the folder is the model that was trained, and its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from growkit.checkpoint import store
from growkit.checkpoint.hf.export import FAMILIES, export
from growkit.checkpoint.hf.tokenizer import byte_tokenizer
from growkit.checkpoint.manifest import Manifest
from growkit.data.tokenizer import Tokenizer
from growkit.models.decoder import build
from growkit.schedule.progress import Progress
from tests.support import cli, model_config, probe, trained_like, write_recipe

TOKENIZER = byte_tokenizer()
# bfloat16 keeps 8 bits: each weight is off by up to 2⁻⁹ of itself.
BFLOAT16 = 2.0**-8
ROUNDING = 1e-5  # float32, of logits of size 1 to 10: the same sums in another order


def checkpoint(folder: Path, preset: str) -> tuple[Path, torch.nn.Module]:
    """A saved byte-level model without a recipe, and what it is built from."""
    config = model_config(preset, vocab_size=256)
    state = trained_like(config, dtype=torch.float32)
    store.write(folder, state, Manifest(config, Progress()))
    return folder, build(config, state.params).eval()


@pytest.mark.parametrize("preset", ["transformer", "tokenformer", "mamba"])
def test_transformers_reads_the_same_function(tmp_path: Path, preset: str) -> None:
    source, model = checkpoint(tmp_path / "source", preset)
    code, out, err = cli("export", source, tmp_path / "out")
    assert code == 0, err
    assert "GrowkitForCausalLM" in out
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = probe(model.config)
    assert read.dtype == torch.float32 and not read.training
    for name, parameter in model.named_parameters():
        assert torch.equal(read.growkit.get_parameter(name), parameter), name
    # Bit for bit where mapped weights lie as others do; elsewhere a product may add in another order.
    torch.testing.assert_close(read(tokens).logits, model(tokens), rtol=ROUNDING, atol=ROUNDING)
    assert read.growkit.config == model.config
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("né", return_tensors="pt").input_ids
    assert ids.tolist() == [list("né".encode())]
    assert read.generation_config.eos_token_id == 0
    assert read.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= len("né".encode()) + 4


def test_bfloat16_is_what_it_says(tmp_path: Path) -> None:
    source, model = checkpoint(tmp_path / "source", "tokenformer")
    assert cli("export", source, tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read.dtype == torch.bfloat16
    for name, p in model.named_parameters():
        stored = read.growkit.get_parameter(name).float()
        torch.testing.assert_close(stored, p, rtol=BFLOAT16, atol=0)


def test_the_last_of_a_run_says_its_context(tmp_path: Path) -> None:
    assert cli("train", write_recipe(tmp_path))[0] == 0
    assert cli("export", tmp_path / "runs" / "run", tmp_path / "out")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 32 and config["num_hidden_layers"] == 2


def test_mistakes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = checkpoint(tmp_path / "source", "transformer")
    out = tmp_path / "out"
    for words, code in (
        ((source, out, "--as", "lama"), "unknown-choice"),
        ((source, source), "file-exists"),
        ((tmp_path / "nowhere", out), "not-a-checkpoint"),
        ((source, out, "--dtype", "float8"), "bad-command-line"),
    ):
        status, _, err = cli("export", *words)
        assert status == 2 and f"[{code}]" in err, err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    monkeypatch.setattr("growkit.errors.find_spec", lambda _: None)
    status, _, err = cli("export", source, out)
    assert status == 2 and "pip install 'growkit[hf]'" in err and not out.exists()


def test_another_family_plugs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter gives fields and tensors; dtype, context, tokenizer and files are the exporter's."""

    class Backwards:
        def to_hf(self, config, params):  # type: ignore[no-untyped-def]
            return {"model_type": "other", "architectures": ["Other"]}, {name[::-1]: params[name] for name in params}

    monkeypatch.setitem(FAMILIES._items, "backwards", Backwards())
    _, model = checkpoint(tmp_path / "source", "transformer")
    export(
        tmp_path / "out",
        model.config,
        dict(model.named_parameters()),
        Tokenizer(),
        family="backwards",
        context_length=7,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["max_position_embeddings"]) == ("other", "float32", 7)
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@given(st.text(max_size=40))
def test_a_text_is_its_bytes(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_every_id_is_its_byte() -> None:
    """Spellings of special tokens, of bytes and of characters outside ASCII are text like any other."""
    for text in ("<0x00>", "<0x41>", "Ā", "\x00", "a\x00b", "<s></s>", "\r\n\t ", "😀\ufeff"):
        assert TOKENIZER(text)["input_ids"] == list(text.encode())
    assert len(TOKENIZER) == 256 and TOKENIZER.eos_token_id == TOKENIZER.pad_token_id == 0
    every = np.arange(256)
    assert TOKENIZER.decode(every[1:128].tolist()) == bytes(range(1, 128)).decode()
    assert TOKENIZER.decode([0xC3]) == "\ufffd"
    assert TOKENIZER.decode([65, 0, 66], skip_special_tokens=True) == "AB"
