"""docs/how-to/slurm.md: its script requeues and resumes as it says, and growkit runs under SLURM's variables."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.documents import DOCS, blocks
from tests.support import in_child, records, write_recipe

# What SLURM sets for a task that srun started.
TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "grown",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with the page's job.sh, and stand-ins that write down what they were called with."""
    script = next(block for block in blocks([DOCS / "how-to" / "slurm.md"]) if block.title == "job.sh")
    (tmp_path / "job.sh").write_text(script.text)
    programs = {
        "srun": 'exec "$@"',
        "scontrol": 'echo "scontrol $@" >> calls',
        "growkit": 'echo "growkit $@" >> calls; mkdir -p runs/grown; touch runs/grown/run.json; exit $CODE',
    }
    (tmp_path / "bin").mkdir()
    for name, line in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def job(cluster: Path, code: int, restarts: int) -> tuple[int, list[str]]:
    """The script's exit code and what it called, when growkit ends with ``code``."""
    (cluster / "calls").write_text("")
    path = {"PATH": f"{cluster / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    env = os.environ | path | TASK | {"CODE": str(code), "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", "job.sh"], cwd=cluster, env=env, check=False)
    return done.returncode, (cluster / "calls").read_text().splitlines()


def test_the_script_requeues_and_resumes(cluster: Path) -> None:
    assert job(cluster, 3, 0) == (3, ["growkit train recipe.yaml run.name=grown", "scontrol requeue 77"])
    assert job(cluster, 3, 19) == (3, ["growkit resume runs/grown", "scontrol requeue 77"])
    assert job(cluster, 3, 20) == (3, ["growkit resume runs/grown"])
    assert job(cluster, 2, 1) == (2, ["growkit resume runs/grown"])
    assert job(cluster, 0, 2) == (0, ["growkit resume runs/grown"])


def test_a_run_under_slurm_is_growkits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning, seeing SLURM, would load a pickle that lies in the working folder under its name for them."""
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("not a checkpoint of growkit")
    monkeypatch.chdir(tmp_path)
    assert in_child("train", write_recipe(tmp_path), "run.name=grown", env=TASK) == 0
    assert len(records(tmp_path / "runs" / "grown", "step")) == 18
