"""Starts every file ``interpreted_*.py`` in a process of its own, in Triton's interpreter. It shows what kernels
compute, not that they have no races.

``make test`` takes a sample; ``make kernels`` takes what is marked ``kernels`` as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILES = sorted(HERE.glob("interpreted_*.py"))
SAMPLE, ALL = 280, 3000  # seconds, after which a file has hung


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sample_in_the_interpreter(file: Path, tmp_path: Path) -> None:
    interpret(file, "not kernels", tmp_path / "report.xml", SAMPLE)


@pytest.mark.kernels
@pytest.mark.timeout(ALL + 60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_rest_in_the_interpreter(file: Path, tmp_path: Path) -> None:
    interpret(file, "kernels", tmp_path / "report.xml", ALL)


def interpret(file: Path, marks: str, report: Path, limit: float) -> None:
    """Runs the tests of ``file`` that have ``marks``; fails with what failed in there, each with its own words."""
    command = [sys.executable, "-m", "pytest", str(file), "-m", marks, "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--tb=short", f"--junitxml={report}", "--override-ini=timeout=0"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    if done.returncode == 5 and marks == "kernels":
        return  # all of its tests are in the sample
    assert report.exists(), f"{file.name} did not start:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    broken = [(case, found) for case in cases for kind in ("failure", "error") for found in case.findall(kind)]
    said = "\n\n".join(f"{case.get('name')}\n{(found.text or '')[-2500:]}" for case, found in broken[:5])
    assert not broken, f"{len(broken)} of {len(cases)} failed in the interpreter:\n{said}"
    assert done.returncode == 0 and cases, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    assert not skipped, f"skipped in the interpreter: {skipped}"
