"""The selective scan: the kernel and the loop against the reference, output, last state and every gradient; the
reference against the paper's recurrence in plain Python; documents, chained states, single steps; what torch's own
checks of ops say; how the kernel is built; and how much memory a training step takes."""

from __future__ import annotations

import itertools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.errors import ConfigError
from growkit.ops import native as building
from growkit.ops.selective_scan import PATHS, native, selective_scan

ROOT = Path(__file__).resolve().parent.parent
# Norm-wise relative error ‖a − b‖/‖b‖ of the kernel or the loop against the reference.
TOLERANCE = {
    # Unit roundoff 1.1e-16 and 6e-8. A state is off by one rounding of exp's argument and some of its result per step
    # it remembers, and a sum over tokens by more the longer it is; measured: up to 10 roundings.
    torch.float64: 5e-15,
    torch.float32: 2e-6,
    # All paths compute in float32 from the same bfloat16 inputs and round once, at the end. A result near the middle of
    # two numbers may go either way, by 2^-8: that happens to one in 2^15 or so, more in sums over tokens.
    torch.bfloat16: 5e-4,
    torch.float16: 1e-4,  # likewise by 2^-11, one in 2^12
}
CHAINED = 1e-14  # float64; one sequence as a whole and in two parts differ by the order of sums over tokens
FORMULA = 1e-14  # float64 against Python's own floats
MOST_MEMORY = 4.0  # times the inputs, themselves included

OPTIONS = ("dt_bias", "z", "h0")
BY_TOKEN = ("x", "dt", "z", "B", "C")
Tensors = dict[str, Tensor]


@pytest.fixture(params=["kernel", "loop"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled path in both ways; what is not written of an output would be NaN."""
    if request.param == "loop":
        monkeypatch.setattr(native, "kernel", lambda: None)
    else:
        assert native.kernel() is not None, "these tests need a C++ compiler"
    return PATHS["compiled"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """``torch.empty`` is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(
    B: int = 2, L: int = 63, D: int = 37, N: int = 5, dtype: torch.dtype = torch.float64, options: Any = OPTIONS
) -> Tensors:
    """Leaves. x, dt and z are not contiguous: parts of one projection, as in a model. Some dt lie above 20."""
    generator = torch.Generator().manual_seed(L + D + N)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    x, dt, z = draw(B, L, 3 * D).to(dtype).chunk(3, -1)
    bias = draw(D) - 3
    bias[::7] += 23
    found = {"x": x, "dt": dt, "A": -8 * torch.rand(D, N, generator=generator, dtype=torch.float64) - 0.01}
    found |= {"B": draw(B, L, N).to(dtype), "C": draw(B, L, N).to(dtype), "D": draw(D)}
    found |= {"dt_bias": bias, "z": z, "h0": draw(B, D, N)}
    wanted = {name: tensor for name, tensor in found.items() if name not in OPTIONS or name in options}
    typed = {
        name: tensor.to(wide) if name in ("A", "D", "dt_bias", "h0") else tensor for name, tensor in wanted.items()
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in typed.items()}


def documents(B: int, L: int, length: int = 10) -> Tensor:
    """(B, L) ids; the sequences' documents end at different places."""
    return torch.stack([(torch.arange(L) + 3 * b) // length for b in range(B)])


def call(path: Any, given: Tensors, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    names = {"dt_bias": "dt_bias_D", "z": "z_BLD", "h0": "h0_BDN"}
    optional = {long: given[name] for name, long in names.items() if name in given}
    return path(*(given[name] for name in ("x", "dt", "A", "B", "C", "D")), **optional, segments_BL=segments)


def results(path: Any, given: Tensors, segments: Tensor | None = None) -> Tensors:
    """y, h_T and the gradient of each input, from gradients of both."""
    y, last = call(path, given, segments)
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in (y, last)]
    gradients = torch.autograd.grad((y, last), list(given.values()), upstream)
    return {"y": y.detach(), "h_T": last.detach()} | dict(zip(given, gradients, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def assert_same(ours: Tensors, theirs: Tensors, tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert float(theirs[name].double().norm()) > 0, f"{name}: nothing to compare"
        assert relative(tensor, theirs[name]) <= tolerance, (name, relative(tensor, theirs[name]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("options", [c for n in range(4) for c in itertools.combinations(OPTIONS, n)], ids=str)
def test_the_compiled_path_is_the_reference(path: Any, options: Any, segmented: bool, dtype: torch.dtype) -> None:
    given = inputs(dtype=dtype, options=options)
    segments = documents(2, 63) if segmented else None
    assert_same(results(path, given, segments), results(PATHS["reference"], given, segments), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("B", "L", "D", "N"), [(1, 1000, 141, 16), (3, 1, 17, 16), (1, 33, 130, 29), (2, 32, 1, 1), (1, 2, 300, 8)]
)
def test_at_odd_sizes(path: Any, B: int, L: int, D: int, N: int, dtype: torch.dtype) -> None:
    """More than one block of channels, chunks that are not full, states that do not fill registers, and one of each."""
    given = inputs(B, L, D, N, dtype)
    assert_same(results(path, given), results(PATHS["reference"], given), TOLERANCE[dtype])


@pytest.mark.parametrize("name", PATHS)
def test_it_is_the_published_recurrence(name: str) -> None:
    given = inputs(1, 7, 3, 2)
    y, last = call(PATHS[name], given)
    h = given["h0"][0].tolist()
    x, dt, z, B, C = (given[key][0].tolist() for key in ("x", "dt", "z", "B", "C"))
    A, skip, bias = (given[key].tolist() for key in ("A", "D", "dt_bias"))
    for t, d in itertools.product(range(7), range(3)):
        before = dt[t][d] + bias[d]
        delta = before if before > 20 else math.log1p(math.exp(before))
        for n in range(2):
            h[d][n] = math.exp(delta * A[d][n]) * h[d][n] + delta * x[t][d] * B[t][n]
        read = sum(C[t][n] * h[d][n] for n in range(2)) + skip[d] * x[t][d]
        wanted = read * z[t][d] / (1 + math.exp(-z[t][d]))
        assert math.isclose(float(y[0, t, d].detach()), wanted, rel_tol=FORMULA, abs_tol=FORMULA)
    assert relative(last[0], torch.tensor(h, dtype=torch.float64)) <= FORMULA


def test_the_kernels_functions_are_exact_to_two_units(path: Any) -> None:
    """softplus and sigmoid, and exp of Δ A, in float32 over all they can meet, against float64."""
    x = torch.linspace(-85, 30, 5003)
    ones = torch.ones(1, 1, 1)
    unit = 2.0**-23
    # With A = 0 and B = C = x = 1, the state after one token is Δ; D = 1 alone and the gate make y = silu(z).
    D, zeros = x.numel(), torch.zeros(1, 1, x.numel())
    y, last = path(
        zeros + 1, x[None, None], torch.zeros(D, 1), 0 * ones + 1, 0 * ones, torch.ones(D), z_BLD=x[None, None]
    )
    wanted = F.softplus(x.double(), threshold=20)
    assert float(((last.flatten().double() - wanted) / wanted).abs().max()) <= 2 * unit
    silu = F.silu(x.double())
    assert float(((y.flatten().double() - silu) / silu).nan_to_num(0).abs().max()) <= 4 * unit  # two products more
    # Δ = 25 and A = x/25 <= 0: h0 = 1 decays by exp(x). Beyond -87 it is denormal, and 0 at last.
    A = torch.linspace(-87, 0, D)[:, None] / 25
    _, last = path(zeros, zeros + 25, A, 0 * ones, 0 * ones, torch.ones(D), h0_BDN=torch.ones(1, D, 1))
    exponent = 25 * A.double()
    error = ((last.flatten().double() - exponent.exp().flatten()) / exponent.exp().flatten()).abs()
    # The argument itself is rounded (twice at the most), which moves the result by |exponent| times that.
    assert float((error / (2 * unit + exponent.abs().flatten() * unit)).max()) <= 1
    _, last = path(zeros, zeros + 25, A * 10, 0 * ones, 0 * ones, torch.ones(D), h0_BDN=torch.ones(1, D, 1))
    assert last.flatten()[0] == 0


def test_documents_are_alone(path: Any) -> None:
    """Packed, each document gives what it gives by itself; only the first has the initial state."""
    given, bounds = inputs(1, 75, 37, 5), [(0, 20), (20, 21), (21, 75)]
    segments = torch.zeros(1, 75, dtype=torch.int32)
    for number, (start, stop) in enumerate(bounds):
        segments[:, start:stop] = 7 - number  # ids need not rise
    packed = results(path, given, segments)
    for start, stop in bounds:
        part = {
            name: tensor[:, start:stop] if name in ["x", "dt", "z", "B", "C"] else tensor
            for name, tensor in given.items()
        }
        if start:
            del part["h0"]
        y, last = call(path, part)
        assert relative(packed["y"][:, start:stop], y) <= CHAINED
    assert relative(packed["h_T"], last) <= CHAINED
    assert not packed["h0"].isnan().any()
    again = results(PATHS["reference"], given, segments)
    assert_same(packed, again, TOLERANCE[torch.float64])


def test_two_halves_are_the_whole(path: Any) -> None:
    """Gradients too: they go through the state that is handed on."""

    def halves(*tensors: Tensor, dt_bias_D: Tensor, z_BLD: Tensor, h0_BDN: Tensor, segments_BL: Any) -> Any:
        x, dt, A, B, C, D = tensors
        h, y = h0_BDN, []
        for part in (slice(0, 41), slice(41, None)):
            rows = (tensor[:, part] for tensor in (x, dt))
            out, h = path(*rows, A, B[:, part], C[:, part], D, dt_bias_D=dt_bias_D, z_BLD=z_BLD[:, part], h0_BDN=h)
            y.append(out)
        return torch.cat(y, 1), h

    given = inputs()
    assert_same(results(halves, given), results(path, given), CHAINED)


def test_steps_of_one_token_are_the_scan(path: Any) -> None:
    """Decoding: the state is all that is kept."""
    given = {name: tensor.detach() for name, tensor in inputs(dtype=torch.float32).items()}
    whole, last = call(path, given)
    h = given["h0"]
    for t in range(63):
        step = {
            name: tensor[:, t : t + 1] if name in ["x", "dt", "z", "B", "C"] else tensor
            for name, tensor in given.items()
        }
        y, h = call(path, step | {"h0": h})
        assert relative(y, whole[:, t : t + 1]) <= TOLERANCE[torch.float32]
    assert relative(h, last) <= TOLERANCE[torch.float32]


def test_gradients_are_those_of_differences(path: Any) -> None:
    """torch's own gradcheck, in float64; 35 tokens are more than a chunk."""
    for segments in (None, documents(1, 35)):
        given = inputs(1, 35, 2, 3)
        names = list(given)
        assert torch.autograd.gradcheck(
            lambda *tensors, segments=segments, names=names: call(path, dict(zip(names, tensors)), segments),
            tuple(given.values()),
            fast_mode=True,
        )


def test_it_is_an_op_as_torch_wants_them(path: Any) -> None:
    """Schema, fake kernel, registration of the gradient, and tracing with sizes that change."""
    for options, starts in ((OPTIONS, documents(2, 35) % 3 == 0), ((), None)):
        given = inputs(2, 35, 3, 2, options=options)
        tensors = (*(given[name] for name in ("x", "dt", "A", "B", "C", "D")), *(given.get(name) for name in OPTIONS))
        torch.library.opcheck(torch.ops.growkit.selective_scan.default, (*tensors, starts, True))
        plain = tuple(tensor if tensor is None else tensor.detach() for tensor in tensors)
        torch.library.opcheck(torch.ops.growkit.selective_scan.default, (*plain, starts, False))
        y, last, kept = torch.ops.growkit.selective_scan(*plain, starts, True)
        torch.library.opcheck(
            torch.ops.growkit.selective_scan_backward.default, (*plain, starts, kept, y.clone(), last.clone())
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(path: Any, backend: str) -> None:
    """torch.compile of what calls it: one graph, the checks of its input included."""
    scan = selective_scan("compiled")

    def layer(*tensors: Tensor, **optional: Any) -> tuple[Tensor, Tensor]:
        y, last = scan(tensors[0] * 2, *tensors[1:], **optional)
        return torch.tanh(y), last

    torch._dynamo.reset()
    given = inputs(dtype=torch.float32)
    traced = results(torch.compile(layer, fullgraph=True, backend=backend), given, documents(2, 63))
    assert_same(traced, results(layer, given, documents(2, 63)), TOLERANCE[torch.float32])


def test_under_autocast_nothing_changes(path: Any) -> None:
    given = inputs(dtype=torch.float32)
    wanted = results(path, given)
    for each in (path, PATHS["reference"]):
        with torch.autocast("cpu", torch.bfloat16):
            y, last = call(each, given)
        assert relative(y, wanted["y"]) <= TOLERANCE[torch.float32]
        assert relative(last, wanted["h_T"]) <= TOLERANCE[torch.float32]


def test_frozen_inputs_get_no_gradient(path: Any) -> None:
    given = inputs()
    wanted = results(path, given)
    given["A"].requires_grad_(False)
    y, _ = call(path, given)
    y.sum().backward()
    assert given["A"].grad is None and given["x"].grad is not None
    with torch.no_grad():
        assert torch.equal(call(path, given)[0], wanted["y"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_goes_on_and_stays_in_its_document(path: Any, bad: float) -> None:
    given = inputs(1, 70, 20, 4)
    with torch.no_grad():
        given["x"][0, 25, 3] = bad
    segments = (torch.arange(70) >= 40).long()[None]
    found = results(path, given, segments)
    broken = ~found["y"][0].isfinite()
    assert broken[25:40, 3].all() and broken.sum() == 15
    assert found["h_T"].isfinite().all()
    assert found["x"][0, 40:].isfinite().all(), "a later document's gradient"
    with torch.no_grad():
        given["dt"][0, 50, 0] = math.nan
    found = results(path, given, segments)
    assert found["y"][0, 50:, 0].isnan().all() and found["h_T"][0, 0].isnan().all()
    assert found["x"][0, :25].isfinite().all() or bad != bad, "an earlier document's gradient"


def test_a_state_without_bounds_stays_in_its_channel(path: Any) -> None:
    """Nor does the kernel's next block of channels, which is not full, find what the one before left."""
    given = inputs(1, 100, 130, 16, torch.float32)
    with torch.no_grad():
        given["h0"][0, 5] = math.inf
    found = results(path, given, (torch.arange(100) >= 40).long()[None])
    for name in ("y", "B", "C", "x", "dt"):
        assert found[name][0, 40:].isfinite().all(), name
    assert found["y"][0, :, 6:].isfinite().all() and found["h_T"].isfinite().all()


def test_results_do_not_depend_on_the_threads() -> None:
    """The kernel's, bitwise."""
    given = inputs(2, 100, 700, 16, torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(PATHS["compiled"], given))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


MISFITS = [
    ("x", lambda x: x[0], "is not (sequences, tokens, channels)"),
    ("x", lambda x: x[:, :0], "each 1 or more"),
    ("x", lambda x: x.int(), "cast to one of torch.bfloat16"),
    ("dt", lambda dt: dt[:, 1:], "give it (2, 63, 37)"),
    ("dt", lambda dt: dt.bfloat16(), "cast it to torch.float32"),
    ("z", lambda z: z.to("meta"), "is not the device of x, cpu"),
    ("A", lambda A: A.T, "one row for each channel"),
    ("A", lambda A: A.double(), "cast it to torch.float32"),
    ("B", lambda B: B[..., :4], "x (2, 63, 37) and A (37, 5)"),
    ("C", lambda C: C[:1], "give it (2, 63, 5)"),
    ("D", lambda D: D[1:], "give it (37,)"),
    ("dt_bias", lambda bias: bias[None], "give it (37,)"),
    ("h0", lambda h0: h0.transpose(1, 2), "give it (2, 37, 5)"),
    ("h0", lambda h0: h0.bfloat16(), "cast it to torch.float32"),
    ("segments", lambda segments: segments[:, 1:], "give it (2, 63)"),
    ("segments", lambda segments: segments.float(), "the number of each document"),
]


@pytest.mark.parametrize(("name", "change", "part"), MISFITS, ids=[f"{name}-{part}" for name, _, part in MISFITS])
@pytest.mark.parametrize("backend", PATHS)
def test_tensors_that_do_not_fit_are_named(backend: str, name: str, change: Any, part: str) -> None:
    given = {key: tensor.detach() for key, tensor in inputs(dtype=torch.float32).items()}
    given["segments"] = documents(2, 63)
    given[name] = change(given[name])
    with pytest.raises(ConfigError) as caught:
        call(selective_scan(backend), given, given.pop("segments"))
    assert (caught.value.code, caught.value.key) == ("scan-misfit", f"selective_scan.{name}")
    assert part in str(caught.value)


CHILD = """
import logging, sys, torch
logging.basicConfig(format="%(message)s")
from growkit.ops.selective_scan import native, selective_scan
one = torch.ones(1, 3, 2)
for _ in range(2):
    y, _ = selective_scan("auto")(one, one, -torch.ones(2, 2), one, one, torch.ones(2))
print(native.kernel() is not None, y.isfinite().all().item())
"""


def start(folder: Path, **env: str) -> subprocess.Popen[str]:
    """A fresh process that scans twice, with a cache in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CHILD], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_two_processes_that_build_at_once(tmp_path: Path) -> None:
    both = [start(tmp_path) for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert out == "True True\n" and process.returncode == 0, err
    kept = list((tmp_path / "growkit" / "kernels").iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".so", "one library, and nothing half-made"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler"),
        ({"CXX": "false"}, "cannot build the kernel"),
    ],
)
def test_without_a_compiler_the_loop_runs_and_says_so_once(tmp_path: Path, env: dict[str, str], said: str) -> None:
    out, err = start(tmp_path, **env).communicate()
    assert out == "False True\n"
    assert err.count(said) == err.count("as a loop of torch calls; the kernel is several times") == 1, err


def test_a_damaged_library_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []
    real = building.build
    monkeypatch.setattr(building, "build", lambda *given: (built.append(given[-1]), real(*given)))
    native.kernel.cache_clear()
    try:
        compiler = building.find_compiler()
        assert compiler is not None
        place = building.place(compiler, native.SOURCE)
        place.parent.mkdir(parents=True)
        place.write_bytes(b"\x7fELF")
        with caplog.at_level(logging.WARNING):
            assert native.kernel() is not None
        assert built == [place] and "is damaged" in caplog.text
        native.kernel.cache_clear()
        assert native.kernel() is not None and len(built) == 1, "the second time it is there"
    finally:
        native.kernel.cache_clear()


MEMORY = """
import sys, torch
from growkit.ops.selective_scan import native, selective_scan
torch.set_num_threads(1)
if sys.argv[1] == "loop":
    native.kernel = lambda: None
def step(L, D=256, N=16):
    x, dt, z = (torch.randn(1, L, D, requires_grad=True) for _ in range(3))
    B, C = (torch.randn(1, L, N, requires_grad=True) for _ in range(2))
    A, skip = -torch.rand(D, N), torch.ones(D)
    y, _ = selective_scan("auto")(x, dt, A.requires_grad_(), B, C, skip.requires_grad_(), z_BLD=z)
    y.sum().backward()
    return sum(4 * t.numel() for t in (x, dt, z, B, C))
def peak(name):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
step(64)
open("/proc/self/clear_refs", "w").write("5")
before = peak("VmRSS")
size = step(8192)
print((peak("VmHWM") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["kernel", "loop"])
def test_a_step_of_training_takes_little_memory(way: str) -> None:
    """All states would be 5 times the inputs, and autograd of the formula holds several tensors of that size."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once: malloc may keep twice the inputs
    done = subprocess.run([sys.executable, "-c", MEMORY, way], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 < float(done.stdout) <= MOST_MEMORY
