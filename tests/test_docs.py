"""The documents say what the code does: every operator has a card, links lead somewhere, fragments and snippets work,
the recipe reference is up to date."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import growkit
from growkit.checkpoint import store
from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.run_folder import step_name
from growkit.config.load import parse_recipe
from growkit.growth.operator import OPERATORS
from growkit.growth.path import ORDER
from growkit.models.presets import PRESETS
from growkit.schedule.plan import GrowthSchedule, growth_schedule
from growkit.schedule.progress import Progress
from tests.support import model_config, trained_like

ROOT = Path(growkit.__file__).parent.parent
DOCS = ROOT / "docs"
CARDS = DOCS / "operators"
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
FIRST = {"name": "first", "duration": "10 steps", "context_length": 64, "global_batch_tokens": 128}


@dataclass(frozen=True)
class Block:
    """A fenced block: ``words`` follow the opening fence, the first one being the language."""

    path: Path
    line: int
    words: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """What a reader is shown; README.md may not be there in an unpacked wheel or before it is written."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path for path in top if path.is_file()] + sorted(DOCS.rglob("*.md"))


def blocks(paths: list[Path], language: str) -> Iterator[Block]:
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            words = tuple(match["info"].split())
            if words and words[0] == language:
                yield Block(path, text[: match.start()].count("\n") + 1, words, match["text"])


def fragments() -> list[Block]:
    """The YAML of the cards that is part of a recipe."""
    found = blocks(sorted(CARDS.glob("*.md")), "yaml")
    return [block for block in found if block.text.startswith(("stages:", "grow:"))]


def snippets() -> list[Block]:
    return [block for block in blocks(pages(), "python") if block.text.startswith("# tested\n")]


def schedule_of(block: Block) -> GrowthSchedule:
    """The schedule of a recipe made of the fragment; ``model.key=value`` after the fence says what it starts from. A
    fragment that begins with ``grow:`` is the second stage."""
    raw: dict[str, Any] = yaml.safe_load(block.text)
    if "grow" in raw:
        raw = {"stages": [FIRST, {"name": "second", "duration": "10 steps"} | raw]}
    raw["model"] = {"preset": "tokenformer"}
    overrides = block.words[1:]
    assert all(word.startswith("model.") for word in overrides), overrides
    return growth_schedule(parse_recipe(yaml.safe_dump(raw), overrides, PRESETS, name=str(block)))


@pytest.mark.parametrize("name", ORDER)
def test_every_operator_has_a_card(name: str) -> None:
    """The card and the table name every method and every key."""
    operator = OPERATORS.get(name, key="operator")
    table = (CARDS / "README.md").read_text(encoding="utf-8")
    card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert f"[`{name}`]({name}.md)" in table
    for word in (*operator.methods, *operator.fields, *operator.options):
        assert f"`{word}`" in table, word
        assert f"`{word}`" in card, word
    for paper in re.findall(r"\d{4}\.\d{5}", operator.source):
        assert paper in card, f"{name}: the source {paper} is not named"


def test_every_card_is_an_operators() -> None:
    assert {path.stem for path in CARDS.glob("*.md")} == set(OPERATORS) | {"README"}


def test_the_table_says_what_the_operators_say() -> None:
    """Rows in the order of the chain, the default method first."""
    table = (CARDS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:\[`(\w+)`\]\(\w+\.md\))? ?\| [^|]*\| ([^|]*)\|", table, re.MULTILINE)
    listed: dict[str, list[str]] = {}
    for name, methods in rows:
        listed.setdefault(name or list(listed)[-1], []).extend(re.findall(r"`(\w+)`", methods))
    assert list(listed) == list(ORDER)
    for name, methods in listed.items():
        assert list(dict.fromkeys(methods)) == list(OPERATORS.get(name, key="operator").methods)


@pytest.mark.parametrize("block", fragments(), ids=str)
def test_a_fragment_is_a_recipe(block: Block) -> None:
    schedule = schedule_of(block)
    grown = {link.operator for stage in schedule.stages for link in stage.links}
    assert grown, "nothing grows"
    assert block.path.stem in (*grown, "README"), "the fragment does not show its card's operator"


def test_every_card_has_a_fragment() -> None:
    assert {block.path.stem for block in fragments()} == set(OPERATORS) | {"README"}


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in ``runs/run``, as a run leaves it, which snippets read."""
    folder = tmp_path_factory.mktemp("docs")
    model = model_config("tokenformer")
    state = trained_like(model, dtype=torch.float32)
    place = folder / "runs" / "run" / "checkpoints" / step_name(18)
    store.write(place, state, Manifest(model=model, progress=Progress(step=18)))
    return folder


@pytest.mark.parametrize("block", snippets(), ids=str)
def test_a_snippet_runs(block: Block, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    code = compile("\n" * block.line + block.text, str(block.path), "exec")
    exec(code, {"__name__": "__main__"})


def test_snippets_are_found() -> None:
    assert {block.path.name for block in snippets()} >= {"checkpoint-format.md", "flops.md"}


def test_the_recipe_reference_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_recipe_reference.py"))
    written = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    assert written == script["render"](), "run scripts/make_recipe_reference.py"
