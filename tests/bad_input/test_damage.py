"""Damaged checkpoints, runs that others write, full disks, and text that looks like something else."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.run_folder import RunFolder
from growkit.config.load import parse_recipe, to_yaml
from growkit.errors import DataError, GrowkitError
from growkit.models.presets import PRESETS
from tests.bad_input.support import LAST, RUN, STEPS, Case, assert_one_message, contents, flip
from tests.support import cli, held_by_another_process


def files_of_a_checkpoint(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip, cut, empty, remove])
@pytest.mark.parametrize("name", ["manifest.json", "params-00001.safetensors", "moments-00001.safetensors"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_offered(
    name: str, damage: Callable[[Path], None], world: Path
) -> None:
    last = Path(LAST)
    assert files_of_a_checkpoint(last) == ["manifest.json", "moments-00001.safetensors", "params-00001.safetensors"]
    damage(last / name)
    before = contents(world)
    key = name if (name, damage) != ("manifest.json", remove) else LAST
    offer = "growkit resume runs/run --from 3"
    for words in ("resume runs/run", "resume runs/run --as new", "inspect runs/run", "generate runs/run"):
        code, _, err = cli(*words.split())
        assert_one_message(Case("", "", "damaged", key, LAST, offer), code, err)
    grow = Case("", "", "damaged", key, LAST, offer)
    code, _, err = cli("grow", "runs/run", "num_layers=2", "-o", "grown")
    assert_one_message(grow, code, err)
    assert contents(world) == before
    # What is offered works.
    assert cli(*shlex.split(offer)[1:])[0] == 0
    assert RunFolder.open(RUN).steps() == STEPS
    assert RunFolder.open(RUN).load().manifest.progress.step == 4


def test_when_every_checkpoint_is_damaged_none_is_offered(world: Path) -> None:
    for step in STEPS:
        flip(RUN / f"checkpoints/step-{step:08d}/params-00001.safetensors")
    code, _, err = cli("resume", RUN, "--from", 1)
    assert_one_message(Case("", "", "damaged", "params-00001", "step-00000001", "start the run again"), code, err)


def test_a_flip_of_any_byte_of_a_manifest_is_noticed(world: Path) -> None:
    file = Path(LAST) / "manifest.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(GrowkitError) as caught:
            manifests.read(Path(LAST))
        assert caught.value.code == "damaged", at


# A process of its own holds the lock, so this row has a test to itself.
BUSY = Case("run is being written", "resume runs/run", "run-busy", "runs/run", "by process", "--as NEW")


def test_a_run_that_another_process_writes_is_left_alone(world: Path) -> None:
    with held_by_another_process(RUN) as process:
        before = contents(world)
        code, _, err = cli(*BUSY.words.split())
        assert_one_message(BUSY, code, err)
        assert f"by process {process}" in err
        assert contents(world) == before
        code, _, err = cli("resume", RUN, "--from", 2, "--as", "branch")  # the mend it names works meanwhile
        assert (code, err) == (0, "")
    assert cli("resume", RUN)[0] == 0


@contextmanager
def files_no_larger_than(limit: int) -> Iterator[None]:
    """The operating system itself refuses to write more (EFBIG), as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "words", "key", "leaves"),
    [
        (100, "train recipe.yaml run.name=new", "runs/new", False),
        (6000, "train recipe.yaml run.name=new", "step-00000001", True),
        (6000, "resume runs/run --as new", "runs/new", False),
        (6000, "grow runs/run num_layers=2 -o grown", "grown", False),
        (100, "recipes copy quickstart mine.yaml", "mine.yaml", False),
    ],
)
def test_writes_that_the_system_cuts_short_leave_nothing_half_written(
    limit: int, words: str, key: str, leaves: bool, world: Path
) -> None:
    before = contents(world)
    with files_no_larger_than(limit):
        code, _, err = cli(*words.split())
    assert_one_message(Case("", words, "cannot-write", key, "too large", ""), code, err)
    after = contents(world)
    assert not [name for name in after if ".writing-" in name]
    assert not [name for name in after.keys() - before.keys() if name.endswith(".safetensors")]
    assert {name: after.get(name) for name in before} == before
    assert leaves or after == before


def test_a_metrics_log_that_lost_its_end_does_not_stop_the_run(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RUN / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    shutil.rmtree(LAST)
    code, _, err = cli("resume", RUN)
    assert code == 0, err
    assert "lacks records" in caplog.text + err
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_folder_with_a_strange_name_among_the_checkpoints_is_no_checkpoint(world: Path) -> None:
    (RUN / "checkpoints/step-backup").mkdir()
    (RUN / "checkpoints/.writing-step-00000005").mkdir()
    assert RunFolder.open(RUN).steps() == STEPS


def test_text_that_looks_like_something_else_survives_the_saved_recipe(world: Path) -> None:
    text = Path("recipe.yaml").read_text()
    for prompt in (
        "${x}",
        "\\${x}",
        "a: b",
        "1e3",
        "off",
        "null",
        "~",
        "???",
        " x ",
        "é",
        "\x01",
        "\udcff",
        "2026-01-01",
    ):
        recipe = parse_recipe(text, [], PRESETS, name="recipe")
        recipe.monitor.sample_prompt = prompt
        assert parse_recipe(to_yaml(recipe), [], PRESETS, name="saved") == recipe


def test_numbers_and_words_mean_what_they_say(world: Path) -> None:
    overrides = [
        "monitor.progress=off",
        "optim.lr='3e-4'",
        "model.num_layers='2'",
        "run.name=7",
        "data.block_tokens=32",
    ]
    recipe = parse_recipe(Path("recipe.yaml").read_text(), overrides, PRESETS, name="recipe")
    assert (recipe.monitor.progress, recipe.optim.lr, recipe.model.num_layers) == ("off", 3e-4, 2)
    assert (recipe.run.name, recipe.data.block_tokens) == ("7", 32)


def test_a_prompt_that_is_not_unicode_is_taken_as_its_bytes(world: Path) -> None:
    code, out, err = cli("generate", RUN, "--prompt", "\udcff", "--tokens", 3)
    assert (code, err) == (0, "")
    assert out.startswith("\N{REPLACEMENT CHARACTER}")


def test_names_with_brackets_are_shown_as_they_are(world: Path) -> None:
    code, out, err = cli("validate", "recipe.yaml", "stages.0.name='[/b]'")
    assert code == 0 and "[/b]" in out, err
    code, out, err = cli("train", "recipe.yaml", "run.name='[b]new'", "stages.1.name='[/b]'", "monitor.progress=plain")
    assert code == 0 and "[b]new" in out and "growth into [/b]" in out, err
    code, out, err = cli("inspect", "runs/[b]new")
    assert code == 0 and "[b]new" in out and "growth into [/b]" in out, err


def test_data_errors_name_the_split_that_is_short(world: Path) -> None:
    from growkit.config.recipe import DataConfig
    from growkit.data.corpus import load_corpus
    from growkit.data.stream import TokenStream

    corpus = load_corpus(DataConfig(source="corpus.txt", validation_fraction=0.001))
    with pytest.raises(DataError, match="validation split") as caught:
        corpus.require(1000)
    assert caught.value.code == "corpus-too-short"
    with pytest.raises(DataError, match="no pair of tokens"):
        TokenStream(corpus.train[:1], block_tokens=1, seed=0)
