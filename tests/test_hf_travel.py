"""What goes with weights that came from Hugging Face, through growth, training and back: tokenizer, chat templates, how
to generate, what else their config.json says, and the certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.hugging_face import model, save
from tests.support import cli, corpus_file, recipe_dict, write_recipe
from tests.test_tokenizer import STOP, train_bpe

EQUAL = 1e-5  # relative: the loss of the same function, in another order of float32 sums
TEMPLATES = {"default": "D {{ messages }}", "tool_use": "T {{ messages }}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer is no tokenizer of bytes, and says more than growkit asks for."""
    folder = save(model("llama", vocab_size=328, bos_token_id=1, eos_token_id=0), tmp_path_factory.mktemp("hf") / "in")
    file = train_bpe(folder / "bpe.json")
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_file(str(file)),
        bos_token="<s>",
        eos_token=STOP,
        additional_special_tokens=["<tool>"],
    )
    file.unlink()
    fast.chat_template = TEMPLATES
    fast.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    return folder


def score(folder: Path, text: Path) -> dict[str, Any]:
    code, out, err = cli("eval", folder, "--data", text, "--context", 16, "--tokens", 64, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def assert_same_tokenizer(folder: Path, source: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(str(one), local_files_only=True) for one in (folder, source))
    assert ours.all_special_tokens == theirs.all_special_tokens and "<tool>" in ours.all_special_tokens
    assert ours.chat_template == theirs.chat_template == TEMPLATES
    assert ours("fox <tool>")["input_ids"] == theirs("fox <tool>")["input_ids"]
    assert (folder / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def test_a_grown_folder_has_all_of_it(folder: Path, tmp_path: Path) -> None:
    assert cli("grow", folder, "num_layers=3", "-o", tmp_path / "out")[0] == 0
    assert_same_tokenizer(tmp_path / "out", folder)


def test_a_checkpoint_made_of_a_folder_has_all_of_it(folder: Path, tmp_path: Path) -> None:
    """It is read with its own tokenizer, not as bytes; so is one that is grown of it, and what is exported."""
    text = corpus_file(tmp_path)
    before = score(folder, text)
    assert before["bytes_per_token"] > 1.2
    assert cli("grow", folder, "num_layers=3", "--as", "growkit", "-o", tmp_path / "once")[0] == 0
    assert cli("grow", tmp_path / "once", "mlp_dim=64", "-o", tmp_path / "twice")[0] == 0
    assert cli("export", tmp_path / "twice", tmp_path / "out", "--as", "llama")[0] == 0
    for made in ("once", "twice", "out"):
        assert_same_tokenizer(tmp_path / made, folder)
        after = score(tmp_path / made, text)
        assert after["bytes_per_token"] == before["bytes_per_token"]
        assert after["loss"] == pytest.approx(before["loss"], rel=EQUAL)
    assert len(json.loads((tmp_path / "out" / "growkit.json").read_text())["lineage"]) == 2
    template = tmp_path / "twice" / "additional_chat_templates" / "tool_use.jinja"
    template.write_text("something else, as long")
    code, _, err = cli("inspect", tmp_path / "twice")
    assert code == 2 and str(template) in err and "[damaged]" in err


def test_a_run_that_goes_on_from_a_folder_goes_back_with_all_of_it(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tmp_path)
    del recipe["model"]
    recipe["stages"] = [
        {"name": "deeper", "duration": "2 steps", "context_length": 16, "global_batch_tokens": 64}
        | {"grow": {"num_layers": 3}}
    ]
    assert cli("extend", folder, write_recipe(tmp_path, recipe), "run.name=on")[0] == 0
    out = tmp_path / "out"
    code, _, err = cli("export", tmp_path / "runs" / "on", out, "--as", "llama")
    assert code == 0, err
    assert_same_tokenizer(out, folder)
    config, first = (json.loads((one / "config.json").read_text()) for one in (out, folder))
    assert config == first | {"num_hidden_layers": 3, "dtype": "float32"}, "64 tokens of context and all"
    growth, stage = json.loads((out / "growkit.json").read_text())["lineage"]
    assert growth["certificate"]["exact"] and stage["kind"] == "stage"
    # What was trained since is not grown by hand: the next stage may grow, and freeze what was there.
    recipe["stages"][0]["grow"] = {"mlp_dim": 64}
    recipe["stages"][0]["freeze"] = ["old_entries"]
    code, _, err = cli("validate", write_recipe(tmp_path, recipe), "--extend", out)
    assert code == 0, err
