"""Runs on synthetic tasks: they learn, resume bitwise, grow and change their length; ``growkit eval`` scores them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from growkit.checkpoint.run_folder import RunFolder
from growkit.config.recipe import DataConfig
from growkit.data.synthetic.tasks import EVALUATION_SEED, VALIDATION_SEED, task_of
from growkit.models.decoder import build
from growkit.ops.targets import UNSCORED
from growkit.report.positions import bins
from scripts import mamba_tasks, synthetic_tasks
from tests.documents import DOCS
from tests.support import cli, in_child, recipe_dict, records, write_recipe
from tests.test_resume import assert_same_run

TASK = {"pairs": 2, "keys": 4, "values": 4}
DATA = {"source": "synthetic/associative-recall", "task": TASK}


def recipe(folder: Path, **sections: Any) -> Path:
    """As the other tests' small recipe: tokens, then depth and context grow; dropout and accumulation are on."""
    small = recipe_dict(folder, **sections)
    small["data"] = DATA
    small["model"]["vocab_size"] = 12
    small["trainer"]["keep_last"] = 9
    small["monitor"]["sample_tokens"], small["monitor"]["ngram_order"] = 200, 5
    return write_recipe(folder, small)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    assert in_child("train", recipe(folder), "run.name=whole") == 0
    return folder / "runs" / "whole"


def test_the_run_is_worth_comparing(whole: Path) -> None:
    """It learns, grows and lengthens; there is no text, so no n-gram and no sample; samples are read one after the
    other, whatever their length."""
    steps = records(whole, "step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert len(records(whole, "growth")) == 2 and not records(whole, "ngram") and not records(whole, "sample")
    last = records(whole, "validation")[-1]
    assert 0 <= last["sequence_accuracy"] <= last["token_accuracy"] <= 1 and last["context_length"] == 32
    manifest = RunFolder.open(whole).load().manifest
    assert manifest.progress.data == {"cursor": 18 * 128, "sample": 12 * 8 + 6 * 4}
    assert manifest.corpus == {"name": DATA["source"], "sha256": task_of(DataConfig(**DATA)).sha256}
    assert manifest.lineage[-1]["sequence_accuracy"] == last["sequence_accuracy"]


def test_a_resume_is_exact(whole: Path) -> None:
    """From inside the first stage, over two growths and a change of length."""
    assert in_child("resume", whole, "--from", 4, "--as", "from-4") == 0
    assert_same_run(whole.parent / "from-4", whole)


@pytest.mark.parametrize("context", [12, 40])
def test_eval_counts_what_the_model_says(whole: Path, context: int) -> None:
    """Against the model's own likeliest tokens, one sequence at a time."""
    code, out, err = cli("eval", whole, "--json", "--context", context, "--context", 16, "--sequences", 50)
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert (first["context_length"], second["context_length"], first["sequences"]) == (context, 16, 50)
    assert first["data"] == DATA["source"] and first["task"] == TASK | {"power": 0.01}
    checkpoint = RunFolder.open(whole).load()
    model = build(checkpoint.manifest.model, checkpoint.state.params).eval()
    tokens, targets = task_of(DataConfig(**DATA)).samples(EVALUATION_SEED, 0, 50, context)
    right = []
    with torch.no_grad():
        for x, y in zip(tokens, targets, strict=True):
            said = model(torch.from_numpy(x)[None])[0].argmax(-1).numpy()
            right.append((said == y)[y != UNSCORED])
    assert first["token_accuracy"] == pytest.approx(np.mean(right))
    assert first["sequence_accuracy"] == pytest.approx(np.mean([row.all() for row in right]))
    low, high = first["sequence_accuracy_95"]
    assert low <= first["sequence_accuracy"] <= high


def test_eval_takes_another_task_with_settings(whole: Path) -> None:
    words = ("--data", "synthetic/needle", "--sequences", 20)
    settings = [word for s in ("fillers=3", "keys=2", "values=4", "length=2") for word in ("--setting", s)]
    code, out, err = cli("eval", whole, *words, *settings)
    assert code == 0, err
    assert "synthetic/needle (fillers 3, keys 2, values 4, length 2), 20 sequences" in out and "95 % interval" in out
    code, _, err = cli("eval", whole, *words)
    assert code == 2 and "cannot hold the tokens of synthetic/needle, which reach 47" in err


def test_the_validation_of_a_run_is_not_what_eval_scores(whole: Path) -> None:
    """The same count on the run's own sequences is what the run logged."""
    checkpoint = RunFolder.open(whole).load()
    model = build(checkpoint.manifest.model, checkpoint.state.params).eval()
    tokens, targets = map(torch.from_numpy, task_of(DataConfig(**DATA)).samples(VALIDATION_SEED, 0, 8, 32))
    with torch.no_grad():
        right = (model(tokens).argmax(-1) == targets)[targets != UNSCORED].view(8, 2)
    logged = records(whole, "validation")[-1]
    assert logged["token_accuracy"] == pytest.approx(float(right.float().mean()))
    assert logged["sequence_accuracy"] == pytest.approx(float(right.all(1).float().mean()))


def test_what_needs_text_says_so(whole: Path) -> None:
    for words in (("generate", whole), ("export", whole, whole / "out"), ("eval", whole, "--data", __file__)):
        code, _, err = cli(*words)
        assert code == 2 and "[not-text]" in err and DATA["source"] in err, words
    code, out, _ = cli("inspect", whole)
    assert code == 0 and "of the sequences right" in " ".join(out.split())


def test_a_run_goes_on_with_another_task_and_from_text(whole: Path, tmp_path: Path) -> None:
    """Another task is read from its start; the same one from where the checkpoint stopped."""
    (tmp_path / "more.yaml").write_text("stages: [{name: more, duration: 2 steps}]\n")
    where = (tmp_path / "more.yaml", f"run.folder={tmp_path}")
    assert in_child("extend", whole, *where, "run.name=same") == 0
    rows = 128 // 32
    before = RunFolder.open(whole).load().manifest.progress.data
    after = RunFolder.open(tmp_path / "same").load().manifest.progress.data
    assert after["sample"] == before["sample"] + 2 * rows
    assert in_child("extend", whole, *where, "run.name=other", "data.task.values=3") == 0
    assert RunFolder.open(tmp_path / "other").load().manifest.progress.data == {"cursor": 256, "sample": 2 * rows}
    small = recipe_dict(tmp_path)
    small["stages"] = small["stages"][:1]
    assert in_child("train", write_recipe(tmp_path, small), "run.name=text", f"run.folder={tmp_path}") == 0
    data = ("data.source=synthetic/induction", "data.task={values: 5}")
    assert in_child("extend", tmp_path / "text", *where, "run.name=then", *data) == 0
    assert RunFolder.open(tmp_path / "then").load().manifest.progress.data["sample"] == 2 * 8


def test_resume_refuses_another_task(whole: Path, tmp_path: Path) -> None:
    run = RunFolder.open(whole).branch(8, tmp_path / "changed").path
    text = (run / "recipe.yaml").read_text()
    assert "pairs: 2" in text
    (run / "recipe.yaml").write_text(text.replace("pairs: 2", "pairs: 3"))
    code, _, err = cli("resume", run)
    assert code == 2 and "[corpus-changed]" in err and "data.task" in err


# Loss by position, of text.


@pytest.mark.parametrize("context", [1, 2, 3, 17, 64, 1000])
def test_bins_are_whole_and_grow(context: int) -> None:
    edges = bins(context)
    assert edges[0] == 0 and edges[-1] == context and edges == sorted(set(edges))
    assert max(b - a for a, b in itertools.pairwise(edges)) <= max(1, context // 8)


def test_loss_by_position_beyond_the_trained_length(tmp_path: Path) -> None:
    small = recipe_dict(tmp_path)
    small["stages"] = small["stages"][:1]
    assert in_child("train", write_recipe(tmp_path, small), "run.name=run") == 0
    run, png = tmp_path / "runs" / "run", tmp_path / "positions.png"
    words = ("--context", 16, "--context", 64, "--tokens", 512, "--png", png)
    code, out, err = cli("eval", run, *words)
    assert code == 0, err
    assert "windows of 16" in out and "windows of 64" in out and "32–63" in out and str(png) in out.replace("\n", "")
    assert png.read_bytes().startswith(b"\x89PNG")
    code, out, err = cli("eval", run, *words, "--json")  # a picture is replaced
    assert code == 0, err
    assert [len(json.loads(line)["loss_by_position"]) for line in out.splitlines()] == [16, 64]


# What the recipes reach.


def test_what_is_said_of_the_recipes_was_measured() -> None:
    measured = json.loads(synthetic_tasks.RESULTS.read_text())
    assert [row["recipe"] for row in measured["rows"]] == list(synthetic_tasks.RECIPES)
    assert measured["sequences"] >= 1000
    page = (DOCS / "how-to" / "synthetic-tasks.md").read_text(encoding="utf-8")
    assert synthetic_tasks.table(measured["rows"]) in page


def test_what_is_said_of_mamba_was_measured() -> None:
    rows = json.loads(mamba_tasks.RESULTS.read_text())["rows"]
    assert [row["recipe"] for row in rows] == list(mamba_tasks.RECIPES)
    for row in rows:
        assert all(s["sequences"] >= 1000 for s in row["scores"] if s["context_length"] <= mamba_tasks.MANY)
    page = (DOCS / "how-to" / "synthetic-tasks.md").read_text(encoding="utf-8")
    assert mamba_tasks.table(rows) in page and mamba_tasks.scores(rows) in page
