"""The documents as tests see them: pages, their fenced blocks, and the recipe a YAML block is part of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import growkit
from growkit.config.load import parse_recipe
from growkit.config.recipe import StageConfig
from growkit.models.config import to_json
from growkit.models.presets import PRESETS
from growkit.schedule.plan import growth_schedule
from growkit.schedule.stage import GrowthSchedule

ROOT = Path(growkit.__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
STAGE_KEYS = {field.name for field in dataclasses.fields(StageConfig)}
FIRST = {"name": "first", "duration": "10 steps", "context_length": 64, "global_batch_tokens": 128}


@dataclass(frozen=True)
class Block:
    """A fenced block. ``info``: what follows the opening fence; its first word is the language."""

    path: Path
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.path)}:{self.line}"

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def title(self) -> str | None:
        """The file that the block is, where it says so."""
        match = re.search(r'title="([^"]+)"', self.info)
        return match[1] if match else None

    @property
    def not_run(self) -> str | None:
        """Why the block is not run, where it says ``not-run: reason``."""
        match = re.search(r"not-run: *(.*)", self.info)
        return match[1] if match else None


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pages() -> list[Path]:
    """What a reader is shown; README.md may not be there in an unpacked wheel or before it is written."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path for path in top if path.is_file()] + sorted(DOCS.rglob("*.md"))


def blocks(paths: list[Path], language: str | None = None) -> Iterator[Block]:
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            block = Block(path, text[: match.start()].count("\n") + 1, match["info"].strip(), match["text"])
            if language in (None, block.language):
                yield block


def schedule_of(block: Block) -> GrowthSchedule:
    """The schedule of the recipe that a YAML block is, or is part of. ``model.key=value`` after the fence says what a
    fragment starts from. Keys of a stage, and stages that say no context, come after a first stage."""
    raw: Any = yaml.safe_load(block.text)
    raw = {"stages": raw} if isinstance(raw, list) else raw
    if set(raw) <= STAGE_KEYS:
        raw = {"stages": [{"name": "second", "duration": "10 steps"} | raw]}
    stages = raw.get("stages", [])
    if not stages or "context_length" not in stages[0]:
        stages = [FIRST, *stages]
    raw = {"model": {"preset": "tokenformer", "num_layers": 2}} | raw | {"stages": stages}
    overrides = [word for word in block.info.split() if word.startswith("model.")]
    recipe = parse_recipe(yaml.safe_dump(raw), overrides, PRESETS, name=str(block))
    if recipe.data.select is not None and recipe.data.select.reference is not None:  # it is not there: like the model
        recipe.data.select.reference_model = to_json(recipe.model.written_out())
    return growth_schedule(recipe)
