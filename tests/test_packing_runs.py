"""Runs on rows of documents: packed, bounded and mixed, stopped and resumed they are bitwise the runs that never
stopped; what is padding is said."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from growkit.checkpoint.run_folder import RunFolder
from growkit.data.stream import padding
from tests.support import in_child, recipe_dict, records, write_recipe
from tests.test_resume import assert_same_run


def texts(folder: Path, letters: str) -> str:
    """A folder of documents of 5 to 60 bytes."""
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(letters[number % len(letters)] * (5 + number * 7 % 55))
    return str(folder)


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_stopped_and_resumed(packing: str, tmp_path: Path) -> None:
    mixture = [
        {"source": texts(tmp_path / "many", "abc"), "weight": 3},
        {"source": texts(tmp_path / "few", "xyz"), "weight": 1},
    ]
    small = recipe_dict(tmp_path, monitor={"ngram_order": 0, "sample_tokens": 0, "validation_tokens": 64})
    small["data"] = {"mixture": mixture, "packing": packing, "validation_fraction": 0.2}
    path = write_recipe(tmp_path, small)
    assert in_child("train", path, "run.name=whole") == 0
    env = {"GROWKIT_FAULT": "after_rename:2"}
    assert in_child("train", path, "run.name=stopped", env=env) == -signal.SIGKILL
    assert in_child("resume", tmp_path / "runs" / "stopped") == 0
    assert_same_run(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole")
    progress = RunFolder.open(tmp_path / "runs" / "whole").load().manifest.progress
    rows = progress.data["rows"]
    assert abs(rows[0] - 3 * rows[1]) < 4
    step = records(tmp_path / "runs" / "whole", "step")[-1]
    if packing == "documents":
        assert "padding" not in step and progress.cursor == progress.tokens
    else:
        assert step["padding"] == padding(progress.data) > 0
        assert progress.cursor + step["padding"] == progress.tokens
