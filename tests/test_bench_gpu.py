"""scripts/bench_gpu.py without a GPU: what it calculates, what its checks see, and all of it once, tiny, in Triton's
interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from growkit.ops.selective_scan import PATHS
from scripts import bench_gpu, gpu_arms, gpu_checks
from scripts import gpu_figures as figures
from tests.documents import ROOT

CPU = torch.device("cpu")
RATES = figures.Rates(4e12, 8e14, 2e9, 100, "nvidia")
MACHINE = {"device": "NVIDIA H200", "interpreted": False}
CASE = gpu_checks.ScanCase((2, 7, 5, 3), torch.float32, documents=3)


def test_floors_of_the_scan() -> None:
    """By hand: 8 · 1000 · 500 rows of two bytes, and 16 states in each."""
    floors = figures.scan_floors((8, 1000, 500, 16), 2, RATES, {"forward": 10.0, "backward": None})
    states = 8 * 1000 * 500 * 16
    assert floors["forward"]["exponentials"] == pytest.approx(1e3 * states / (16 * 100 * 2e9))
    assert floors["forward"]["issue"] == pytest.approx(1e3 * states * 10 / (128 * 100 * 2e9))
    assert floors["backward"]["issue"] is None
    moved = 4 * 8e6 + 2 * 8 * 1000 * 16 * 2 + 4 * (500 * 16 + 1000) + 4 * 8 * 500 * 16 * (16 + 1)
    assert floors["forward"]["bytes"] == pytest.approx(1e3 * moved / 4e12)
    assert figures.scan_bytes((8, 1000, 500, 16), 4)["backward"] > 7 * 16e6
    unclocked = figures.scan_floors((8, 1000, 500, 16), 2, RATES._replace(clock=None), {"forward": 10.0})
    assert set(unclocked["forward"].values()) == {floors["forward"]["bytes"], None}


def test_what_is_counted_of_pattention() -> None:
    assert figures.pattention_flops(2, 3, 5) == 12 * 2 * 3 * 5
    one, two = (figures.pattention_bytes(10_000, 64, n, 128, 1) for n in (1000, 2000))
    assert two - one == 12 * 64 * 1000 + 128 * 6 * 1000, "not by T · n"
    assert figures.pattention_bytes(64, 64, 1000, 128, 1) < figures.pattention_bytes(128, 64, 1000, 128, 1)


def scan_row(forward: float | None, backward: float) -> dict[str, Any]:
    each = {"forward": {"triton": forward}, "backward": {"triton": backward, "loop": 50.0}}
    floors = {way: {"bytes": 0.05, "exponentials": 0.1, "issue": None} for way in each}
    without = {"mamba_ssm": "not installed"}
    found = {"shape": list(figures.GOAL_SHAPE), "dtype": "bfloat16", "milliseconds": each, "floors": floors}
    return found | {"without": without}


def pattention_row(d: int, share: float, times: float | None, memory: float = 0.3) -> dict[str, Any]:
    found = {"shape": [16384, d, 4096], "theta": "l2_norm_gelu", "share_of_matrix_rate": share, "times_formula": times}
    found |= {"memory_of_formula": memory, "memory_of_counted": 1.0, "triton_milliseconds": 1.0, "teraflops": 500.0}
    return found | {"times_eager": 2.0, "megabytes": 512.0}


def met(report: dict[str, Any]) -> dict[str, bool | None]:
    return {row["target"].replace("Pattention l2_norm_gelu, ", ""): row["met"] for row in figures.targets(report)}


def test_targets_are_judged_by_the_worst_row_and_on_their_gpu() -> None:
    forward, backward = (
        f"scan {way}, 8 × 2048 × 1536 × 16 bfloat16, ms, on an H200" for way in ("forward", "backward")
    )
    report: dict[str, Any] = {"machine": MACHINE, "scan": [scan_row(0.16, 0.49)]}
    assert met(report) == {forward: True, backward: False}
    assert met(report | {"machine": MACHINE | {"device": "NVIDIA A100"}}) == {forward: None, backward: None}
    assert met({"machine": MACHINE}) == {forward: None, backward: None}
    speed = "times as fast as the formula under torch.compile"
    report["pattention"] = [
        pattention_row(1024, 0.7, 0.95),
        pattention_row(2048, 0.6, 0.91),
        pattention_row(64, 0.1, 1.3),
    ]
    report["norms"] = [{"rule_over_best": 1.0}, {"rule_over_best": 1.2}]
    found = met(report)
    assert found["d ≥ 1024: share of the measured matrix rate"] is True
    assert found[f"d ≥ 1024: {speed}"] is True and found[f"d ≤ 256: {speed}"] is True
    assert found["Pattention: memory, of the formula's"] is True
    assert found["Pattention: the norm's way by rule, time over the faster one"] is False
    report["pattention"] += [pattention_row(1536, 0.59, 0.89), pattention_row(256, 0.1, None, 1.01)]
    found = met(report)
    assert found["d ≥ 1024: share of the measured matrix rate"] is False and found[f"d ≥ 1024: {speed}"] is False
    assert found[f"d ≤ 256: {speed}"] is None, "one of them was not measured"
    assert found["Pattention: memory, of the formula's"] is False
    assert set(met(report | {"machine": MACHINE | {"interpreted": True}}).values()) == {None}


def test_tables_have_what_is_there_and_say_what_is_not() -> None:
    report: dict[str, Any] = {"machine": MACHINE, "scan": [scan_row(0.1234, 1234.5)]}
    report["pattention"] = [pattention_row(1024, 0.7, None)]
    text = figures.tables(report)
    assert "| 8 × 2048 × 1536 × 16 bfloat16 | 0.123 | 0.05 | 0.1 | – |" in text
    assert "| 8 × 2048 × 1536 × 16 bfloat16 | 1,234 | 50 | 0.05 | 0.1 | – |" in text
    assert "| 16384, 1024, 4096 | l2_norm_gelu | 1 | 500 | 0.7 | – | 2 | 512 | 0.3 | 1 |" in text
    assert "Gram" not in text and "| 1,234 | ≤ 0.48 | **no** |" in text
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1, "a row of another length"


SAID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at forward_kernel+0x1b0 in triton_kernels.py:131
=========     by thread (31,0,0) in block (4,0,0)
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void cutlass::Kernel2<sm90>(T1::Params)+0x40
=========
========= ERROR SUMMARY: 2 errors
"""


def test_what_the_sanitizer_says_of_our_kernels_and_of_others() -> None:
    assert figures.sanitizer_verdict(SAID) == {"ours": 1, "others": 1}
    assert figures.sanitizer_verdict("========= ERROR SUMMARY: 0 errors\n") == {"ours": 0, "others": 0}
    hazard = "========= Error: Race reported between Write access at score_gradients+0x1\n=========\n"
    hazard += "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert figures.sanitizer_verdict(hazard) == {"ours": 1, "others": 0}
    assert figures.sanitizer_verdict("bad\nno driver\n") == {"did_not_run": "no driver"}
    unsupported = "========= Device not supported\n========= ERROR SUMMARY: 1 error\n"
    assert "did_not_run" in figures.sanitizer_verdict(unsupported)


def test_a_failure_makes_the_run_fail(capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = {"case": "a", "problem": None}, {"case": "b", "problem": "y is off by 1"}
    assert bench_gpu.report_failures({"checks": [right], "sanitizer": {"memcheck": {"ours": 0, "others": 3}}}) == 0
    assert bench_gpu.report_failures({"checks": [right, wrong]}) == 1
    assert "failed: b: y is off by 1" in capsys.readouterr().err
    assert bench_gpu.report_failures({"sanitizer": {"racecheck": {"ours": 1, "others": 0}}}) == 1
    assert bench_gpu.report_failures({"sanitizer": {"racecheck": {"did_not_run": "not installed"}}}) == 0


def test_each_tool_of_the_sanitizer_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f'#!/bin/sh\nprintf "%s " "$@" >>{tmp_path}/said\ncat {tmp_path}/$2\nexit $(cat {tmp_path}/$2.rc)\n'
    )
    program.chmod(0o755)
    for tool, text, status in (("memcheck", SAID, 9), ("racecheck", "no device", 1), ("initcheck", SAID, 1)):
        (tmp_path / tool).write_text(text)
        (tmp_path / f"{tool}.rc").write_text(str(status))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu_checks.sanitized(Path("bench.py"), bench_gpu.SANITIZERS)
    assert found["memcheck"] == {"ours": 1, "others": 1}
    assert found["racecheck"] == {"did_not_run": "no device"}
    assert found["initcheck"]["failed"].endswith("2 errors\n")
    assert (tmp_path / "said").read_text().count("bench.py --few") == 3
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found = gpu_checks.sanitized(Path("bench.py"), ["memcheck"])
    assert found == {"memcheck": {"did_not_run": "compute-sanitizer is not installed"}}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda y, calls: y, None),
        (lambda y, calls: y * 1.001, "y is off by"),
        (lambda y, calls: torch.full_like(y, torch.nan) * y, "y is off by nan"),
        (lambda y, calls: y[:, 1:], "y is .* and should be"),
        (lambda y, calls: y * (1 + 1e-6 * (len(calls) == 3)), "y has other bits in repetition 2"),
        (lambda y, calls: y + 0 * torch.empty_like(y), "y is off by nan"),  # nobody wrote there
        (lambda y, calls: y.detach() + 0.9 * (y - y.detach()), "gradient of x is off by"),
    ],
)
def test_checks_see_what_is_wrong(spoil: Any, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def op(*tensors: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        y, last = PATHS["reference"](*tensors, **named)
        return spoil(y, calls), last

    monkeypatch.setattr(gpu_checks.scan_triton, "selective_scan", op)
    found = gpu_checks.check(CASE, CPU, 3, poison=True, reference_on=CPU)
    if said is None:
        assert found["problem"] is None and 0 < found["error_over_allowed"] < 1 and len(calls) == 4
    else:
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(found["problem"])


def test_inputs_of_checks_lie_in_memory_as_they_should() -> None:
    plain = gpu_checks._leaves(gpu_checks._scan_inputs(CASE, CPU), "triton", CPU)
    assert not any(plain[name].is_contiguous() for name in ("x", "dt", "z")) and plain["x"].stride(1) == 15
    turned = gpu_checks._leaves(gpu_checks._scan_inputs(CASE._replace(turned=True), CPU), "triton", CPU)
    assert not any(turned[name].is_contiguous() for name in ("x", "A", "B", "h0"))
    wide = gpu_checks._leaves(gpu_checks._scan_inputs(CASE, CPU), "reference", CPU)
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64}
    names = [gpu_checks.label(case) for scale in ("full", "few", "tiny") for case in gpu_checks.cases(scale)]
    assert len(set(names)) == len(names) > 100


def test_a_time_begins_after_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the GPU's queue: the cache is written over, the host gets its head start, and only then is time taken."""
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def synchronize(self) -> None:
            queue.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 12.5

    class Buffer:
        def zero_(self) -> None:
            queue.append("cache")

    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda ticks: queue.append(f"pause {ticks}"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **how: Buffer())
    watch = gpu_arms.Stopwatch(torch.device("cuda"))
    assert watch.ticks_per_second == 2e7 / 12.5e-3
    queue.clear()
    assert watch.seconds(lambda: queue.append("work"), 1e-3) == 12.5e-3
    assert queue == ["cache", "pause 1600000", "event", "work", "event", "wait"]

    def fails() -> None:
        raise torch.OutOfMemoryError

    found, without = watch.in_turns({"a": lambda: None, "b": fails}, 2)
    assert found == {"a": [12.5e-3, 12.5e-3]} and without == {"b": "out of memory"}


@pytest.mark.parametrize("name", ["mamba_ssm", "fla (hgrn)", "reference, compiled"])
def test_peers_are_given_the_same_scan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stand-ins that compute what the packages say they do, in their layouts: output and every gradient."""

    def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **named: Any) -> Tensor:
        assert named.pop("delta_softplus") and all(t.stride(-1) == 1 for t in (u, delta, B, C, named["z"]))
        u, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (u, delta, B, C, named["z"]))
        return PATHS["reference"](u, delta, A, B, C, D, dt_bias_D=named["delta_bias"], z_BLD=z)[0].transpose(1, 2)

    def chunk_hgrn(x: Tensor, g: Tensor) -> tuple[Tensor, None]:
        h, found = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = g[:, t].exp() * h + x[:, t]
            found.append(h)
        return torch.stack(found, 1), None

    for module, functions in (
        ("mamba_ssm.ops.selective_scan_interface", [selective_scan_fn]),
        ("fla.ops.hgrn", [chunk_hgrn]),
    ):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        for function in functions:
            setattr(sys.modules[module], function.__name__, function)
    monkeypatch.setattr(gpu_arms, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu_arms, "compiled", lambda function: function)
    inputs = gpu_arms.ScanInputs((2, 6, 5, 3), torch.float32, CPU)
    made, without = gpu_arms.scan_arms(inputs, 4, slow=True)
    assert set(made) == {"triton", "loop", "reference, compiled", "mamba_ssm", "fla (hgrn)"} and not without
    ours, peer = (gpu_arms.scan_runs(made[arm], inputs.upstream) for arm in ("loop", name))
    assert bench_gpu.relative(peer["forward"]().detach(), ours["forward"]().detach()) < 1e-6
    for _ in range(2):  # the graph is kept
        for a, b in zip(peer["backward"](), ours["backward"](), strict=True):
            assert bench_gpu.relative(a.transpose(1, 2) if a.shape != b.shape else a, b) < 1e-5
    monkeypatch.setattr(gpu_arms, "find_spec", lambda name: None)
    made, without = gpu_arms.scan_arms(inputs, 4, slow=True)
    assert without == {"mamba_ssm": "not installed", "fla (hgrn)": "not installed"} and len(made) == 3


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm"])
def test_the_formula_is_pattention(theta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_arms, "compiled", lambda function: function)
    inputs = gpu_arms.PattentionInputs(9, 6, 20, CPU)
    arms = gpu_arms.pattention_arms(inputs, theta)
    wanted = [arms["chunks"](), *inputs.both(arms["chunks"])()]
    for name in ("formula, compiled", "formula, eager"):
        for a, b in zip([arms[name](), *inputs.both(arms[name])()], wanted, strict=True):
            assert bench_gpu.relative(a.detach(), b.detach()) < 1.5e-2, name


def test_without_a_gpu_it_ends_with_one_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench_gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("error: device: got 'cpu'; ") and said.err.endswith("[no-triton]\n")
    assert "torch sees none" in said.err and "--smoke" in said.err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench_gpu.main([]) == 2
    assert "TRITON_INTERPRET: got '1'" in capsys.readouterr().err


def test_the_whole_of_it_in_the_interpreter(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / "bench_gpu.py"), "--smoke", "--rounds", "1", "--repeats", "1"]
    command += ["--sanitize", "--output", str(output)]
    environment |= {"OMP_NUM_THREADS": "1", "PATH": "/nowhere"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert {check["problem"] for check in report["checks"]} == {None} and len(report["checks"]) == 6
    assert all(0 < check["error_over_allowed"] <= 1 for check in report["checks"])
    (scan,) = report["scan"]
    arms = {"triton", "loop", "reference, compiled"}
    assert set(scan["milliseconds"]["forward"]) == set(scan["milliseconds"]["backward"]) == arms
    assert [row["theta"] for row in report["pattention"]] == ["l2_norm_gelu", "gelu_l2_norm"]
    assert all(row["times_formula"] > 0 for row in report["pattention"])
    assert [row["rule"] for row in report["norms"]] == ["squares"]
    assert {row["met"] for row in report["targets"]} == {None}
    assert report["sanitizer"]["memcheck"] == {"did_not_run": "compute-sanitizer is not installed"}
    assert sum(line.startswith("|---") for line in done.stdout.splitlines()) == 6, "a table is missing"
