"""The contract every growth operator keeps, as checks that raise AssertionError: run over the whole registry
(test_growth_contract.py), and over deliberately broken operators, which must fail it (test_growth_mutants.py)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.errors import ConfigError
from growkit.growth.engine import Chain, grow, lazy_states
from growkit.growth.logits import stream_logits
from growkit.growth.operator import EXACT_FLOAT64, OPERATORS
from growkit.growth.path import Link, grown_config, path
from growkit.growth.state import Moments, TrainState
from growkit.growth.verify import TRAINING_TOLERANCE, with_new_tokens
from growkit.models.config import ModelConfig
from growkit.models.decoder import build
from growkit.models.rope import YarnRope
from growkit.models.spec import param_specs
from tests.support import model_config, probe, trained_like

LR = 1e-3
GRADIENT_TOLERANCE = 1e-9  # relative, of a carried moment and the gradient it stands for, both in float64
# Relative, where clones share their gradient unevenly, of which moments know the mean only; cloned blocks are a few,
# and one of them may be read five times as much as the other.
UNEVEN = {
    ("experts", "clone_noise"): 1.0,
    ("width", "clone_noise"): 1.0,
    ("width", "clone_split"): 1.0,
    ("altup", "clone"): 5.0,
}
NOT_EXACT = 1e-6  # what is labelled not exact moves the logits by far more than rounding

FAMILIES: dict[str, dict[str, Any]] = {
    "tokenformer": {"preset": "tokenformer"},
    "tokenformer-gelu_l2": {"preset": "tokenformer", "theta": "gelu_l2_norm", "qk_norm": True},
    "tokenformer-softmax": {"preset": "tokenformer", "theta": "softmax", "tied_head": False},
    "tokenformer-shared": {"preset": "tokenformer", "token_norm": "shared", "q_tokens": 6},
    "tokenformer-shared-gelu_l2": {"preset": "tokenformer", "token_norm": "shared", "theta": "gelu_l2_norm"},
    "tokenformer-shared-softmax": {"preset": "tokenformer", "token_norm": "shared", "theta": "softmax"},
    "tokenformer-published": {
        "preset": "tokenformer",
        "token_norm": "shared",
        "norm": "layernorm_gainless",
        "final_norm": "layernorm",
        "head_dim": 16,
        "rope_fraction": 0.25,
    },
    "transformer": {"preset": "transformer", "mlp_dim": 20},
    "transformer-gqa": {
        "preset": "transformer",
        "num_heads": 4,
        "num_kv_heads": 2,
        "qk_norm": True,
        "tied_head": False,
    },
    "transformer-layernorm": {"preset": "transformer", "norm": "layernorm", "mlp": "gelu"},
    "transformer-moe": {"preset": "transformer", "mlp_dim": 20, "num_experts": 4},
    "neox": {
        "preset": "transformer",
        "norm": "layernorm",
        "mlp": "gelu",
        "bias": True,
        "parallel": True,
        "head_dim": 16,
        "rope_fraction": 0.25,
        "tied_head": False,
    },
    "transformer-bias-yarn": {  # whose ramp lies elsewhere in wider heads
        "preset": "transformer",
        "bias": True,
        "mlp": "gelu_tanh",
        "qk_norm": True,
        "rope_scaling": YarnRope(4.0, 64, 1.1),
    },
    "mamba": {"preset": "mamba", "d_state": 3, "dt_rank": 2},
    "mamba-tokens": {"preset": "mamba", "projection": "pattention", "mamba_tokens": 10, "d_state": 3, "dt_rank": 2},
    "hybrid": {"preset": "mamba", "pattern": "mamba+attention", "d_state": 3, "bias": True, "qk_norm": True},
    "hybrid-altup": {
        "preset": "mamba",
        "pattern": "attention+mamba",
        "d_state": 3,
        "projection": "pattention",
        "mamba_tokens": 10,
        "attention_tokens": 10,
        "mlp_tokens": 14,
        "altup_blocks": 2,
        "tied_head": False,
    },
    # AltUp: every order, recycled and full, tied and not, over linear maps and parameter tokens.
    "altup": {"preset": "transformer", "mlp_dim": 20, "altup_blocks": 2},
    "altup-tokens": {"preset": "tokenformer", "altup_blocks": 2, "altup_order": "paper", "altup_variant": "full"},
    "altup-full": {"preset": "transformer", "altup_blocks": 2, "altup_variant": "full", "tied_head": False},
    "altup-free": {"preset": "transformer", "altup_blocks": 2, "altup_order": "free", "norm": "layernorm"},
    "altup-free-tokens": {"preset": "tokenformer", "altup_blocks": 2, "altup_order": "free", "token_norm": "shared"},
    "altup-round_robin": {"preset": "transformer", "altup_blocks": 2, "altup_order": "round_robin", "mlp": "gelu"},
    "altup-round_robin-tokens": {"preset": "tokenformer", "altup_blocks": 2, "altup_order": "round_robin"},
    "altup-routed": {"preset": "transformer", "altup_blocks": 2, "altup_coefficients": "routed", "qk_norm": True},
    "altup-routed-tokens": {
        "preset": "tokenformer",
        "altup_blocks": 2,
        "altup_coefficients": "routed",
        "altup_order": "paper",
        "altup_variant": "full",
    },
    "altup-stride": {"preset": "transformer", "num_layers": 3, "altup_stride": 4, "mlp_dim": 20},
    "altup-stride-tokens": {"preset": "tokenformer", "num_layers": 3, "altup_stride": 2},
}

# Families that differ from another one in what is inside a layer alone.
INSIDE = (
    "tokenformer-gelu_l2",
    "tokenformer-shared",
    "tokenformer-shared-gelu_l2",
    "tokenformer-shared-softmax",
    "transformer-moe",
    "transformer-bias-yarn",
    "mamba-tokens",
)

# A small target for each operator, as a stage's ``grow:`` would say it. A new operator must add itself here.
TARGETS: dict[str, list[dict[str, Any]]] = {
    "param_tokens": [
        {"attention_tokens": 15, "mlp_tokens": 20},
        {"v_tokens": 13},
        {"mamba_tokens": 15},
        {"x_proj_tokens": 13},
        {"attention_tokens": 6, "mlp_tokens": 9},
    ],
    "consolidate": [{"token_banks": 1}],
    "depth": [
        {"num_layers": 4},
        {"num_layers": 3, "insert_at": "middle"},
        {"num_layers": 4, "insert_at": "end"},
        {"num_layers": 4, "insert_at": [0, 0]},
    ],
    "width": [{"embed_dim": 32}, {"embed_dim": 72}],
    "head_dim": [{"head_dim": 48}],
    "mlp": [{"mlp_dim": 80}],
    "experts": [{"num_experts": 4}, {"num_experts": 8}, {"num_experts": 8, "experts_per_token": 4}],
    "heads": [{"num_heads": 8}, {"num_heads": 8, "num_kv_heads": 4}],
    "inner": [{"expand": 3}, {"d_inner": 60}],
    "state": [{"d_state": 5}],
    "dt_rank": [{"dt_rank": 4}],
    "conv": [{"d_conv": 6}],
    "vocab": [{"vocab_size": 57}],
    "altup": [
        {"altup_blocks": 2},
        {"altup_blocks": 4},
        {"altup_blocks": 3, "altup_variant": "full"},
        {"altup_blocks": 4, "altup_order": "paper", "altup_variant": "full"},
        {"altup_blocks": 4, "altup_order": "free"},
        {"altup_blocks": 4, "altup_coefficients": "routed"},
        {"altup_variant": "full"},
    ],
    "rope": [{"rope_base": 500000}, {"rope_factor": 4}, {"rope_factor": 4, "rope_context": 8}],
}

# What a source is grown by first, where an operator starts from what another one makes.
BEFORE: dict[str, dict[str, Any]] = {"consolidate": {"attention_tokens": 15, "mlp_tokens": 20}}


@dataclass(frozen=True)
class Case:
    family: str
    operator: str
    method: str
    fields: tuple[tuple[str, Any], ...]
    source: ModelConfig
    target: ModelConfig

    def __str__(self) -> str:
        sizes = ",".join(f"{key}={value}" for key, value in self.fields)
        return f"{self.family}:{self.operator}:{self.method}:{sizes}"

    @property
    def methods(self) -> dict[str, str]:
        return {self.operator: self.method}


def cases(only: str | None = None) -> Iterator[Case]:
    """Registry (or one operator) × families × methods × targets, without those a recipe would be refused. What is
    around a layer does not depend on what is inside it: AltUp's families go through one target of every other operator
    and method, and families that differ inside a layer through one of depth's and of AltUp's."""
    assert set(TARGETS) == set(OPERATORS), "every operator has a target to be tested on"
    for (family, fields), (name, operator) in itertools.product(FAMILIES.items(), OPERATORS.items()):
        if only not in (None, name):
            continue
        apart = (family in INSIDE and name in ("altup", "depth")) or (family.startswith("altup") and name != "altup")
        targets = TARGETS[name][:1] if apart else TARGETS[name]
        for method, target in itertools.product(operator.methods, targets):
            try:
                source = grown_config(model_config(**fields), BEFORE.get(name, {}), {})
                config = grown_config(source, target, {name: method})
            except ConfigError:
                continue
            yield Case(family, name, method, tuple(target.items()), source, config)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(case: Case, state: TrainState, seed: int = 5) -> Chain:
    links = path(case.source, case.target, case.methods)
    return lazy_states(state, links, generator(seed), stage=1, probe=probe(case.source))


def grown(case: Case, state: TrainState) -> TrainState:
    return chain(case, state)[-1].materialized()


_GROWN: dict[str, TrainState] = {}  # of the case that is being checked


def grown_once(case: Case) -> TrainState:
    """From a trained-like state, which is left as it was; for clauses that only look."""
    if str(case) not in _GROWN:
        state, before = trained_like(case.source), trained_like(case.source)
        _GROWN[str(case)] = grown(case, state)
        assert all(torch.equal(state.params[name], tensor) for name, tensor in before.params.items())
        for name, moments in before.moments.items():
            now = state.moments[name]
            assert torch.equal(moments.exp_avg, now.exp_avg) and torch.equal(moments.exp_avg_sq, now.exp_avg_sq)
            assert moments.step == now.step
    return _GROWN[str(case)]


@lru_cache(maxsize=64)
def logits_before(source: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Of the trained-like state that a case starts from, which many cases share."""
    state = trained_like(source, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return stream_logits(source, state.params, probe(source)[:, :-1], dtype)


def check(case: Case) -> None:
    """Every clause of the contract."""
    _GROWN.clear()  # the same case may come again with its operator broken
    for clause in CLAUSES:
        clause(case)


def function_is_kept_as_claimed(case: Case) -> None:
    """Exact: ≤ 1e-10 relative in float64, of the tokens there were. Not exact: the logits do move, so the label is no
    excuse."""
    moved = relative_change(logits_before(case.source, torch.float64), grown_once(case), probe(case.source))
    claims = [link.exactness.kind for link in path(case.source, case.target, case.methods)]
    if set(claims) == {"exact"}:
        assert moved <= EXACT_FLOAT64, f"claims to be exact, moved by {moved:.2e}"
    else:
        assert moved >= NOT_EXACT, f"claims not to be exact, moved by {moved:.2e}"


def relative_change(old: Tensor, after: TrainState, tokens: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """‖Δlogits‖ / ‖logits‖, computed in ``dtype``, of the tokens that both have; the ``old`` logits are large enough to
    tell."""
    new = stream_logits(after.config, after.params, tokens[:, :-1], dtype)
    assert float(old.std()) >= 1
    return float((new[..., : old.shape[-1]] - old).norm() / old.norm())


def training_precision_keeps_it_too(case: Case) -> None:
    """The certificate of a float32 state holds in float32; ``grow`` raises if not. So do logits under bf16 autocast."""
    state, tokens = trained_like(case.source, dtype=torch.float32), probe(case.source)
    result, report = grow(state, case.target, case.methods, generator(), tokens, stage=1)
    certificate = report.certificate
    assert certificate is not None and certificate.training_dtype == "float32"
    assert certificate.parameters_after == case.target.num_params()
    assert certificate.parameters_before == case.source.num_params()
    if certificate.exact:
        tolerance = TRAINING_TOLERANCE[torch.float32]
        assert certificate.delta_logits_training <= tolerance
        assert not certificate.dead, certificate.dead
        # New tokens take some of the softmax from the others, so there the loss may rise, and only rise.
        rise = max(0.0, certificate.delta_loss) if case.target.vocab_size > case.source.vocab_size else 0.0
        assert abs(certificate.delta_loss - rise) <= tolerance * 10
        bf16 = logits_before(case.source, torch.bfloat16)
        assert relative_change(bf16, result, tokens, torch.bfloat16) <= TRAINING_TOLERANCE[torch.bfloat16]


def shapes_are_those_of_the_target(case: Case) -> None:
    result = grown_once(case)
    assert {name: tuple(t.shape) for name, t in result.params.items()} == {
        name: spec.shape for name, spec in param_specs(case.target).items()
    }
    assert result.config == case.target
    marked = chain(case, trained_like(case.source)).new_entries()
    added = max(0, case.target.num_params() - case.source.num_params())
    assert sum(int(at.sum()) for at in marked.values()) == added
    built = build(case.target, result.params)
    assert {name: p.shape for name, p in built.named_parameters()} == {n: t.shape for n, t in result.params.items()}


def moments_are_those_of_the_gradients(case: Case) -> None:
    """After an exact step, a carried moment is what the grown model's own gradients would have made of it: with the
    source's gradient in the place of exp_avg, and its square in that of exp_avg_sq, growth gives the target's."""
    if any(link.exactness.kind != "exact" for link in path(case.source, case.target, case.methods)):
        return
    state, tokens = trained_like(case.source), probe(case.source)
    before = _gradients(case.source, state, tokens, case.source.vocab_size)
    moments = {name: Moments(gradient, gradient.square(), 3.0) for name, gradient in before.items()}
    result = grown(case, TrainState(case.source, state.params, moments))
    after = _gradients(case.target, result, tokens, case.source.vocab_size)
    spec_of = param_specs(case.target)
    for name, now in result.moments.items():
        carried = now.exp_avg != 0
        gradient, wanted = after[name][carried], now.exp_avg[carried]
        normed = case.operator == "head_dim" and "attention.k." in name and FAMILIES[case.family].get("qk_norm")
        upcycled = spec_of[name].experts_per_token is not None and name in before and before[name].dim() == 2
        if upcycled:  # the experts' gradients add up to the block's
            whole = now.exp_avg.sum(0)
            assert float((after[name].sum(0) - whole).norm()) <= GRADIENT_TOLERANCE * float(whole.norm()), name
        exactly = 1.0 if normed or upcycled else GRADIENT_TOLERANCE  # a norm shares with clones, too
        tolerance = UNEVEN.get((case.operator, case.method), exactly)
        assert float((gradient - wanted).norm()) <= tolerance * float(gradient.norm()), name
        squared, wanted = gradient.square(), now.exp_avg_sq[carried]
        assert float((squared - wanted).norm()) <= max(tolerance, tolerance**2) * float(squared.norm()), name


def _gradients(config: ModelConfig, state: TrainState, tokens: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Of the loss over the first ``vocab_size`` tokens, which is the same one before and after an exact step."""
    model = build(config, state.params).eval()  # the balance of experts is training's alone
    logits = model(tokens[:, :-1])
    assert isinstance(logits, Tensor)
    F.cross_entropy(logits[..., :vocab_size].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def moments_go_with_the_weights(case: Case) -> None:
    """Carried parameters keep their moments, all of them; new entries' exp_avg is 0 and their exp_avg_sq above 0. New
    parameters have none and are marked as new."""
    state, result = trained_like(case.source), grown_once(case)
    new = set(result.params) - set(state.params)
    assert set(result.moments) == set(result.params) - new
    assert {name for name, stage in result.born.items() if stage == 1} == new
    for name, now in result.moments.items():
        assert now.exp_avg.shape == now.exp_avg_sq.shape == result.params[name].shape
        assert now.step == state.moments[name].step
        assert (now.exp_avg_sq > 0).all(), f"{name}: an entry without second moment would jump"
    # Every old entry by a number of its own, which all of its clones share, times what its gradient is multiplied by.
    sizes = [m.exp_avg.numel() for m in state.moments.values()]
    first = dict(zip(state.moments, itertools.accumulate(sizes, initial=1), strict=False))
    numbered = {
        name: Moments(torch.arange(first[name], first[name] + m.exp_avg.numel()).double().view_as(m.exp_avg), one, 3.0)
        for name, m in state.moments.items()
        for one in [torch.ones_like(m.exp_avg, dtype=torch.float64)]
    }
    marked = grown(case, TrainState(case.source, state.params, numbered)).moments.values()
    held = sum(len(m.exp_avg[m.exp_avg != 0].unique()) for m in marked)
    smaller = case.target.num_params() < case.source.num_params()
    assert held == (sum(m.exp_avg.numel() for m in marked) if smaller else sum(sizes)), "moments were lost"


def what_is_new_learns(case: Case) -> None:
    """With weight decay 0, everything new has a gradient by the second step, all stays finite, and all of it moves. A
    ramp is halfway at the second step."""
    state, result = trained_like(case.source), grown_once(case)
    model = build(case.target, result.params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    named = dict(model.named_parameters())
    for name, m in result.moments.items():
        optimizer.state[named[name]] = {
            "step": torch.tensor(m.step),
            "exp_avg": m.exp_avg.clone(),
            "exp_avg_sq": m.exp_avg_sq.clone(),
        }
    fresh = chain(case, state).new_entries()
    alive = dict.fromkeys(fresh, False)
    data = with_new_tokens(probe(case.source, rows=8), case.source.vocab_size, case.target.vocab_size)
    for step in range(2):
        model.set_ramp(max(case.target.ramp, step / 2))
        optimizer.zero_grad()
        loss = model(data[:, :-1], data[:, 1:]).total
        loss.backward()
        assert loss.isfinite()
        for name, mask in fresh.items():
            gradient = named[name].grad
            assert gradient is not None and gradient.isfinite().all(), (name, step)
            if gradient[mask].any():
                alive[name] = True
        optimizer.step()
    assert all(alive.values()), f"dead: {[name for name, lives in alive.items() if not lives]}"
    for name in alive:
        moved = named[name].detach() != result.params[name]
        assert moved[fresh[name]].any(), f"{name} did not move"
        # No leap: a fresh Adam moves by lr a step; a zero exp_avg_sq at an old step count by 3.2 and 4.2 lr (β2 0.999).
        distance = (named[name].detach() - result.params[name]).abs()[fresh[name] & moved]
        assert float(distance.mean()) <= 3 * LR, f"{name} leapt"


def randomness_is_the_generators(case: Case) -> None:
    """Same generator, same bits, whatever the global state; the streamed growth is the same as the whole one."""
    first = grown_once(case)
    torch.manual_seed(int(torch.initial_seed() == 0))  # not the seed that the first one had
    second = chain(case, trained_like(case.source))[-1]
    for name in reversed(list(first.params)):
        assert torch.equal(first.params[name], second.params[name]), name
    assert list(first.params) == list(second.params)


def two_steps_keep_it_as_well(case: Case) -> None:
    """Growing what was grown: an exact operator stays exact from a state it made itself, after some training, with
    which a ramp has come to its end."""
    links = path(case.source, case.target, case.methods)
    if any(link.exactness.kind != "exact" for link in links):
        return
    once = grown_once(case)
    noisy = {
        name: t + 0.02 * torch.randn(t.shape, generator=generator(9), dtype=t.dtype) for name, t in once.params.items()
    }
    moments = {n: Moments(torch.zeros_like(t), torch.ones_like(t), 3.0) for n, t in noisy.items()}
    state = TrainState(dataclasses.replace(case.target, ramp=1.0), noisy, moments)
    again = _further(case, state.config)
    if not again or any(link.exactness.kind != "exact" for link in again):
        return  # a dense block's first step is exact, clones that are not all chosen are not
    twice = lazy_states(state, again, generator(6), stage=2, probe=probe(case.source))[-1].materialized()
    tokens = probe(case.source)
    old = stream_logits(state.config, state.params, tokens[:, :-1], torch.float64)
    assert relative_change(old, twice, tokens) <= EXACT_FLOAT64


def _further(case: Case, config: ModelConfig) -> list[Link]:
    """The same growth of ``config`` once more, twice as far, by the default method where that of the case is only for
    a start; nothing where there is nothing beyond."""
    if case.operator in BEFORE:
        return []
    fields = {}
    for key, value in case.fields:
        if key == "insert_at" and isinstance(value, list):
            fields[key] = [*value, 1, 2]
        else:
            fields[key] = value * 2 if isinstance(value, int) else value
    if isinstance(fields.get("insert_at"), list):
        fields["num_layers"] = len(config.layers) + len(fields["insert_at"])
    for methods in (case.methods, {}):
        try:
            return path(config, grown_config(config, fields, methods), methods)
        except ConfigError as refused:
            if refused.code not in ("method-does-not-fit", "nothing-grows", "too-large"):
                raise
    return []


CLAUSES = (
    function_is_kept_as_claimed,
    training_precision_keeps_it_too,
    shapes_are_those_of_the_target,
    moments_go_with_the_weights,
    moments_are_those_of_the_gradients,
    what_is_new_learns,
    randomness_is_the_generators,
    two_steps_keep_it_as_well,
)
