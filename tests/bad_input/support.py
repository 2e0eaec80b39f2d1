"""What the tables of mistakes are made of: a case, how the mistake is arranged, and what its message must be."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from growkit.checkpoint import manifest as manifests

RUN = Path("runs/run")  # two stages of two steps, a checkpoint after each step
STEPS = [1, 2, 3, 4]
LAST = "runs/run/checkpoints/step-00000004"

Arrange = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Case:
    """``words``: the command line. What stderr must say: ``code``, ``key``, ``value``, and ``mend``, a word of what to
    do. ``arrange`` prepares the mistake. ``leaves``: the run may leave its folder behind (it had started)."""

    name: str
    words: str
    code: str
    key: str
    value: str
    mend: str
    arrange: Arrange | None = None
    exit_code: int = 2
    leaves: bool = False


def train(name: str, override: str, code: str, value: str, mend: str, key: str = "") -> Case:
    """A row for ``growkit train recipe.yaml OVERRIDE``; the key to name is the override's unless given."""
    words = f"train recipe.yaml run.name=new {shlex.quote(override)}"
    return Case(name, words, code, key or override.partition("=")[0], value, mend)


def recipe(name: str, text: str, code: str, value: str, mend: str, key: str = "bad.yaml") -> Case:
    """A row for ``growkit validate`` on a file with ``text``."""
    return Case(name, "validate bad.yaml", code, key, value, mend, lambda _: write("bad.yaml", text))


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def no_corpus(_: pytest.MonkeyPatch) -> None:
    Path("corpus.txt").unlink()


def reseal(**changes: object) -> Arrange:
    """Changes the manifest of the last checkpoint and gives it a hash that fits."""

    def arrange(_: pytest.MonkeyPatch) -> None:
        file = Path(LAST, "manifest.json")
        body = json.loads(file.read_bytes())["body"] | changes
        file.write_bytes(manifests._seal({k: v for k, v in body.items() if v is not None}))

    return arrange


def break_log(_: pytest.MonkeyPatch) -> None:
    log = RUN / "metrics.jsonl"
    log.write_bytes(b"{cut\n" + log.read_bytes())
    (RUN / "curve.png").unlink()  # a complete run without its picture draws it


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file and the name of every folder, the lock apart (it holds the last writer's process)."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        for file in sorted(folder.rglob("*"))
        if file.name != "run.lock" and not file.is_char_device()
    }


def assert_one_message(case: Case, code: int, err: str) -> None:
    assert code == case.exit_code, err
    assert "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith(f" [{case.code}]\n"), err
    for part in (case.key, case.value, case.mend):
        assert part in err, (part, err)


MORE = "stages: [{name: more, duration: 2 steps}]\n"


def bare_checkpoint(text: str) -> Arrange:
    """The last checkpoint as one that no recipe of growkit made."""

    def arrange(patch: pytest.MonkeyPatch) -> None:
        reseal(recipe="")(patch)
        shutil.move(LAST, "bare")
        write("more.yaml", text)

    return arrange
