"""The folder in which every mistake is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.training import FOLDER_VARIABLE
from tests.bad_input.support import RUN, STEPS
from tests.support import cli, recipe_dict


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its corpus and its finished run, all named relative to it."""
    folder = tmp_path_factory.mktemp("bad_input")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = recipe_dict(Path(), trainer={"save_every": "1 steps", "keep_last": 9})
        small["stages"] = small["stages"][:2]
        for stage in small["stages"]:
            stage["duration"] = "2 steps"
        Path("recipe.yaml").write_text(yaml.safe_dump(small))
        code, _, err = cli("train", "recipe.yaml")
        assert (code, err) == (0, "")
        assert RunFolder.open(RUN).steps() == STEPS
        os.environ.pop(FOLDER_VARIABLE, None)
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the template as the working folder."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv(FOLDER_VARIABLE, "")  # put back what a run leaves in the environment
    monkeypatch.delenv(FOLDER_VARIABLE)
    yield Path()
    datasets.enable_progress_bars()
