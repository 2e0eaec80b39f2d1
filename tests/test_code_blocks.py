"""Every code block of README and docs does what it says: commands and Python run, in the order of their page, in a
folder with a small text and a small trained run; YAML is read as a recipe; what cannot run says why, and is counted."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from growkit.checkpoint.hf.tokenizer import write
from growkit.checkpoint.run_folder import RunFolder
from growkit.cli import main as command_line
from growkit.cli.recipes import find_recipe, recipes_folder
from growkit.data.tokenizer import Tokenizer
from growkit.growth.operator import OPERATORS
from tests import hugging_face
from tests.documents import FENCE, ROOT, Block, blocks, name, pages, schedule_of
from tests.support import cli, corpus_file, recipe_dict, write_recipe

# What is done with a block, by its language. ``text`` is for what is no code: output, formulas, folder trees.
CLASSES = {"bash": "run", "python": "run", "yaml": "read", "json": "read", "text": "shown"}
# Blocks that are not run, by page; each gives its reason behind its fence.
NOT_RUN = {"docs/logging.md": 1}
# Lines that are parsed by the real command line and not run: a word of the line, and why.
PARSED_ONLY = {
    "data.source=hf:NAME": "needs the network",
    "logger.kind=wandb": "starts wandb; the tests of the logger do, against a stand-in server",
    "context-growth": "grows from lengths above that of the small stages; tests/test_recipes.py runs it",
    "attention-window": "the same",
    "dataset-decomposition": "its shortest length is above that of the small stages; tests/test_recipes.py runs it",
    "--measure": "times the machine, and keeps the result in the reader's home",
    "sync": "needs an account of Weights & Biases",
    "convert": "needs the published weights; tests/test_hf_grow.py has some like them",
    "merge": "needs two runs of one ancestor; tests/test_banks.py makes some",
    "--tasks": "downloads the tasks' data; tests/test_tasks.py makes some of its own",
}
# Texts that pages name; all are the same small one.
TEXTS = ("my.txt", "a.txt", "b.txt", "tinyshakespeare.txt", "path/to/file-or-folder", "path/to/folder/notes.md")
RUNS = ("NAME", "A", "B", "static", "grown")  # runs that pages name without making them; all are the same small one
MORE = "stages: [{name: more, duration: 2 steps, grow: {num_layers: 4}}]"  # more.yaml, for `growkit extend`
# Put behind every command that trains: one process, few tokens; and each stage to two steps.
SMALL = (
    "run.threads=1",
    "trainer.devices=1",
    "trainer.strategy=single",
    "monitor.validation_tokens=256",
    "monitor.probe_tokens=64",
    "monitor.ngram_order=2",
    "monitor.sample_tokens=4",
    "monitor.peak_flops_per_second=1e9",
)
TRAINING = {"train": 1, "extend": 2, "profile": 1}  # command: where its recipe stands
SMALL_STAGE = (
    "duration=2 steps",
    "context_length=32",
    "global_batch_tokens=64",
    "micro_batch_size=null",
    "warmup=null",
    "decay=null",
    "new_warmup=1 steps",
    "validate_every=null",
    "until=null",
)
# The same for commands that do not train.
LITTLE = {"generate": ("--tokens", "4"), "grow": ("--probe-tokens", "16"), "eval": ("--tokens", "64")}


def commands(block: Block) -> list[list[str]]:
    """The block's command lines as words, comments dropped and continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def growkit_words(words: list[str]) -> list[str] | None:
    """What a command line says to growkit, if that is what it (or ``srun``) starts."""
    words = words[1:] if words[0] == "srun" else words
    return words[1:] if Path(words[0]).name == "growkit" else None


def parse(words: list[str]) -> None:
    """Parses ``growkit words...`` as the command line does, without running it."""
    command = typer.main.get_command(command_line.app)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{command.name} has no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def require_known(words: list[str]) -> None:
    """A command other than growkit's names what is there."""
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"make has no target {words[1]}"
    elif program in ("python", "sbatch"):
        assert (ROOT / words[1]).is_file() or Path(words[1]).is_file(), f"{words[1]} is not there"
    else:
        assert words in (["source", ".venv/bin/activate"], [".venv/bin/pre-commit", "install"]), f"unknown: {words}"


def shrunk(words: list[str]) -> list[str]:
    """The same command with little to do: a small training, a late step that the small run has."""
    if words[0] in TRAINING:
        recipe = words[TRAINING[words[0]]]
        written = yaml.safe_load(find_recipe(recipe).read_text())["stages"]
        stages = [f"stages.{number}.{value}" for number in range(len(written)) for value in SMALL_STAGE]
        stages += [f"stages.{number}.probe=1 step" for number, stage in enumerate(written) if "probe" in stage]
        own = {"source", "mixture"} & yaml.safe_load(find_recipe(recipe).read_text()).get("data", {}).keys()
        given = own or words[0] == "extend" or any(word.startswith("data.source=") for word in words)
        source = [] if given else ["data.source=my.txt"]
        return [*words, *source, *SMALL, *stages]
    if "--from" in words:
        place = words.index("--from") + 1
        return [*words[:place], str(RunFolder.open(Path(words[1])).steps()[-2]), *words[place + 1 :]]
    if any(word.startswith("synthetic/") for word in words):
        return [*words, "--sequences", "8"]
    return [*words, *LITTLE.get(words[0], ())]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages take for granted."""
    folder = tmp_path_factory.mktemp("furnished")
    text = corpus_file(folder).read_text()
    for place in TEXTS:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)
    shutil.copytree(recipes_folder(), folder / "recipes")
    small = recipe_dict(folder, run={"folder": "runs"}, trainer={"keep_last": 10})
    with contextlib.chdir(folder):
        assert cli("train", write_recipe(folder, small), f"run.name={RUNS[0]}")[0] == 0
    for copy in RUNS[1:]:
        shutil.copytree(folder / "runs" / RUNS[0], folder / "runs" / copy)
    (folder / "more.yaml").write_text(MORE)
    write(hugging_face.save(hugging_face.model("llama"), folder / "my-llama"), Tokenizer())
    write(hugging_face.save(hugging_face.model("mamba"), folder / "my-mamba"), Tokenizer())
    return folder


def run_python(block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * block.line + block.text, str(block.path), "exec"), names)


def run_bash(block: Block) -> None:
    script = block.text.startswith("#!")  # has a test of its own; here its syntax, and what it says to growkit
    if script:
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in commands(block):
        mine = growkit_words(words)
        if mine is None:
            if not script:
                require_known(words)
            continue
        parse(mine)
        if not script and not any(word in PARSED_ONLY for word in mine):
            code, out, err = cli(*shrunk(mine))
            assert code == 0, f"{block}: {shlex.join(words)}\n{out}\n{err}"


@pytest.mark.parametrize("page", [page for page in pages() if any(blocks([page]))], ids=name)
def test_the_blocks_of_a_page_work(
    page: Path, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OPERATORS, "_items", dict(OPERATORS.items()))  # a page may register one of its own
    names: dict[str, Any] = {"__name__": "__main__"}  # what one block defines, the next ones use
    for block in blocks([page]):
        if block.title is not None:
            Path(block.title).write_text(block.text)
        if block.not_run is not None:
            continue
        if block.language == "python":
            run_python(block, names)
        elif block.language == "bash":
            run_bash(block)
        elif block.language == "yaml":
            schedule_of(block)
        elif block.language == "json":
            json.loads(block.text)


def test_no_block_is_skipped() -> None:
    """Each is fenced, of a known language, and run, read or, with its reason, neither."""
    not_run: Counter[str] = Counter()
    for block in blocks(pages()):
        assert block.language in CLASSES, f"{block}: give the fence one of the languages {', '.join(CLASSES)}"
        if CLASSES[block.language] == "shown":
            assert not re.search(r"^(\$ |growkit |make |\.venv/)", block.text, re.MULTILINE), f"{block}: is code"
        if block.not_run is not None:
            assert block.not_run, f"{block}: say why it is not run"
            not_run[name(block.path)] += 1
    assert dict(not_run) == NOT_RUN
    for page in pages():
        indented = re.search(r"(?:^|\n)\n(?: {4,}|\t)(?![ \-*\d])", FENCE.sub("", page.read_text(encoding="utf-8")))
        assert not indented, f"{name(page)}: fence the indented block, with its language"
    found = Counter(CLASSES[block.language] for block in blocks(pages()))
    assert found["run"] >= 10 and found["read"] >= 10, found


def test_commands_that_do_not_exist_are_found() -> None:
    for line in ("train", "train x --nope", "trian x", "recipes lost", "grow runs/NAME num_layers=4"):
        with pytest.raises((AssertionError, command_line.UsageError)):
            parse(line.split())
