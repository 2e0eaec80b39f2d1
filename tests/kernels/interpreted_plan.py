"""What a plan says of the Triton path, against what the ops really keep and allocate, and what the FLOP counter sees.

Kernels allocate nothing: all memory is that of the calls of torch around them. So they are not run here, which at these
sizes would take minutes; everything else is as in training. The profiler reports every byte (test_planner_memory.py).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from growkit.models.config import Mamba, Pattention
from growkit.models.decoder import build, init_params
from growkit.ops import dispatch, tiling
from growkit.ops.pattention import Tokens, triton_launch
from growkit.ops.pattention import triton as pattention
from growkit.ops.selective_scan import triton as scan
from growkit.planner import memory
from growkit.planner.activations import KernelTokens, Pass
from growkit.planner.ledger import Ledger
from growkit.planner.mamba import MambaBlock
from growkit.planner.memory import stage_memories
from tests.support import model_config
from tests.test_planner_memory import MAMBA, TOKENFORMER, Timeline, measured, of_case, train_twice

# A step is booked call by call. Left out are statistics of a number for each token, at most 0.2 % of the peak.
STEP = 0.005
# Of an op alone, and there sums of gradients over programs, which are made one after the other as work space goes.
OP = 0.01
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    launched: list[bool] = []  # no tensor, which would then live on
    for module in (scan, triton_launch):
        monkeypatch.setattr(module, "_launch", lambda *_, **__: launched.append(True))
    return launched


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokens": (TOKENFORMER, {}),
    "gelu before the norm": (TOKENFORMER, {"theta": "gelu_l2_norm"}),
    "qk-norm, grouped heads, dropout": (TOKENFORMER, {"qk_norm": True, "num_kv_heads": 2, "dropout": 0.1}),
    "long context": (TOKENFORMER, {"shape": (2, 1024, 1)}),
    "recomputed": (TOKENFORMER, {"trainer": {"checkpoint_layers": True}}),
    "two micro-batches": (TOKENFORMER, {"num_layers": 1, "mlp_tokens": 3072, "shape": (8, 128, 2)}),
    "mamba": (MAMBA["mamba"], {}),
    "mamba, long context": (MAMBA["mamba"], {"shape": (1, 1000, 1)}),
    "mamba, many states": (MAMBA["mamba"], {"d_state": 100}),
    "mamba of tokens": (MAMBA["mamba-tokens"], {}),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_training_step(name: str, precision: str, tmp_path: Path, launches: list[bool]) -> None:
    model, differs = CASES[name]
    differs = differs | {"trainer": {"backend": "triton"} | differs.get("trainer", {})}
    recipe, schedule = of_case(tmp_path, model, differs)
    (plan,) = stage_memories(recipe, schedule, bf16=precision == "bf16", cuda=False)
    peak = measured(lambda: train_twice(recipe, schedule.last, bf16=precision == "bf16")).peak()
    assert launches
    assert plan.step == pytest.approx(peak, rel=STEP)


class Found(NamedTuple):
    """Bytes beside what was there before: ``forward`` and ``backward`` at most; ``saved``, and not given."""

    forward: int
    stays: int
    saved: int
    backward: int


def found(run: Callable[[], Sequence[Tensor]], leaves: list[Tensor]) -> Found:
    """Of an op that ``run`` calls on ``leaves``."""
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def work() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), record_function("## forward"):
            outs = run()
        grads = [torch.ones_like(out) for out in outs]
        with record_function("## backward"):
            torch.autograd.grad(outs, leaves, grads)

    timeline = measured(work, mark="## ")
    (_, *forward), (_, *backward) = timeline.spans
    before, after, then = (alive(timeline, time) for time in (*forward, backward[0]))
    return Found(timeline.peak(*forward) - before, after - before, sum(saved.values()), timeline.peak(*backward) - then)


def alive(timeline: Timeline, time: int) -> int:
    at = bisect(timeline.times, time)
    return timeline.live[at - 1] if at else 0


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("states", [5, 16, 200])
def test_the_scan(states: int, dtype: torch.dtype, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one span, and over as many as fill an H200."""
    monkeypatch.setattr(scan, "_processors", lambda _: processors)
    rows, context = 2, 1000
    spec = model_config("mamba", d_state=states, embed_dim=96).layers[0].mixer
    assert isinstance(spec, Mamba)
    bf16, inner = dtype == torch.bfloat16, spec.inner
    block = MambaBlock(
        Pass(rows, context, bf16=bf16, triton=True, processors=processors), spec, 96, lends_gradient=True
    )

    def part(width: int, start: int, stop: int) -> Tensor:
        return torch.randn(rows, context, width, dtype=dtype)[..., start:stop].requires_grad_()

    x, dt, z = part(inner, 0, inner), part(inner, 0, inner), part(2 * inner, inner, 2 * inner)
    B, C = (part(3 * states, start, start + states) for start in (states, 2 * states))
    A, D, bias = (torch.randn(*shape).requires_grad_() for shape in ((inner, states), (inner,), (inner,)))
    leaves = [x, dt, A, B, C, D, bias, z]
    has = found(lambda: scan.selective_scan(x, dt, A, B, C, D, dt_bias_D=bias, z_BLD=z)[:1], leaves)
    assert has.saved == block.kept
    assert has.stays == pytest.approx(block.e + block.kept, rel=1e-3)
    assert has.forward == pytest.approx(block.e + block.last + block.kept + block.beside_y, rel=OP)
    gradients = 3 * block.e + block.A + block.parts - block.rank
    assert has.backward == pytest.approx(block.last + block.kept + gradients + block.beside_dx, rel=OP)


SPECS: dict[str, list[Pattention]] = {
    "one bank": [Pattention((640,), (2.0,))],
    "banks": [Pattention((100, 28, 300), (2.0, 2.0, 3.0))],
    "one norm": [Pattention((100, 28), (2.0,), scope="shared"), Pattention((64,), (2.0,), scope="shared")],
    "three projections": [Pattention((384,), (2.0,)), Pattention((128,), (2.0,)), Pattention((128,), (2.0,))],
    "gelu before the norm": [Pattention((256,), (2.0,), "gelu_l2_norm")],
}


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_pattention(name: str, dtype: torch.dtype, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the norm, with all rows at once and in chunks, whose buffers are used again."""
    specs, bf16, depth, rows = SPECS[name], dtype == torch.bfloat16, 48, 640
    width = sum(spec.tokens for spec in specs)
    if chunks > 1:
        monkeypatch.setattr(tiling, "WORK_ELEMENTS", 128 * width)
    outs = [depth + 16 * at for at in range(len(specs))]
    block = KernelTokens(Pass(1, rows, bf16=bf16, triton=True), specs, depth, outs, is_wide=True, lends_gradient=True)
    assert bool(block.gram) == (bf16 and name in ("one bank", "three projections"))
    x = torch.randn(rows, depth).requires_grad_()
    leaves, projections = [x], []
    for spec, out in zip(specs, outs, strict=True):
        keys, values = ([torch.randn(n, size).requires_grad_() for n in spec.banks] for size in (depth, out))
        projections.append(Tokens(keys, values, list(spec.taus), spec.theta, spec.scope))
        leaves += [*keys, *values]

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return pattention.pattention(x, projections)

    has = found(run, leaves)
    forward, backward = Ledger(), Ledger()
    block.forward(forward)
    block.backward(backward)
    assert has.forward == pytest.approx(forward.peak, rel=OP)
    assert has.stays == pytest.approx(forward.live, rel=1e-3)
    assert has.saved == pytest.approx(forward.live - sum(block.outs), rel=1e-3)
    assert has.backward == pytest.approx(backward.peak, rel=OP)


@pytest.mark.parametrize("preset", ["tokenformer", "mamba"])
def test_flops_are_those_of_the_plan(preset: str) -> None:
    """All but a convolution's taps, which are no product."""
    config = model_config(preset)
    model = build(config, init_params(config, torch.Generator().manual_seed(0)), backend="triton")
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).total.backward()
    mixers = (layer.mixer for layer in config.layers)
    taps = sum(2 * mixer.inner * mixer.conv for mixer in mixers if isinstance(mixer, Mamba))
    assert counter.get_total_flops() == 16 * (config.flops_per_token(16) - 3 * taps)


def test_auto_is_planned_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the compiled path until the kernels are proven, and then with them on a GPU."""
    recipe, _ = of_case(tmp_path, TOKENFORMER, {})
    assert recipe.trainer.backend == "auto" and not dispatch.PROVEN
    assert not memory.takes_kernels(recipe, cuda=True)
    monkeypatch.setattr(memory, "PROVEN", True)
    assert memory.takes_kernels(recipe, cuda=True) and not memory.takes_kernels(recipe, cuda=False)
