"""``growkit doctor``: a healthy machine, and each thing that can be wrong with one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from growkit.cli import doctor
from tests.support import cli

Usage = namedtuple("Usage", "total used free")


def findings(*words: object) -> tuple[int, dict[str, dict[str, str]]]:
    """(exit code, what → finding)."""
    code, out, err = cli("doctor", "--json", *words)
    assert not err
    return code, {finding["about"]: finding for finding in json.loads(out)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with slow bf16, without timing it."""
    speeds = {torch.float32: 40e9, torch.bfloat16: 10e9}
    monkeypatch.setattr(doctor.hardware, "measure_peak_flops", lambda _, dtype: speeds[dtype])


def test_a_healthy_machine(tmp_path: Path) -> None:
    code, found = findings("--folder", tmp_path / "runs" / "not" / "yet")
    assert code == 0 and all(finding["state"] != "problem" for finding in found.values())
    assert torch.__version__ in found["torch"]["found"] and "lightning 2" in found["libraries"]["found"]
    assert "selective_scan: auto takes compiled" in found["kernels"]["found"]
    assert "built by" in found["kernels for the CPU"]["found"] and str(tmp_path) in found["disk"]["found"]
    assert not (tmp_path / "runs").exists()
    code, out, _ = cli("doctor", "--folder", tmp_path)
    assert code == 0 and "what to do" in out and "matrix products" in out


def broken(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def set_(owner: Any, name: str, value: Any) -> None:
        monkeypatch.setattr(owner, name, value)

    version = doctor._version
    {
        "disk": lambda: set_(shutil, "disk_usage", lambda _: Usage(10, 9, 1)),
        "forbidden": lambda: set_(tempfile, "TemporaryFile", Mock(side_effect=PermissionError)),
        "library": lambda: set_(doctor, "_version", lambda name: None if name == "plotly" else version(name)),
        "extra": lambda: set_(doctor, "_version", lambda name: None if name == "tensorboard" else version(name)),
        "driver": lambda: set_(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None),
        "compiler": lambda: set_(shutil, "which", lambda _: None),
        "wrong compiler": lambda: set_(doctor.scan, "kernel", lambda: None),
        "threads": lambda: set_(torch, "get_num_threads", lambda: 999),
        "key": lambda: monkeypatch.setenv("WANDB_MODE", "offline"),
        "memory": lambda: set_(doctor, "_available_memory", lambda: 10**8),
        "bf16": lambda: set_(doctor.hardware, "measure_peak_flops", lambda _, d: 1e9 if d == torch.float32 else 9e9),
    }[fault]()


@pytest.mark.parametrize(
    ("fault", "about", "state", "mend"),
    [
        ("disk", "disk", "problem", "free space"),
        ("forbidden", "disk", "problem", "run.folder"),
        ("library", "plotly", "problem", "pip install growkit"),
        ("extra", "tensorboard", "note", "growkit[tensorboard]"),
        ("driver", "GPU", "problem", "CUDA build"),
        ("compiler", "kernels for the CPU", "note", "install a C++ compiler (g++ or"),
        ("wrong compiler", "kernels for the CPU", "note", "$CXX"),
        ("threads", "processor", "note", "run.threads="),
        ("key", "Weights & Biases", "note", "wandb login"),
        ("memory", "memory", "note", "checkpoint_layers"),
        ("bf16", "matrix products", "note", "trainer.precision=bf16"),
    ],
)
def test_what_is_wrong_is_named_with_its_mend(
    fault: str, about: str, state: str, mend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken(monkeypatch, fault)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, found = findings("--folder", tmp_path)
    assert (found[about]["state"], code) == (state, int(state == "problem"))
    assert mend in found[about]["mend"]
