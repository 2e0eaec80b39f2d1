"""Commands on folders from elsewhere: growing one, going on from one, converting published TokenFormer weights."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.checkpoint import store
from growkit.checkpoint.hf.folder import read_folder
from growkit.checkpoint.hf.tokenizer import write
from growkit.cli import growing
from growkit.config.load import load_recipe
from growkit.data.tokenizer import Tokenizer
from growkit.growth.operator import EXACT_FLOAT64, RESCALED_FLOAT32
from growkit.models.decoder import build
from growkit.models.presets import PRESETS
from tests.hugging_face import logits, model, reloaded, save, tokens
from tests.support import cli, recipe_dict, records, write_recipe

FLOAT32 = 1e-5  # relative: the same function in another order of float32 sums, by transformers' own class
BFLOAT16 = 2**-8  # relative: a rounding to eight bits
CHANGED = 1e-2  # what is not exact moves the logits by far more


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a folder with a tokenizer's files, the model in it)."""
    made = model("llama")
    folder = save(made, tmp_path_factory.mktemp("hf") / "llama")
    write(folder, Tokenizer())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not for a grown model")
    return folder, made


def moved(folder: Path, made: Any, family: str = "llama") -> float:
    grown, before = logits(reloaded(family, folder), tokens()), logits(made, tokens())
    return float((grown[..., : before.shape[-1]] - before).norm() / before.norm())


@pytest.mark.parametrize(
    ("words", "exact"),
    [
        (["num_layers=4"], True),  # LLaMA-Pro's block expansion
        (["num_layers=4", "insert_at=end"], True),
        (["embed_dim=64", "methods.width=clone"], True),
        (["embed_dim=40"], True),
        (["mlp_dim=64", "num_heads=8"], True),
        (["head_dim=16"], True),
        (["vocab_size=320"], True),
        (["num_layers=4", "methods.depth=solar"], False),
        (["num_layers=3", "mlp_dim=56", "embed_dim=96", "methods.width=clone_split"], True),
    ],
    ids=str,
)
def test_grown_folders_are_transformers_own(
    words: list[str], exact: bool, llama: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, made = llama
    out = tmp_path / "grown"
    code, shown, err = cli("grow", folder, *words, "-o", out)
    assert code == 0, err
    delta = moved(out, made)
    assert delta <= FLOAT32 if exact else delta >= CHANGED
    assert f"{'exact' if exact else 'not exact'}: " in shown and f"wrote {out}" in shown
    travelled = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == travelled | {"config.json", "growkit.json", "model.safetensors"}
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    (event,) = json.loads((out / "growkit.json").read_text())["lineage"]
    assert event["certificate"]["exact"] == exact and event["source"] == "llama" and event["dtype"] == "float32"
    if exact:
        assert event["certificate"]["delta_logits_float64"] <= max(EXACT_FLOAT64, RESCALED_FLOAT32)
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 64 and config["bos_token_id"] == 1, "what growth does not change"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grows_in_its_folder(family: str, tied: bool, tmp_path: Path) -> None:
    """config.json says its size; the ids that the tokenizer does not have are read and written by transformers."""
    made = model(family, tie_word_embeddings=tied)
    folder = save(made, tmp_path / "small")
    code, shown, err = cli("grow", folder, "vocab_size=320", "-o", tmp_path / "large")
    assert code == 0 and "exact: old tokens keep their logits" in shown, err
    assert moved(tmp_path / "large", made, family) <= FLOAT32
    assert json.loads((tmp_path / "large" / "config.json").read_text())["vocab_size"] == 320
    found = logits(reloaded(family, tmp_path / "large"), tokens() % 20 + 300)
    assert found.shape[-1] == 320 and found.isfinite().all()


def test_a_grown_folder_remembers(llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder, made = llama
    assert cli("grow", folder, "num_layers=3", "-o", tmp_path / "a")[0] == 0
    assert cli("grow", tmp_path / "a", "num_layers=4", "mlp_dim=48", "-o", tmp_path / "b")[0] == 0
    assert moved(tmp_path / "b", made) <= FLOAT32
    code, shown, err = cli("inspect", tmp_path / "b")
    assert code == 0, err
    assert "LlamaForCausalLM in float32; every tensor is there" in shown and "4 layers of width 32" in shown
    assert "growth into a" in shown and "growth into b" in shown and "mlp (zero_down)" in shown
    (tmp_path / "b" / "growkit.json").write_text("{}")
    code, _, err = cli("inspect", tmp_path / "b")
    assert code == 2 and "growkit.json" in err and "[damaged]" in err


def test_the_stored_precision_stays(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """bfloat16 comes back as bfloat16: copies bitwise, what is rescaled rounded once, and it says by how much that
    moves the logits."""
    _, made = llama
    folder = save(model("llama").bfloat16(), tmp_path / "half")
    half = made.__class__.from_pretrained(folder, dtype=torch.float32).eval()
    code, shown, err = cli("grow", folder, "num_layers=3", "-o", tmp_path / "deep")
    assert code == 0 and "stored as bfloat16" in shown and "by 0.0e+00" in shown, err
    assert read_folder(tmp_path / "deep").dtype == torch.bfloat16 and moved(tmp_path / "deep", half) <= FLOAT32
    assert json.loads((tmp_path / "deep" / "config.json").read_text())["dtype"] == "bfloat16"
    assert cli("grow", folder, "head_dim=16", "-o", tmp_path / "wide")[0] == 0
    (event,) = json.loads((tmp_path / "wide" / "growkit.json").read_text())["lineage"]
    assert 1e-5 < event["delta_logits_stored"] < 30 * BFLOAT16 and moved(tmp_path / "wide", half) > FLOAT32
    assert cli("grow", folder, "head_dim=16", "-o", tmp_path / "exact", "--dtype", "float32")[0] == 0
    assert read_folder(tmp_path / "exact").dtype == torch.float32 and moved(tmp_path / "exact", half) <= FLOAT32


@pytest.mark.parametrize(
    ("family", "fields", "words", "word"),
    [
        ("qwen3", {}, ["embed_dim=48"], "a QK-norm with eps 1e-06 beside norms with 6.66667e-07"),
        ("llama", {"tie_word_embeddings": True}, ["embed_dim=64", "methods.width=clone"], "multiplied by 0.5"),
        ("gpt_neox", {}, ["num_heads=8"], "8 heads of 8 in a width of 32"),
    ],
    ids=["qwen3", "llama", "gpt_neox"],
)
def test_what_the_family_cannot_say_is_not_begun(
    family: str,
    fields: dict[str, Any],
    words: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, out = save(model(family, **fields), tmp_path / "in"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(growing, "growth_report", None)  # a certificate takes long: it is refused before
        code, _, err = cli("grow", folder, *words, "-o", out)
    assert code == 2 and word in err and "--as growkit" in err and "[not-expressible]" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    code, shown, err = cli("grow", folder, *words, "-o", out, "--as", "growkit")
    assert code == 0 and "wrote" in shown, err
    text = tokens()
    before = logits(model(family, **fields), text)
    with torch.no_grad():
        checkpoint = store.read(out)
        after = build(checkpoint.manifest.model, checkpoint.state.params)(text)
    assert float((after - before).norm() / before.norm()) <= FLOAT32


def test_mistakes(llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = llama
    assert cli("grow", folder, "num_layers=3", "-o", tmp_path / "own", "--as", "growkit")[0] == 0
    for words, word in (
        (["grow", folder, "num_layers=3", "-o", folder], "file-exists"),
        (["grow", tmp_path / "own", "num_layers=4", "-o", tmp_path / "x", "--dtype", "bfloat16"], "bad-command-line"),
        (["export", folder, tmp_path / "x"], "is a Hugging Face folder already"),
        (["inspect", tmp_path], "not-a-checkpoint"),
        (["convert", tmp_path / "no.bin", "-o", tmp_path / "x", "--num-heads", "4"], "does not exist"),
    ):
        code, _, err = cli(*words)
        assert code == 2 and word in err, (words, err)
        assert not (tmp_path / "x").exists()


def test_a_run_goes_on_from_a_folder(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """Its first validation is that of the model in the folder; the plan needs no torch."""
    folder, _ = llama
    recipe = recipe_dict(tmp_path)
    del recipe["model"]
    recipe["stages"] = [
        {"name": "on", "duration": "2 steps", "context_length": 16, "global_batch_tokens": 64},
        {"name": "deeper", "duration": "2 steps", "grow": {"num_layers": 3}},
    ]
    path = write_recipe(tmp_path, recipe)
    code, _, err = cli("plan", path, "--extend", folder)
    assert code == 0, err
    program = (
        "import sys\nfrom growkit.cli.recipes import read\nfrom pathlib import Path\n"
        f"read({str(path)!r}, [], Path({str(folder)!r}))\nassert not {{'torch', 'transformers'}} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code, _, err = cli("extend", folder, path, "run.name=on")
    assert code == 0, err
    assert load_recipe(tmp_path / "runs/on/recipe.yaml", [], PRESETS).data.tokenizer == str(folder)
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, err = cli("extend", bare, path, "run.name=lost")
    assert code == 2 and "data.tokenizer" in err and not (tmp_path / "runs/lost").exists()
    run = tmp_path / "runs" / "on"
    start = store.read(run / "checkpoints" / "step-00000004").manifest
    assert start.progress.step == 4 and len(start.model.layers) == 3
    (growth,) = records(run, "growth")
    assert growth["certificate"]["exact"]


# Published TokenFormer weights: the equations once more, from names and settings alone.


def published(seed: int = 0, *, layers: int = 2, tied: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    tensors = {"sequential.0.word_embeddings.weight": normal(64, 32)}
    for i in range(2, 2 + layers):
        for part, count in (("query", 20), ("key", 24), ("value", 20), ("proj", 28)):
            tensors[f"sequential.{i}.attention.{part}.key_param_tokens"] = normal(count, 32)
            tensors[f"sequential.{i}.attention.{part}.value_param_tokens"] = normal(count, 32, std=0.4)
        tensors[f"sequential.{i}.mlp.key_param_tokens"] = normal(48, 32)
        tensors[f"sequential.{i}.mlp.value_param_tokens"] = normal(48, 32, std=0.4)
        tensors[f"sequential.{i}.attention.rotary_emb.inv_freq"] = normal(1)
    tensors[f"sequential.{layers + 3}.norm.weight"] = 1 + normal(32, std=0.3)
    tensors[f"sequential.{layers + 3}.norm.bias"] = normal(32, std=0.3)
    if not tied:
        tensors[f"sequential.{layers + 4}.final_linear.weight"] = normal(64, 32)
    return tensors


def equations(tensors: dict[str, Tensor], text: Tensor, heads: int) -> Tensor:
    """The published model, token by token of its layers' definition; float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x = tensors["sequential.0.word_embeddings.weight"][text]
    B, T, D = x.shape
    d = D // heads
    layers = sum(name.endswith("query.key_param_tokens") for name in tensors)

    def pattention(x: Tensor, name: str) -> Tensor:
        keys, values = tensors[f"{name}.key_param_tokens"], tensors[f"{name}.value_param_tokens"]
        scores = x @ keys.T
        scores = math.sqrt(len(keys)) * scores / scores.square().sum(-1, keepdim=True).sqrt()
        return scores * 0.5 * (1 + torch.erf(scores / math.sqrt(2))) @ values

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def turned(x: Tensor) -> Tensor:  # (B, heads, T, d); the first quarter of d, as halves
        r = d // 4
        angles = torch.arange(T, dtype=torch.float64)[:, None] * 10000.0 ** -(
            torch.arange(0, r, 2, dtype=torch.float64) / r
        )
        a, b = x[..., : r // 2], x[..., r // 2 : r]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), x[..., r:]), -1)

    for i in range(2, 2 + layers):
        h = norm(x)
        q, k, v = (
            pattention(h, f"sequential.{i}.attention.{p}").view(B, T, heads, d).transpose(1, 2)
            for p in ("query", "key", "value")
        )
        scores = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        mixed = (F.softmax(scores, -1) @ v).transpose(1, 2).reshape(B, T, D)
        x = x + pattention(mixed, f"sequential.{i}.attention.proj")
        x = x + pattention(norm(x), f"sequential.{i}.mlp")
    last = f"sequential.{layers + 3}.norm"
    x = norm(x) * tensors[f"{last}.weight"] + tensors[f"{last}.bias"]
    head = tensors.get(f"sequential.{layers + 4}.final_linear.weight", tensors["sequential.0.word_embeddings.weight"])
    return x @ head.T


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_published_weights_become_a_checkpoint(tied: bool, tmp_path: Path) -> None:
    tensors = published(tied=tied)
    prefix = "module." if tied else ""
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    out = tmp_path / "converted"
    code, shown, err = cli("convert", tmp_path / "pytorch_model.bin", "-o", out, "--num-heads", "4")
    assert code == 0 and "2 layers of width 32" in shown, err
    checkpoint = store.read(out)
    text = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    wanted = equations(tensors, text, 4)
    assert float(wanted.std()) >= 1
    params = {name: tensor.double() for name, tensor in checkpoint.state.params.items()}
    with torch.no_grad():
        ours = build(checkpoint.manifest.model, params)(text)
    assert float((ours - wanted).norm() / wanted.norm()) <= EXACT_FLOAT64
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in out.iterdir())
    assert cli("grow", out, "mlp_tokens=96", "num_layers=3", "-o", tmp_path / "grown")[0] == 0


class Harm:
    """What a pickle may hold: a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(HARM),)


HARM = "harmed"


def test_files_that_are_no_published_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, sound = tmp_path / "pytorch_model.bin", published()
    key = "sequential.2.attention.query.key_param_tokens"
    without = {name: tensor for name, tensor in sound.items() if name != "sequential.3.mlp.value_param_tokens"}
    for held, heads, word in (
        (Harm(), 4, "is not a file of weights"),
        ({"a": 1}, 4, "something else than named tensors"),
        ({"a": torch.ones(1)}, 4, "has not the names"),
        (without, 4, "lacks sequential.3.mlp.value_param_tokens"),
        (sound | {"sequential.2.mlp.bias": torch.ones(1)}, 4, "holds sequential.2.mlp.bias"),
        (sound | {key: torch.ones(20, 30)}, 4, "of shape (20, 30) and not (20, 32)"),
        (sound, 5, "does not cut a width of 32"),
    ):
        torch.save(held, file)
        code, _, err = cli("convert", file, "-o", tmp_path / "out", "--num-heads", heads)
        assert code == 2 and word in err, err
        assert not (tmp_path / "out").exists() and not (tmp_path / HARM).exists()
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = cli("convert", file, "-o", tmp_path / "out", "--num-heads", 4)
    assert code == 2 and "is not a file of weights" in err
