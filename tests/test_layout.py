"""The house: imports point down only, heavy libraries stay where they belong, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import growkit

ROOT = Path(growkit.__file__).parent
FLOORS = {
    "cli": 6,
    "train": 5,
    "report": 5,
    "checkpoint": 4,
    "planner": 4,
    "eval": 4,
    "schedule": 3,
    "growth": 2,
    "optim": 2,  # its selectors read the table of parameters
    "models": 1,
    "data": 1,
    "ops": 0,
    "config": 0,
    "registry": 0,
    "duration": 0,
    "errors": 0,
    "faults": 0,
}
# library: packages that may import it
ONLY_IN = {
    "lightning": {"train"},
    "wandb": {"train"},
    "wandb_workspaces": {"train"},
    "datasets": {"data", "eval"},  # eval: its errors
    "transformers": {"data", "checkpoint", "eval"},
    "tokenizers": {"data", "checkpoint"},
    "datasketch": {"data"},
    "py3langid": {"data"},
    "lm_eval": {"eval"},
    "triton": {"ops"},
    "matplotlib": {"report", "train"},  # train: a picture for Weights & Biases
    "plotly": {"report"},
    "typer": {"cli"},
}
# What `growkit --help`, `validate`, `plan`, `report` and the arithmetic of a schedule may load: not torch.
TORCH_FREE = [
    "growkit.cli.main",
    "growkit.cli.recipes",
    "growkit.cli.plan",
    "growkit.cli.reports",
    "growkit.planner.plan",
    "growkit.schedule.plan",
    "growkit.growth.path",
]
MOST_LINES = 500
# Published weights that are a pickle are converted there, and read as tensors alone.
PUBLISHED = ROOT / "checkpoint" / "hf" / "tokenformer.py"


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every imported module's full name, lazy imports included, those for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            if node.module == "growkit":
                yield from (f"growkit.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def package(path: Path) -> str:
    """The part of the house a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_has_a_floor() -> None:
    parts = {package(path) for path in modules()} - {"__init__"}
    assert parts <= set(FLOORS), parts - set(FLOORS)


def test_imports_point_down() -> None:
    for path in modules():
        mine = FLOORS.get(package(path))
        for name in imports(path):
            if name.startswith("growkit.") and mine is not None and name != "growkit.__version__":
                theirs = name.split(".")[1]
                assert FLOORS[theirs] < mine or theirs == package(path) or FLOORS[theirs] == 0 == mine, (path, name)


def test_heavy_libraries_stay_in_their_packages() -> None:
    for path in modules():
        for name in imports(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            assert allowed is None or package(path) in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_help_and_validation_load_neither_torch_nor_lightning() -> None:
    recipe = ROOT.parent / "recipes" / "quickstart.yaml"
    code = (
        "import sys\n"
        f"import {', '.join(TORCH_FREE)}\n"
        "from growkit.cli.recipes import read\n"
        f"read({str(recipe)!r}, [])\n"
        "sys.argv = ['growkit', '--help']\n"
        "try:\n    growkit.cli.main.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'lightning', 'datasets', 'transformers', 'tokenizers', 'matplotlib', 'wandb'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    assert "resume" in said(code)


def test_building_a_model_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from growkit.models.decoder import build, init_params\n"
        "from growkit.models.presets import PRESETS\n"
        "config = PRESETS.get('transformer', key='')(embed_dim=8, num_layers=1, num_heads=1).written_out()\n"
        "build(config, init_params(config, torch.Generator()))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    said(code)


def said(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_are_small() -> None:
    for path in modules():
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_nothing_loads_pickles_or_swallows_errors() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                names = ast.unparse(node.type) if node.type else "everything"
                assert names not in ("everything", "Exception", "BaseException"), f"{path}:{node.lineno}"
                silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                assert not silent, f"{path}:{node.lineno} swallows {names}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                how = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if path == PUBLISHED and called == "torch.load" and how.get("weights_only") == "True":
                    continue
                assert called not in ("torch.load", "pickle.load", "pickle.loads", "torch.save"), (
                    f"{path}:{node.lineno}"
                )
