"""Deliberately broken growth, each caught by the contract: what the suite would let through, it does not test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from growkit.errors import PreservationError
from growkit.growth import engine, expand, gradients, logits, path, verify
from growkit.growth.operator import OPERATORS, Exactness, Grown, TensorGrowth
from growkit.growth.operators import dense, head_dim, param_tokens, width
from growkit.growth.state import Moments
from growkit.growth.verify import Certificate
from growkit.models import axes, layers
from growkit.models.experts import MixtureFeedForward
from growkit.models.presets import initial_tau
from growkit.models.ramp import Ramp, mask
from tests import contract

Patch = pytest.MonkeyPatch


def _grow_tensor(patch: Patch, operator: str, change: Callable[[TensorGrowth, Grown], Grown]) -> None:
    """Replaces what ``operator`` makes of each tensor by ``change`` of it."""
    kind = type(OPERATORS.get(operator, key=""))
    original = kind.grow_tensor
    patch.setattr(kind, "grow_tensor", lambda self, growth: change(growth, original(self, growth)))


def wrong_tau(patch: Patch) -> None:
    """τ follows the new number of tokens, as the public code has it."""
    original = param_tokens._append

    def append(projection, count, method, field):  # type: ignore[no-untyped-def]
        grown = original(projection, count, method, field)
        return dataclasses.replace(grown, taus=(initial_tau(grown.theta, count),)) if method == "held" else grown

    patch.setattr(param_tokens, "_append", append)


def random_values_in_a_bank(patch: Patch) -> None:
    _grow_tensor(patch, "param_tokens", lambda g, out: out if g.old is not None else Grown(g.fresh()))


def zero_keys_and_zero_values(patch: Patch) -> None:
    def dead(growth: TensorGrowth, out: Grown) -> Grown:
        return out if growth.old is not None else Grown(torch.zeros_like(out.value))

    _grow_tensor(patch, "param_tokens", dead)


def stale_eps(patch: Patch) -> None:
    """eps stays what it was for the narrow model."""
    patch.setattr(width, "padded_norm", lambda norm, ratio: norm)


def unscaled_gain(patch: Patch) -> None:
    def plain(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.spec.role != "gain" or growth.old is None or growth.old_spec == growth.spec:
            return out
        return Grown(expand.expand(growth.old, growth.old_spec.axes, torch.ones_like(out.value), growth.spec.axes))

    _grow_tensor(patch, "width", plain)


def unscaled_moments(patch: Patch) -> None:
    original = expand.expand_moments

    def unscaled(old, old_axes, new_axes, *, placement=None, **_):  # type: ignore[no-untyped-def]
        return original(old, old_axes, new_axes, placement=placement)

    patch.setattr(engine, "expand_moments", unscaled)


def unseeded_second_moments(patch: Patch) -> None:
    """New entries get exp_avg_sq 0 under an old step count, and leap."""
    original = expand.expand_moments

    def unseeded(old, old_axes, new_axes, **options):  # type: ignore[no-untyped-def]
        grown = original(old, old_axes, new_axes, **options)
        return Moments(grown.exp_avg, torch.where(grown.exp_avg == 0, 0.0, grown.exp_avg_sq), grown.step)

    patch.setattr(engine, "expand_moments", unseeded)


def misplaced_moments(patch: Patch) -> None:
    """Moments stay at the front while the weights went elsewhere."""
    original = expand.expand_moments

    def misplaced(old, old_axes, new_axes, *, placement=None, **factors):  # type: ignore[no-untyped-def]
        return original(old, old_axes, new_axes, **factors)

    patch.setattr(engine, "expand_moments", misplaced)


def misordered_heads(patch: Patch) -> None:
    """New query heads go to the end, so that old ones change their kv group."""
    patch.setattr(dense, "query_placement", lambda spec, source, target: None)


def misordered_concat(patch: Patch) -> None:
    """gate | up keeps its old offsets in the wider tensor."""
    original = axes.index_map

    def flat(old, new, placement=None):  # type: ignore[no-untyped-def]
        front = [*range(old.size), *[axes.NEW] * (new.size - old.size)]
        return front if isinstance(old, axes.Concat) else original(old, new, placement)

    patch.setattr(expand, "index_map", flat)


def half_an_identity(patch: Patch) -> None:
    """The inserted layer's MLP keeps writing."""

    def half(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.old is None and growth.spec.component == "mlp":
            assert growth.origin is not None
            return Grown(growth.origin.clone())
        return out

    _grow_tensor(patch, "depth", half)


def a_bias_that_still_writes(patch: Patch) -> None:
    """The inserted layer's weights write nothing, its biases do."""

    def keep(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.old is not None or growth.spec.role != "bias":
            return out
        assert growth.origin is not None
        return Grown(growth.origin.clone())

    _grow_tensor(patch, "depth", keep)


def unscaled_query_bias(patch: Patch) -> None:
    def plain(growth: TensorGrowth, out: Grown) -> Grown:
        return Grown(out.value / 2, placement=out.placement) if growth.spec.local == "attention.q.bias" else out

    _grow_tensor(patch, "head_dim", plain)


def a_ramp_called_exact(patch: Patch) -> None:
    """Rotary angles that depend on a pair's place are taken for those that do not."""
    patch.setattr(head_dim, "_angles_stay", lambda before, after, scaling: True)


def zeroed_gains(patch: Patch) -> None:
    """An identity by zero gains instead of zero writes: exact, and dead."""

    def zero_gains(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.old is not None or growth.method != "identity":
            return out
        assert growth.origin is not None
        reads_nothing = growth.spec.role in ("gain", "bias", "keys", "weight")
        return Grown(torch.zeros_like(out.value) if reads_nothing else growth.origin.clone())

    _grow_tensor(patch, "depth", zero_gains)


def stacking_called_exact(patch: Patch) -> None:
    kind = type(OPERATORS.get("depth", key=""))
    patch.setattr(kind, "exactness", lambda self, source, target, method: Exactness("exact", "it is not"))


def growth_in_place(patch: Patch) -> None:
    """The inserted layer is its origin's own tensor, zeroed in place."""

    def in_place(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.old is None and growth.spec.writes_residual and growth.method == "identity":
            assert growth.origin is not None
            return Grown(growth.origin.zero_())
        return out

    _grow_tensor(patch, "depth", in_place)


def global_randomness(patch: Patch) -> None:
    def loose(growth: TensorGrowth, out: Grown) -> Grown:
        return Grown(torch.randn_like(out.value)) if growth.old is None and out.value.any() else out

    _grow_tensor(patch, "param_tokens", loose)


def forgotten_moments(patch: Patch) -> None:
    patch.setattr(engine._Link, "moments", lambda self, name: Moments(*(torch.zeros(self.specs[name].shape),) * 2, 0.0))


def random_writes(patch: Patch) -> None:
    """Width: what writes the new dimensions is not zero."""
    patch.setattr(width.Width, "zero_side", "in")


def appended_pairs(patch: Patch) -> None:
    """New rotary pairs behind the old ones, which then turn at other speeds."""
    front = [*range(12), *[axes.NEW] * 36]
    patch.setattr(head_dim, "rotary_placement", lambda before, after, clones=False: front)


def unscaled_queries(patch: Patch) -> None:
    """Scores are divided by the root of a larger width."""

    def plain(growth: TensorGrowth, out: Grown) -> Grown:
        return Grown(out.value / 2, placement=out.placement) if growth.spec.local == "attention.q.weight" else out

    _grow_tensor(patch, "head_dim", plain)


def stale_qk_eps(patch: Patch) -> None:
    patch.setattr(head_dim, "_widened", lambda mixer, dim: dataclasses.replace(mixer, head_dim=dim))


def random_keys_under_a_norm(patch: Patch) -> None:
    """Under QK-norm the new dimensions of a key count in its norm."""
    original = head_dim.rotary_placement
    patch.setattr(head_dim, "rotary_placement", lambda before, after, clones=False: original(before, after))


def zero_keys_and_zero_queries(patch: Patch) -> None:
    def dead(growth: TensorGrowth, out: Grown) -> Grown:
        new = torch.zeros_like(out.value)
        if growth.spec.local != "attention.k.weight":
            return out
        assert growth.old is not None and growth.old_spec is not None
        old = expand.expand(growth.old, growth.old_spec.axes, new, growth.spec.axes, out.placement)
        return dataclasses.replace(out, value=old)

    _grow_tensor(patch, "head_dim", dead)


def undivided_clones(patch: Patch) -> None:
    def whole(growth: TensorGrowth, out: Grown) -> Grown:
        return Grown(out.value * 3, placement=out.placement) if growth.spec.local == "attention.k.weight" else out

    _grow_tensor(patch, "width", whole)


def unshared_gradients(patch: Patch) -> None:
    """What writes clones keeps its moments as they were."""
    _grow_tensor(patch, "width", lambda growth, out: dataclasses.replace(out, gradient=1.0))


def forgotten_logit_scale(patch: Patch) -> None:
    original = width.Width.target

    def target(self, config, fields, method):  # type: ignore[no-untyped-def]
        return dataclasses.replace(original(self, config, fields, method), logit_scale=1.0)

    patch.setattr(width.Width, "target", target)


def biased_noise(patch: Patch) -> None:
    """The noise does not sum to zero over the clones."""
    original = width._uneven
    patch.setattr(width, "_uneven", lambda *words: original(*words) + 0.01)


def gates_of_all_experts(patch: Patch) -> None:
    """The softmax over all experts, of which the chosen ones' shares do not add up to 1."""

    def gates(self, logits_NE):  # type: ignore[no-untyped-def]
        return logits_NE.softmax(-1).topk(self.spec.experts_per_token)

    patch.setattr(MixtureFeedForward, "_gates", gates)


def one_expert_not_copied(patch: Patch) -> None:
    def fresh(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.spec.experts_per_token is not None:
            out.value[-1] = growth.fresh()[-1]
        return out

    _grow_tensor(patch, "experts", fresh)


def zero_router(patch: Patch) -> None:
    """All score alike: every token goes through the same experts, which stay alike."""

    def dead(growth: TensorGrowth, out: Grown) -> Grown:
        return out if growth.old is not None else Grown(torch.zeros_like(out.value))

    _grow_tensor(patch, "experts", dead)


def fresh_scores_for_clones(patch: Patch) -> None:
    """A clone is not chosen with its expert."""

    def apart(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.spec.local != "mlp.router.weight" or growth.old is None:
            return out
        return dataclasses.replace(out, value=torch.cat((growth.old, growth.fresh()[len(growth.old) :])))

    _grow_tensor(patch, "experts", apart)


def undivided_moments(patch: Patch) -> None:
    """Every copy of a block has the whole block's moments."""
    _grow_tensor(patch, "experts", lambda growth, out: dataclasses.replace(out, gradient=1.0, squared=1.0))


def biased_expert_noise(patch: Patch) -> None:
    """The noise does not sum to zero over the clones."""

    def biased(growth: TensorGrowth, out: Grown) -> Grown:
        writes = growth.spec.writes_residual and growth.spec.experts_per_token is not None
        return dataclasses.replace(out, value=out.value + 0.01) if writes else out

    _grow_tensor(patch, "experts", biased)


def rows_of_other_tokens(patch: Patch) -> None:
    """Old rows behind the new ones: every token has become another."""
    _grow_tensor(patch, "vocab", lambda growth, out: Grown(out.value.roll(1, 0)))


def overwritten_rows(patch: Patch) -> None:
    _grow_tensor(patch, "vocab", lambda growth, out: Grown(growth.fresh()) if growth.spec.role == "head" else out)


def moments_of_other_tokens(patch: Patch) -> None:
    original = expand.expand_moments

    def rolled(*words, **options):  # type: ignore[no-untyped-def]
        grown = original(*words, **options)
        return Moments(grown.exp_avg.roll(1, 0), grown.exp_avg_sq.roll(1, 0), grown.step)

    patch.setattr(engine, "expand_moments", rolled)


def new_tokens_unread(patch: Patch) -> None:
    """The certificate reads old tokens alone, and calls the new rows of the embedding dead."""
    patch.setattr(verify, "with_new_tokens", lambda probe, before, after: probe)


def an_embedding_without_mask(patch: Patch) -> None:
    """What the layers write to new dimensions is under the mask, what the embedding writes is not."""
    patch.setattr(logits, "stream_mask", lambda config, **_: None)


def a_mask_at_one(patch: Patch) -> None:
    patch.setattr(Ramp, "set", lambda self, ramp: self.now.copy_(self._end))


def a_ramp_that_is_not_reset(patch: Patch) -> None:
    patch.setattr(path, "is_masked", lambda config: False)


def masks_of_the_last_growth(patch: Patch) -> None:
    """What the last growth had under its mask goes back to 0 with the next one's ramp."""
    patch.setattr(path, "unmasked", lambda config: config)


def a_ramp_that_stands_still(patch: Patch) -> None:
    """The certificate looks at gradients under a mask at 0 alone."""
    patch.setattr(gradients, "dataclasses", SimpleNamespace(replace=lambda config, ramp: config))


def masked_heads_at_the_end(patch: Patch) -> None:
    """Not behind the old heads of their kv group."""

    def last(spec, ramp):  # type: ignore[no-untyped-def]
        if spec.steady_heads is None:
            return None
        old = spec.steady_heads[0] * spec.head_dim
        return mask([i < old for i in range(spec.num_heads * spec.head_dim)], ramp)

    patch.setattr(layers, "head_mask", last)


MUTANTS: list[tuple[Callable[[Patch], None], str, str]] = [
    (wrong_tau, "param_tokens", "held"),
    (random_values_in_a_bank, "param_tokens", "bank"),
    (zero_keys_and_zero_values, "param_tokens", "bank"),
    (zero_keys_and_zero_values, "param_tokens", "held"),
    (stale_eps, "width", "pad"),
    (unscaled_gain, "width", "pad"),
    (unscaled_moments, "width", "pad"),
    (unseeded_second_moments, "width", "pad"),
    (misplaced_moments, "heads", "zero_out"),
    (misordered_heads, "heads", "zero_out"),
    (misordered_concat, "mlp", "zero_down"),
    (half_an_identity, "depth", "identity"),
    (a_bias_that_still_writes, "depth", "identity"),
    (unscaled_query_bias, "head_dim", "interleave"),
    (a_ramp_called_exact, "head_dim", "interleave"),
    (zeroed_gains, "depth", "identity"),
    (stacking_called_exact, "depth", "stack"),
    (growth_in_place, "depth", "identity"),
    (global_randomness, "param_tokens", "bank"),
    (forgotten_moments, "depth", "identity"),
    (random_writes, "width", "pad"),
    (appended_pairs, "head_dim", "interleave"),
    (unscaled_queries, "head_dim", "interleave"),
    (stale_qk_eps, "head_dim", "interleave"),
    (random_keys_under_a_norm, "head_dim", "interleave"),
    (zero_keys_and_zero_queries, "head_dim", "interleave"),
    (undivided_clones, "width", "clone"),
    (unshared_gradients, "width", "clone"),
    (forgotten_logit_scale, "width", "clone"),
    (biased_noise, "width", "clone_noise"),
    (biased_noise, "width", "clone_split"),
    (gates_of_all_experts, "experts", "copy"),
    (one_expert_not_copied, "experts", "copy"),
    (zero_router, "experts", "copy"),
    (undivided_moments, "experts", "copy"),
    (fresh_scores_for_clones, "experts", "clone_noise"),
    (undivided_moments, "experts", "clone_noise"),
    (biased_expert_noise, "experts", "clone_noise"),
    (rows_of_other_tokens, "vocab", "mean"),
    (overwritten_rows, "vocab", "fresh"),
    (moments_of_other_tokens, "vocab", "mean"),
    (new_tokens_unread, "vocab", "mean"),
    (an_embedding_without_mask, "width", "masked"),
    *((a_mask_at_one, operator, "masked") for operator in ("depth", "width", "mlp", "heads", "param_tokens")),
    (a_mask_at_one, "param_tokens", "annealed"),
    (a_ramp_that_is_not_reset, "mlp", "masked"),
    (masks_of_the_last_growth, "depth", "masked"),
    (a_ramp_that_stands_still, "heads", "masked"),
    (masked_heads_at_the_end, "heads", "masked"),
]
# The family a mutant is tried on, where it is not the operator's first.
FAMILY = {
    misplaced_moments: "transformer-gqa",  # order matters
    misordered_heads: "transformer-gqa",
    masked_heads_at_the_end: "transformer-gqa",
    appended_pairs: "transformer",
    unscaled_queries: "transformer",
    stale_qk_eps: "transformer-gqa",  # has QK-norm
    random_keys_under_a_norm: "transformer-gqa",
    zero_keys_and_zero_queries: "transformer",
    undivided_clones: "transformer",
    a_bias_that_still_writes: "neox",
    unscaled_query_bias: "neox",
    a_ramp_called_exact: "transformer-bias-yarn",
    overwritten_rows: "neox",  # whose head is not tied
    new_tokens_unread: "transformer-gqa",
}


def _first_case(operator: str, method: str, family: str = "") -> contract.Case:
    found = (case for case in contract.cases(operator) if case.method == method)
    return next(case for case in found if family in ("", case.family))


@pytest.mark.parametrize(("mutant", "operator", "method"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_mutant_is_killed(mutant: Callable[[Patch], None], operator: str, method: str, monkeypatch: Patch) -> None:
    family = FAMILY.get(mutant, "")
    monkeypatch.setattr(contract, "logits_before", contract.logits_before.__wrapped__)  # of broken models none are kept
    mutant(monkeypatch)
    case = _first_case(operator, method, family)  # unbroken it keeps the contract: test_growth_contract.py
    with pytest.raises((AssertionError, PreservationError)):
        contract.check(case)


def _new_units(patch: Patch, change: Callable[[torch.Tensor], None]) -> None:
    """Changes what the operator ``mlp`` appends to gate | up: for each half a view of its new units."""

    def changed(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.old is not None and out.value.shape[0] > growth.old.shape[0]:
            for half, old in zip(out.value.chunk(2), growth.old.chunk(2), strict=True):
                change(half[len(old) :])
        return out

    _grow_tensor(patch, "mlp", changed)


def test_the_certificate_looks_into_enlarged_parameters(monkeypatch: Patch) -> None:
    """New units of an MLP that can never learn are dead; ones that are copies of each other are locked."""
    case = _first_case("mlp", "zero_down")
    added = case.target.layers[0].mlp.dim - case.source.layers[0].mlp.dim  # type: ignore[union-attr]
    state = contract.trained_like(case.source)

    def certificate() -> Certificate:
        found = engine.grow(state, case.target, case.methods, contract.generator(), contract.probe(case.source))[1]
        assert found.certificate is not None
        return found.certificate

    sound = certificate()
    assert not sound.dead and sound.locked_rows == 0 and min(sound.new_grad_norms) > 0
    assert len(sound.new_grad_norms) == verify.LIVE_BY, "all that is new lives by then"
    with monkeypatch.context() as patch:
        _new_units(patch, lambda units: units.zero_())
        assert len(certificate().dead) == 2 * len(case.source.layers), "gate_up and down of every layer"
    with monkeypatch.context() as patch:
        _new_units(patch, lambda units: units.copy_(units[0].clone()))
        copies = certificate()
        assert not copies.dead and copies.locked_rows == 3 * (added - 1) * len(case.source.layers), "gate, up, down"


@pytest.mark.parametrize("preset", ["tokenformer", "transformer"])
def test_the_certificate_tells_clones_that_are_locked_from_those_that_are_not(preset: str) -> None:
    for method in width.Width.methods:
        case = _first_case("width", method, preset)
        state = contract.trained_like(case.source)
        found = engine.grow(state, case.target, case.methods, contract.generator(), contract.probe(case.source))[1]
        assert found.certificate is not None and found.certificate.exact
        assert (found.certificate.locked_rows > 0) == (method == "clone"), method
