"""Whether the kernels are right on this GPU: outputs and every gradient against the reference in float64, from the same
numbers; the same bits every time; and, where it is installed, what compute-sanitizer says. For scripts/bench_gpu.py.

What is not written is seen: ``torch.empty`` is full of NaN while a case runs, and a NaN is never within a tolerance.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growkit.ops import tiling
from growkit.ops.pattention import PATHS as PATTENTION
from growkit.ops.pattention import Tokens
from growkit.ops.pattention import triton as pattention_triton
from growkit.ops.selective_scan import PATHS as SCAN
from growkit.ops.selective_scan import triton as scan_triton
from scripts.gpu_figures import sanitizer_verdict

# Norm-wise relative error, by the dtype of the result. The scan computes in float32 and rounds once at the end, by
# at most 2^-8 and 2^-11. A GPU's exponential is good to 2^-22, once for each of the some fifty tokens a state
# remembers; sums over tokens add roundings of their own.
SCAN_ERROR = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Pattention rounds after each of five steps in sixteen bits: 2^-9 · √5 and more; in float32 its GELU is good to 7.5e-8
# and sums have some thousand terms.
PATTENTION_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.3e-3}
INTERPRETED = 2  # times as much: Triton's interpreter cuts off where a GPU rounds
REPORTS = 9  # exit status of the sanitizer when it has something to report
TOO_LONG = 500  # seconds, for one of its tools
SIDE = 2048  # of the products that keep the GPU busy beside every second repetition
NAMES = {"dt_bias": "dt_bias_D", "z": "z_BLD", "h0": "h0_BDN"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Tensors = dict[str, Tensor]


class ScanCase(NamedTuple):
    size: tuple[int, int, int, int]  # B, L, D, N
    dtype: torch.dtype
    options: tuple[str, ...] = ("dt_bias", "z", "h0")
    documents: int | None = None  # tokens of a document
    spans: int | None = None  # how many at most; by default what the kernels choose
    turned: bool = False  # rows that do not lie side by side, and an expanded gradient


class PattentionCase(NamedTuple):
    size: tuple[int, int, int]  # T, width in, width out
    banks: tuple[int, ...]
    dtype: torch.dtype
    theta: str
    scope: str = "bank"
    gram: bool | None = None  # which way to the norm; by default what the rule chooses
    turned: bool = False


Case = ScanCase | PattentionCase


def cases(scale: str) -> list[Case]:
    """``full``, ``few`` (under a sanitizer, where everything takes a hundred times as long) or ``tiny``."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if scale != "full":
        B, L, D, N = (2, 131, 70, 16) if scale == "few" else (1, 9, 5, 3)
        T, d, e, n = (150, 72, 40, 320) if scale == "few" else (19, 6, 5, 25)
        scans = [ScanCase((B, L, D, N), bf16, documents=L // 3, spans=most) for most in (1, 3)]
        scans += [ScanCase((B, L, D, N), fp32, turned=True)]
        both = [PattentionCase((T, d, e), (n, 13), bf16, "l2_norm_gelu", gram=gram) for gram in (False, True)]
        return [*scans, *both, PattentionCase((T, d, e), (n, 13), fp32, "gelu_l2_norm", "shared", turned=True)]
    found: list[Case] = []
    for dtype in DTYPES:
        found += [ScanCase(size, dtype) for size in ((2, 1000, 141, 16), (3, 1, 33, 16), (2, 2048, 1536, 16))]
        found += [ScanCase((2, 777, 65, 16), dtype, documents=100, spans=most) for most in (1, 3, 64)]
        found.append(ScanCase((2, 257, 65, 16), dtype, documents=40, turned=True))
        for theta in ("l2_norm_gelu", "gelu_l2_norm"):
            for banks, scope in (((1000,), "bank"), ((1000, 13, 3), "bank"), ((1000, 13, 3), "shared")):
                found.append(PattentionCase((63, 17, 31), banks, dtype, theta, scope))
            found.append(PattentionCase((1, 64, 64), (128,), dtype, theta))
            found.append(PattentionCase((1030, 130, 257), (640, 144), dtype, theta))
            found.append(PattentionCase((4096, 1024, 1024), (4096,), dtype, theta))
            found.append(PattentionCase((999, 72, 40), (320, 13), dtype, theta, turned=True))
        # Several chunks of rows: 2^25 elements of a buffer are passed.
        found.append(PattentionCase((9000, 64, 64), (16384,), dtype, "l2_norm_gelu"))
    # Every kernel takes seconds to compile: what else there is of the scan, in one dtype.
    found += [ScanCase((2, 333, 37, N), bf16, documents=50) for N in (1, 3, 4, 8, 24, 29, 64, 128, 256)]
    found += [ScanCase((2, 130, 65, 16), bf16, options) for options in ((), ("z",), ("dt_bias", "h0"))]
    for dtype in (bf16, torch.float16):
        for size in ((1000, 64, 96), (1000, 128, 128), (2048, 512, 512)):
            found += [PattentionCase(size, (1024, 300), dtype, "l2_norm_gelu", gram=way) for way in (True, False)]
    return found


def label(case: Case) -> str:
    said = [f"{name}={value}" for name, value in case._asdict().items() if value is not None]
    return f"{'scan' if isinstance(case, ScanCase) else 'pattention'} {' '.join(said)}".replace("torch.", "")


def check(
    case: Case, device: torch.device, repeats: int, *, poison: bool, reference_on: torch.device
) -> dict[str, Any]:
    """The largest error over what is allowed of it, and what is wrong: empty where nothing is."""
    run: Any = _scan if isinstance(case, ScanCase) else _pattention
    inputs: Any = _scan_inputs if isinstance(case, ScanCase) else _pattention_inputs
    leaves = inputs(case, device)
    with forced(case):

        def ours() -> Tensors:
            with poisoned(poison):
                return run("triton", case, leaves, device)

        found = ours()
        wanted = run("reference", case, leaves, reference_on)
        worst, problem = compared(found, wanted, _allowed(case, device))
        changed = None if problem else _changed(ours, found, repeats)
    finite = worst if math.isfinite(worst) else None  # JSON has no NaN
    return {"case": label(case), "error_over_allowed": finite, "problem": problem or changed}


def compared(found: Tensors, wanted: Tensors, allowed: dict[torch.dtype, float]) -> tuple[float, str | None]:
    """The largest error over what is allowed, and which tensor is beyond it."""
    worst, problem = 0.0, None
    for name, tensor in wanted.items():
        ours = found[name]
        if ours.shape != tensor.shape:
            return math.nan, f"{name} is {tuple(ours.shape)} and should be {tuple(tensor.shape)}"
        norm = float(tensor.norm())
        error = float((ours.to(tensor.device).double() - tensor).norm()) / (norm or 1.0)
        share = error / allowed[ours.dtype]
        if not share <= 1 and problem is None:  # NaN, too
            problem = f"{name} is off by {error:.2g}, and {allowed[ours.dtype]:.2g} are allowed"
        worst = share if not share <= worst else worst
    return worst, problem


def _changed(run: Callable[[], Tensors], first: Tensors, repeats: int) -> str | None:
    """Which tensor is not the same to the bit when it is computed again; every second time beside other work."""
    device = next(iter(first.values())).device
    for turn in range(repeats):
        with busy(device, turn % 2 == 1):
            again = run()
        for name, tensor in first.items():
            if not torch.equal(again[name], tensor):
                return f"{name} has other bits in repetition {turn + 1}"
    return None


@contextmanager
def busy(device: torch.device, wanted: bool) -> Iterator[None]:
    """Other work on the GPU: programs then begin in another order, which a race would show."""
    if not wanted or device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    a = torch.ones(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    b = torch.zeros_like(a)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(8):
            torch.mm(a, a, out=b)
    yield
    torch.cuda.current_stream(device).wait_stream(stream)


@contextmanager
def poisoned(wanted: bool) -> Iterator[None]:
    """``torch.empty`` is full of NaN. A warning of what is not deterministic would be of torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextmanager
def forced(case: Case) -> Iterator[None]:
    """How many spans, or which way to the norm."""
    chosen, ratio = scan_triton._spans, tiling.GRAM_RATIO
    if isinstance(case, ScanCase) and case.spans is not None:
        most = case.spans
        scan_triton._spans = lambda x, states, name, _: chosen(x, states, name, most)  # type: ignore[assignment]
    elif isinstance(case, PattentionCase) and case.gram is not None:
        tiling.GRAM_RATIO = 0 if case.gram else 10**9
    try:
        yield
    finally:
        scan_triton._spans, tiling.GRAM_RATIO = chosen, ratio


def _allowed(case: Case, device: torch.device) -> dict[torch.dtype, float]:
    table = SCAN_ERROR if isinstance(case, ScanCase) else PATTENTION_ERROR
    return {dtype: most * (INTERPRETED if device.type == "cpu" else 1) for dtype, most in table.items()}


def _leaves(inputs: Tensors, path: str, device: torch.device) -> Tensors:
    """As leaves of a graph, lying in memory as they do; for the reference the same numbers in float64."""
    plain = {name: tensor.detach() for name, tensor in inputs.items()}
    if path == "reference":
        plain = {name: tensor.to(device, torch.float64) for name, tensor in plain.items()}
    return {name: tensor.requires_grad_() for name, tensor in plain.items()}


def _gradients(outputs: Tensors, leaves: Tensors, turned: bool) -> Tensors:
    generator, upstream = torch.Generator().manual_seed(9), []
    for out in outputs.values():
        drawn = torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out.device, out.dtype)
        # As of a sum: one number for all, which no kernel may take for rows that lie side by side.
        upstream.append(drawn.flatten()[0].expand(out.shape) if turned else drawn)
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    return {name: out.detach() for name, out in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def _turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def _scan_inputs(case: ScanCase, device: torch.device) -> Tensors:
    """x, dt and z are parts of one projection, as in a model; some Δ lie above 20."""
    B, L, D, N = case.size
    generator = torch.Generator().manual_seed(sum(case.size))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, dt, z = draw(B, L, 3 * D).to(case.dtype).chunk(3, -1)
    bias = draw(D) - 3
    bias[::7] += 23
    found = {"x": x, "dt": dt, "A": -8 * torch.rand(D, N, generator=generator).to(device) - 0.01}
    found |= {"B": draw(B, L, N).to(case.dtype), "C": draw(B, L, N).to(case.dtype), "D": draw(D)}
    optional = {"dt_bias": bias, "z": z, "h0": draw(B, D, N)}
    found |= {name: optional[name] for name in case.options}
    return {name: _turned(tensor) if case.turned else tensor for name, tensor in found.items()}


def _scan(path: str, case: ScanCase, inputs: Tensors, device: torch.device) -> Tensors:
    leaves = _leaves(inputs, path, device)
    B, L = case.size[:2]
    segments = None
    if case.documents is not None:  # which end elsewhere in every sequence
        tokens = torch.arange(L)[None] + 3 * torch.arange(B)[:, None]
        segments = (tokens // case.documents).to(device)
    op = scan_triton.selective_scan if path == "triton" else SCAN["reference"]
    needed = (leaves[name] for name in ("x", "dt", "A", "B", "C", "D"))
    optional = {NAMES[name]: leaves[name] for name in case.options}
    y, last = op(*needed, **optional, segments_BL=segments)
    return _gradients({"y": y, "h_T": last}, leaves, case.turned)


def _pattention_inputs(case: PattentionCase, device: torch.device) -> Tensors:
    """Scores of standard deviation 1."""
    T, width, out = case.size
    generator = torch.Generator().manual_seed(T + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    found = {"x": draw(T, width)} | {f"keys {at}": draw(n, width) * width**-0.5 for at, n in enumerate(case.banks)}
    found |= {f"values {at}": draw(n, out) for at, n in enumerate(case.banks)}
    return {name: _turned(t.to(case.dtype)) if case.turned else t.to(case.dtype) for name, t in found.items()}


def _pattention(path: str, case: PattentionCase, inputs: Tensors, device: torch.device) -> Tensors:
    leaves = _leaves(inputs, path, device)
    keys, values = ([t for name, t in leaves.items() if name.startswith(kind)] for kind in ("keys", "values"))
    taus = [2.5 + at for at in range(1 if case.scope == "shared" else len(case.banks))]
    op = pattention_triton.pattention if path == "triton" else PATTENTION["reference"]
    (out,) = op(leaves["x"], [Tokens(keys, values, list(taus), case.theta, case.scope)])
    return _gradients({"output": out}, leaves, case.turned)


def sanitized(script: Path, tools: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each of these tools of compute-sanitizer says of a few small cases, each in a process of its own."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {tool: {"did_not_run": "compute-sanitizer is not installed"} for tool in tools}
    found = {}
    # A caching allocator hides what is read beyond a tensor, or before it is written.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in tools:
        command = [program, "--tool", tool, "--error-exitcode", str(REPORTS), sys.executable, str(script), "--few"]
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TOO_LONG
            )
        except subprocess.TimeoutExpired:
            found[tool] = {"did_not_run": f"took longer than {TOO_LONG} s"}
            continue
        found[tool] = sanitizer_verdict(done.stdout)
        if done.returncode not in (0, REPORTS) and "did_not_run" not in found[tool]:
            found[tool]["failed"] = done.stdout[-1000:]
    return found
