"""Each command on a real, tiny run, as a user sees it."""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from growkit.checkpoint import store
from growkit.checkpoint.run_folder import RunFolder
from growkit.cli import training
from growkit.cli.main import app, main
from growkit.cli.recipes import built_in
from growkit.config.load import parse_recipe
from growkit.config.recipe import Recipe, RunConfig
from growkit.errors import CheckpointError
from growkit.eval.generate import sample_text
from growkit.models.decoder import DecoderLM, build
from growkit.models.presets import PRESETS
from growkit.registry import closest
from growkit.schedule.plan import growth_schedule
from tests import support
from tests.support import cli, held_by_another_process, recipe_dict, records, write_recipe

MILLISECOND = 1e-3  # what times are rounded to in the log


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run folder, what the terminal showed) of a run without a terminal."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = recipe_dict(folder)
    recipe["monitor"] |= {"progress": "auto", "sample_tokens": 20, "sample_prompt": "The "}
    code, out, err = cli("train", write_recipe(folder, recipe), "run.name=shown")
    assert code == 0, err
    return folder / "runs" / "shown", out


def test_train_shows_what_happens(run: tuple[Path, str]) -> None:
    folder, out = run
    for name in ("first", "tokens", "deeper"):
        assert f"validation at end of stage {name}" in out
    assert "a 2-gram: " in out and "bits per byte" in out
    assert "growth into tokens" in out and "param_tokens (bank)" in out and "depth (identity)" in out
    assert "Δlogits" in out and "exact: the new layers write zeros" in out
    assert "stage 1/3 first" in out and "tokens/s" in out and "loss" in out and "ETA" in out
    assert "a sample" in out and "\nThe " in out
    assert str(folder) in out.replace("\n", "") and "done: 18 steps" in out
    assert "\x1b[" not in out, "control sequences without a terminal"
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "GPU available" not in out


def test_a_run_that_is_complete_says_so(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = (folder / "metrics.jsonl").read_bytes()
    code, out, err = cli("resume", folder)
    assert code == 0 and "complete at step 18" in out and "a sample" not in out, err
    assert (folder / "metrics.jsonl").read_bytes() == before
    picture = (folder / "curve.png").read_bytes()
    (folder / "curve.png").unlink()  # as if killed between the last save and the picture
    assert cli("resume", folder)[0] == 0
    assert (folder / "curve.png").read_bytes() == picture


def test_a_run_that_stops_says_why_and_goes_on_beside_its_ngram(tmp_path: Path) -> None:
    recipe = recipe_dict(tmp_path)
    recipe["monitor"] |= {"progress": "plain"}
    code, out, err = cli("train", write_recipe(tmp_path, recipe), "run.name=s", "trainer.max_minutes=1e-9")
    assert code == 3 and "stopped early (trainer.max_minutes): 1 steps" in out, err
    saved = tmp_path / "runs" / "s" / "recipe.yaml"
    saved.write_text(re.sub("max_minutes: .*", "max_minutes: null", saved.read_text()))
    code, out, err = cli("resume", saved.parent)
    assert code == 0 and out.count("(a 2-gram: ") == 4 and "since step 1" in out, err


def _unread(words: list[str]) -> None:
    """growkit with an output that nobody reads any more, as after ``| head``."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)
    sys.argv = ["growkit", *words]
    main()


def test_runs_of_one_second_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.time, "strftime", lambda form: "now")
    recipe = Recipe(run=RunConfig(folder=str(tmp_path / "runs")))
    names = [training._new_folder(recipe, Path("x/small.yaml")).name for _ in range(3)]
    assert names == ["small-now", "small-now-2", "small-now-3"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be written"):
        training._new_folder(Recipe(run=RunConfig(folder=str(tmp_path / "link"))), Path("small.yaml"))


def test_a_run_that_another_process_is_beginning_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    with held_by_another_process(path) as process:  # it has made and locked the folder, and written nothing yet
        (path / "recipe.yaml").write_text("theirs")
        with pytest.raises(CheckpointError, match=f"written by process {process}"), RunFolder(path).beginning():
            RunFolder(path).lock()
        assert (path / "recipe.yaml").read_text() == "theirs"


def test_a_closed_output_does_not_stop_a_run(tmp_path: Path) -> None:
    recipe = recipe_dict(tmp_path)
    recipe["monitor"] |= {"progress": "plain"}
    child = support.context.Process(
        target=_unread, args=(["train", str(write_recipe(tmp_path, recipe)), "run.name=r"],)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    assert RunFolder.open(tmp_path / "runs" / "r").load().manifest.progress.step == 18


def test_a_wrong_name_is_answered_with_the_one_that_was_meant() -> None:
    for name, meant in (("H100", "h100-sxm"), ("a100", "a100-40gb"), ("quikstart", "quickstart"), ("", "allowed")):
        assert meant in closest(name, ["v100", "a10", "a100-40gb", "h100-sxm", "quickstart"]).partition("?")[0]


def test_the_log_counts_compute(run: tuple[Path, str]) -> None:
    folder, _ = run
    steps = records(folder, "step")
    fields = {"loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "utilisation", "memory_bytes"}
    assert all(fields <= set(record) for record in steps)
    assert [record["tokens"] for record in steps] == [128 * (i + 1) for i in range(18)]
    recipe = parse_recipe((folder / "recipe.yaml").read_text(), [], PRESETS, name="recipe")
    schedule = growth_schedule(recipe)
    per_step = [stage.flops_per_step for stage in schedule.stages for _ in range(stage.steps)]
    assert [record["flops"] for record in steps] == pytest.approx(list(itertools.accumulate(per_step)), rel=1e-12)
    seconds = [record["seconds"] for record in records(folder)]
    manifest = RunFolder.open(folder).load().manifest
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] <= manifest.seconds + MILLISECOND
    progress = manifest.progress
    assert (progress.flops, progress.cursor, progress.tokens) == (steps[-1]["flops"], 18 * 128, 18 * 128)


def test_the_log_says_where_the_gradient_is(run: tuple[Path, str]) -> None:
    for record in records(run[0], "step"):
        assert set(record["grad_norms"]) == {"embedding", "attention", "mlp", "norm"}
        assert math.hypot(*record["grad_norms"].values()) == pytest.approx(record["grad_norm"], rel=1e-6)
        assert record["new_grad_share"] is None if record["stage"] == 0 else 0 < record["new_grad_share"] < 1


def test_a_sample_of_every_stage_is_logged(run: tuple[Path, str]) -> None:
    folder, out = run
    samples = records(folder, "sample")
    assert [sample["name"] for sample in samples] == ["first", "tokens", "deeper"]
    assert all(sample["text"].startswith(sample["prompt"]) and sample["prompt"] == "The " for sample in samples)
    assert samples[-1]["text"] == sample_text(_model(folder), "The ", 20, seed=0)
    assert out.count("a sample") == 3


def _model(folder: Path) -> DecoderLM:
    checkpoint = RunFolder.open(folder).load()
    return build(checkpoint.manifest.model, checkpoint.state.params)


def test_inspect_verifies_and_shows_the_lineage(run: tuple[Path, str]) -> None:
    code, out, _ = cli("inspect", run[0])
    assert code == 0
    assert "sound" in out and "step 18 (stage 3)" in out
    assert "growth into tokens" in out and "growth into deeper" in out and "validation loss" in out


def test_grow_writes_a_checkpoint_that_computes_the_same(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    grown = tmp_path / "grown"
    code, out, _ = cli("grow", folder, "num_layers=4", "mlp_tokens=24", "insert_at=end", "-o", grown)
    assert code == 0 and "exact" in out
    before, after = RunFolder.open(folder).load(), store.read(grown)
    assert len(after.manifest.model.layers) == 4
    assert after.manifest.model.layers[0].mlp.projection.tokens == 24  # type: ignore[union-attr]
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = [build(c.manifest.model, c.state.params).eval()(tokens) for c in (before, after)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert set(after.state.moments) == set(before.state.params)
    assert after.manifest.lineage[-1]["certificate"]["delta_logits_float64"] <= 1e-10
    code, out, _ = cli("generate", grown, "--prompt", "The ", "--tokens", "8", "--temperature", "0")
    assert code == 0 and out.startswith("The ")
    assert cli("generate", folder, "--prompt", "The ", "--tokens", "8", "--temperature", "0")[1] == out


def test_grow_names_a_method(run: tuple[Path, str], tmp_path: Path) -> None:
    code, out, _ = cli("grow", run[0], "num_layers=4", "methods.depth=stack", "-o", tmp_path / "stacked")
    assert code == 0 and "not exact: copied layers act a second time" in out


def test_validate_shows_the_schedule_and_writes_nothing(tmp_path: Path) -> None:
    code, out, _ = cli("validate", write_recipe(tmp_path))
    assert code == 0 and "valid: 2,304 tokens" in out and "deeper" in out
    assert not (tmp_path / "runs").exists()


def test_validate_says_what_is_not_on_this_machine(tmp_path: Path) -> None:
    code, out, _ = cli("validate", write_recipe(tmp_path), "data.source=elsewhere/text.txt")
    assert code == 0 and "valid: " in out and "elsewhere/text.txt" in out and "does not exist" in out


def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    for words in (("recipes", "list"), ("recipes",)):
        code, out, _ = cli(*words)
        assert code == 0 and all(name in out for name in built_in())
    code, shown, _ = cli("recipes", "show", "quickstart")
    assert code == 0 and shown == built_in()["quickstart"].read_text()
    copy = tmp_path / "mine.yaml"
    assert cli("recipes", "copy", "quickstart", copy)[0] == 0
    assert copy.read_text() == shown


def commands() -> list[str]:
    named = [(command.name, command.callback) for command in app.registered_commands]
    return sorted(name or callback.__name__ for name, callback in named if callback is not None)


@pytest.mark.parametrize("command", commands())
def test_help_has_an_example(command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0 and f"Example: growkit {command}" in out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("growkit prof", "profile"),
        ("growkit train quickstart-s", "quickstart-static"),
        ("growkit train quickstart optim.weight", "optim.weight_decay="),
        ("growkit eval --cont", "--context"),
        ("growkit plan quickstart --hardware h100-s", "h100-sxm"),
    ],
)
def test_the_shell_completes(words: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_GROWKIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert cli() == (0, f"{found}\n", "")


def test_a_finished_run_resumes_to_nothing_more(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = records(folder)
    assert cli("resume", folder)[0] == 0
    assert records(folder) == before
