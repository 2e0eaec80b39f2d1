"""What scripts/bench_gpu.py takes the time of: growkit's kernels and their peers, and the clock that does it.

A time is the GPU's own: events around the work, which waits in the GPU's queue behind a pause that is longer than the
host needs to put it there, so that launches cost nothing. Before the pause, a buffer larger than the second-level cache
is written.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.ops import tiling
from growkit.ops.dispatch import interpreted
from growkit.ops.pattention import PATHS as PATTENTION
from growkit.ops.pattention import Tokens
from growkit.ops.pattention import triton as pattention_triton
from growkit.ops.selective_scan import PATHS as SCAN
from growkit.ops.selective_scan import triton as scan_triton

PEERS = {"mamba_ssm": "mamba-ssm", "fla": "flash-linear-attention"}  # what is imported, what is installed
FLUSHED = 2**29  # bytes at the least: MI300's last cache has half of it
WARM = 3  # calls before the first that counts: compilation, tuning, allocation
LONGEST_PAUSE = 0.25  # seconds
SHORT, REPEATS = 0.05, 5  # seconds; what takes less is timed as often in each round, and the median counts
TICKS = 2 * 10**7

Run = Callable[[], object]


class Stopwatch:
    """Seconds of arms that take turns. On a CPU, where nothing is claimed of speed, the wall's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.empty(max(FLUSHED, 4 * cache), dtype=torch.uint8, device=device)
            self.ticks_per_second = self.tick_rate()

    def tick_rate(self) -> float:
        """Ticks of a second, as a pause counts them. On NVIDIA's GPUs they are the multiprocessors' clock."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(5):  # the first ones wake it up
            begin.record()
            torch.cuda._sleep(TICKS)
            end.record()
            end.synchronize()
        return 1e3 * TICKS / begin.elapsed_time(end)

    def seconds(self, run: Run, pause: float) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        torch.cuda._sleep(int(pause * self.ticks_per_second))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, run: Run) -> float:
        """What the host takes to ask for the work. Raises torch.OutOfMemoryError."""
        for _ in range(WARM if self.device.type == "cuda" else 1):
            run()
        self.wait()
        began = time.perf_counter()
        run()
        took = time.perf_counter() - began
        self.wait()
        return took

    def in_turns(self, arms: dict[str, Run], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of each arm in each round, every second round in reverse order; why arms are not there."""
        pauses, without = {}, {}
        for name, run in arms.items():
            try:
                pauses[name] = min(LONGEST_PAUSE, 2 * self.host_seconds(run) + 1e-4)
            except torch.OutOfMemoryError:
                without[name] = "out of memory"
        found: dict[str, list[float]] = {name: [] for name in pauses}
        for turn in range(rounds):
            for name in list(pauses)[:: 1 if turn % 2 == 0 else -1]:
                took = [self.seconds(arms[name], pauses[name])]
                while took[0] < SHORT and len(took) < REPEATS and self.device.type == "cuda":
                    took.append(self.seconds(arms[name], pauses[name]))
                found[name].append(statistics.median(took))
        return found, without

    def peak(self, run: Run) -> int | None:
        """Bytes beyond what was there, at the most. None where it is not known."""
        if self.device.type != "cuda":
            return None
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            run()
        except torch.OutOfMemoryError:
            return None
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compiled(function: Any) -> Any:
    """Under torch.compile; where kernels are interpreted only traced, which does not take minutes."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # backward passes are timed again and again on one graph
    return torch.compile(function, dynamic=False, fullgraph=True, backend="eager" if interpreted() else "inductor")


def versions() -> dict[str, str]:
    return {
        package: importlib.metadata.version(package) if find_spec(module) else "not installed"
        for module, package in PEERS.items()
    }


class ScanArm(NamedTuple):
    forward: Callable[[], Tensor]  # y (B, L, D)
    leaves: list[Tensor]


class ScanInputs:
    """As in a model that has just been made: A = −(1 … N), Δ of about 0.02; gated, with a bias."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        B, L, D, N = shape
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        self.x, self.dt, self.z = draw(B, L, D), draw(B, L, D) / 2, draw(B, L, D)
        self.B, self.C = draw(B, L, N), draw(B, L, N)
        self.A = -torch.arange(1.0, N + 1, device=device).repeat(D, 1)
        self.D, self.bias = torch.ones(D, device=device), torch.full((D,), -4.0, device=device)
        self.upstream = draw(B, L, D)

    def leaves(self, *, tokens_last: bool = False) -> list[Tensor]:
        """x, dt, A, B, C, D, bias and z, an arm's own."""
        given = (self.x, self.dt, self.A, self.B, self.C, self.D, self.bias, self.z)
        turned = (t.transpose(1, 2).contiguous() if tokens_last and t.dim() == 3 else t for t in given)
        return [tensor.detach().requires_grad_() for tensor in turned]


def scan_arms(inputs: ScanInputs, chunk: int, *, slow: bool) -> tuple[dict[str, ScanArm], dict[str, str]]:
    """Arms, and why peers are not among them. ``slow``: also those that take minutes to compile, a launch for every
    token, or more memory than the states of all tokens."""
    torch.compiler.reset()  # it counts how often a function is compiled
    arms, without = {"triton": _own(inputs, scan_triton.selective_scan)}, {}
    if slow:
        arms["loop"] = _own(inputs, SCAN["compiled"])
        arms["reference, compiled"] = _compiled_reference(inputs, chunk)
    for name, module, make in (("mamba_ssm", "mamba_ssm", _mamba_ssm), ("fla (hgrn)", "fla", _fla)):
        if find_spec(module) is None:
            without[name] = "not installed"
        elif name == "mamba_ssm" or slow:
            try:
                arms[name] = make(inputs)
            except ImportError as error:  # built for another torch, say
                without[name] = f"cannot be loaded: {error}"
    return arms, without


def _own(inputs: ScanInputs, op: Any) -> ScanArm:
    x, dt, A, B, C, D, bias, z = leaves = inputs.leaves()
    return ScanArm(lambda: op(x, dt, A, B, C, D, dt_bias_D=bias, z_BLD=z)[0], leaves)


def _compiled_reference(inputs: ScanInputs, chunk: int) -> ScanArm:
    """The reference under torch.compile, ``chunk`` tokens at a time: whole, its loop over all tokens would compile for
    hours. The state is handed on from chunk to chunk; split and put together again are cheap beside it."""
    x, dt, A, B, C, D, bias, z = leaves = inputs.leaves()

    def some(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return SCAN["reference"](x, dt, A, B, C, D, dt_bias_D=bias, z_BLD=z, h0_BDN=h)

    step = compiled(some)

    def forward() -> Tensor:
        # As later ones: a state without a gradient would have a graph of its own.
        h, found = A.new_zeros(x.shape[0], *A.shape).requires_grad_(), []
        for parts in zip(*(tensor.split(chunk, 1) for tensor in (x, dt, B, C, z)), strict=True):
            y, h = step(*parts, h)
            found.append(y)
        return torch.cat(found, 1)

    return ScanArm(forward, leaves)


def _mamba_ssm(inputs: ScanInputs) -> ScanArm:
    """In the layout that it likes best, tokens side by side."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, A, B, C, D, bias, z = leaves = inputs.leaves(tokens_last=True)

    def forward() -> Tensor:
        y = selective_scan_fn(x, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)
        return y.transpose(1, 2)

    return ScanArm(forward, leaves)


def _fla(inputs: ScanInputs) -> ScanArm:
    """It has no scan of Mamba's; its recurrence of HGRN is the same one, of D · N channels, once decays and what comes
    in are there for every state of every token. What is around it goes through torch.compile."""
    from fla.ops.hgrn import chunk_hgrn

    x, dt, A, B, C, D, bias, z = leaves = inputs.leaves()

    def before(x: Tensor, dt: Tensor, B: Tensor, A: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        delta = F.softplus(dt.float() + bias)
        u = (delta * x.float())[..., None] * B.float()[:, :, None, :]
        return u.flatten(2), (delta[..., None] * A).flatten(2)

    def after(h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        read = (h.unflatten(2, A.shape) * C.float()[:, :, None, :]).sum(-1)
        return ((read + D * x.float()) * F.silu(z.float())).to(x.dtype)

    prepare, finish = compiled(before), compiled(after)
    return ScanArm(lambda: finish(chunk_hgrn(*prepare(x, dt, B, A, bias))[0], x, C, D, z), leaves)


def scan_runs(arm: ScanArm, upstream: Tensor) -> dict[str, Run]:
    """What is timed of an arm: forward as in training, and backward alone, on a graph that is kept."""
    kept: list[Tensor] = []

    def backward() -> object:
        if not kept:
            kept.append(arm.forward())
        return torch.autograd.grad(kept[0], arm.leaves, upstream, retain_graph=True)

    return {"forward": arm.forward, "backward": backward}


class PattentionInputs:
    """bfloat16; scores of standard deviation 1."""

    def __init__(self, T: int, d: int, n: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(rows: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(rows, d, generator=generator, device=device)).to(torch.bfloat16)

        self.x, self.keys, self.values = (t.requires_grad_() for t in (draw(T), draw(n, d**-0.5), draw(n)))
        self.upstream, self.tau = draw(T), float(n**0.5)

    def own(self, op: Any, theta: str) -> Tensor:
        (out,) = op(self.x, [Tokens([self.keys], [self.values], [self.tau], theta, "bank")])
        return out

    def both(self, forward: Callable[[], Tensor]) -> Run:
        return lambda: torch.autograd.grad(forward(), [self.x, self.keys, self.values], self.upstream)


def pattention_arms(inputs: PattentionInputs, theta: str) -> dict[str, Callable[[], Tensor]]:
    torch.compiler.reset()
    traced = compiled(formula)
    given = (inputs.x, inputs.keys, inputs.values, inputs.tau, theta)
    return {
        "triton": lambda: inputs.own(pattention_triton.pattention, theta),
        "formula, compiled": lambda: traced(*given),
        "formula, eager": lambda: formula(*given),
        "chunks": lambda: inputs.own(PATTENTION["compiled"], theta),
    }


def formula(x: Tensor, keys: Tensor, values: Tensor, tau: float, theta: str) -> Tensor:
    """Two products and what is between them, as one would write it in PyTorch."""
    a = x @ keys.T
    if theta == "gelu_l2_norm":
        a = F.gelu(a)
    norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=torch.float32)
    scaled = a * (tau / norm).to(a.dtype)
    return (scaled if theta == "gelu_l2_norm" else F.gelu(scaled)) @ values


def norm_arms(inputs: PattentionInputs) -> dict[str, Run]:
    """Forward by each way to the norm, whatever the rule says."""

    def by(ratio: int) -> Run:
        def run() -> object:
            before, tiling.GRAM_RATIO = tiling.GRAM_RATIO, ratio
            try:
                with torch.no_grad():
                    return inputs.own(pattention_triton.pattention, "l2_norm_gelu")
            finally:
                tiling.GRAM_RATIO = before

        return run

    return {"squares": by(10**9), "gram": by(0)}
