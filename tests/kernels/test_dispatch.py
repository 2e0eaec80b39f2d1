"""Which path is chosen: on a CPU, with a GPU of either make, in the interpreter, and what is said where none can be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from growkit.errors import ConfigError
from growkit.ops import dispatch, tiling
from growkit.ops.dispatch import choose, resolve_backend
from growkit.ops.selective_scan import triton as scan_triton


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    resolve_backend.cache_clear()
    yield
    resolve_backend.cache_clear()


def machine(monkeypatch: pytest.MonkeyPatch, *, capability: Any = None, hip: str | None = None) -> None:
    """One with a GPU of this capability, or one of AMD's."""
    monkeypatch.setattr(dispatch, "PROVEN", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_backend("op", "auto") == "compiled"
    with pytest.raises(ConfigError, match=r"sees none; .*trainer\.backend=auto, compiled or reference") as caught:
        resolve_backend("op", "triton")
    assert (caught.value.code, caught.value.key, caught.value.value) == ("no-triton", "trainer.backend", "triton")


@pytest.mark.parametrize(
    ("gpu", "chosen"),
    [
        ({"capability": (9, 0)}, "triton"),
        ({"capability": (8, 0)}, "triton"),
        ({"capability": (7, 5)}, "compiled"),
        ({"capability": (9, 4), "hip": "6.4"}, "triton"),
    ],
)
def test_auto_with_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any], chosen: str) -> None:
    machine(monkeypatch, **gpu)
    assert resolve_backend("op", "auto") == chosen


def test_auto_takes_no_kernels_that_have_not_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, capability=(9, 0))
    monkeypatch.setattr(dispatch, "PROVEN", False)
    assert resolve_backend("op", "auto") == "compiled" and resolve_backend("op", "triton") == "triton"


def test_too_old_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, capability=(7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 8\.0, and this GPU has 7\.5"):
        resolve_backend("op", "triton")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, capability=(9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert resolve_backend("op", "auto") == "compiled"
    with pytest.raises(ConfigError, match=r"needs the package triton; install it: pip install 'growkit\[gpu\]'"):
        resolve_backend("op", "triton")


def test_in_the_interpreter_triton_runs_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("op", "triton") == "triton"
    assert resolve_backend("op", "auto") == "compiled"


def test_auto_goes_by_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU still scores small models on its CPU; a path that was named takes everything."""
    machine(monkeypatch, capability=(9, 0))
    paths: dict[str, Any] = {"compiled": lambda x: "compiled", "reference": lambda x: "reference"}
    x = torch.zeros(1)
    assert choose("op", "auto", paths, lambda: lambda x: "triton")(x) == "compiled"
    assert choose("op", "triton", paths, lambda: lambda x: "triton")(x) == "triton"
    assert choose("op", "reference", paths, lambda: pytest.fail("loaded"))(x) == "reference"


def test_it_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    machine(monkeypatch, capability=(9, 0))
    with caplog.at_level("INFO", logger="growkit.ops.dispatch"):
        for _ in range(3):
            resolve_backend("op", "auto")
    assert [record.getMessage() for record in caplog.records] == [
        "op op runs on the triton path for tensors on a GPU, on the compiled path for others"
    ]


def test_kernels_that_auto_leaves_aside_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, capability=(9, 0))
    monkeypatch.setattr(dispatch, "PROVEN", False)
    with caplog.at_level("INFO", logger="growkit.ops.dispatch"):
        resolve_backend("op", "auto")
    assert [record.getMessage() for record in caplog.records] == [
        "op op runs on the compiled path; Triton's kernels, which have not been tried on a GPU yet, "
        "run with trainer.backend=triton"
    ]


def test_triton_is_loaded_only_when_chosen() -> None:
    code = (
        "import sys\nimport growkit, growkit.ops.pattention, growkit.ops.selective_scan as scan\n"
        "scan.selective_scan('compiled')\n"
        "assert 'triton' not in sys.modules, 'loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("apart", [2**25 - 1, 2**25])
def test_tokens_further_apart_than_32_bits_reach_over_a_block_are_brought_together(apart: int) -> None:
    room = torch.empty(apart + 4, dtype=torch.uint8)  # of which eight bytes are ever touched
    rows = room.as_strided((1, 2, 4), (0, apart, 1))
    rows.copy_(torch.arange(8).view(1, 2, 4))
    dense = scan_triton._rows_dense(rows)
    assert (dense.stride(1) == apart) == (apart * tiling.KEPT + 4 <= 2**31) == (apart < 2**25)
    assert torch.equal(dense, rows)
