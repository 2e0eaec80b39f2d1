"""Deliberately broken growth, each caught by the contract: what the suite would let through, it does not test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from growkit.errors import PreservationError
from growkit.growth import engine, expand
from growkit.growth.operator import OPERATORS, Exactness, Grown, TensorGrowth
from growkit.growth.operators import dense, param_tokens
from growkit.growth.state import Moments
from growkit.growth.verify import Certificate
from growkit.models import axes
from growkit.models.presets import initial_tau
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
    patch.setattr(dense, "padded_norm", lambda norm, ratio: norm)


def unscaled_gain(patch: Patch) -> None:
    def plain(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.spec.role != "gain" or growth.old is None or growth.old_spec == growth.spec:
            return out
        return Grown(expand.expand(growth.old, growth.old_spec.axes, torch.ones_like(out.value), growth.spec.axes))

    _grow_tensor(patch, "width", plain)


def unscaled_moments(patch: Patch) -> None:
    original = expand.expand_moments

    def unscaled(old, old_axes, new_axes, *, scale=1.0, placement=None):  # type: ignore[no-untyped-def]
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

    def misplaced(old, old_axes, new_axes, *, scale=1.0, placement=None):  # type: ignore[no-untyped-def]
        return original(old, old_axes, new_axes, scale=scale)

    patch.setattr(engine, "expand_moments", misplaced)


def misordered_heads(patch: Patch) -> None:
    """New query heads go to the end, so that old ones change their kv group."""
    patch.setattr(dense, "query_placement", lambda spec, source, target: None)


def misordered_concat(patch: Patch) -> None:
    """gate | up keeps its old offsets in the wider tensor."""
    original = axes.index_map

    def flat(old, new, placement=None):  # type: ignore[no-untyped-def]
        return list(range(old.size)) if isinstance(old, axes.Concat) else original(old, new, placement)

    patch.setattr(expand, "index_map", flat)


def half_an_identity(patch: Patch) -> None:
    """The inserted layer's MLP keeps writing."""

    def half(growth: TensorGrowth, out: Grown) -> Grown:
        if growth.old is None and growth.spec.component == "mlp":
            assert growth.origin is not None
            return Grown(growth.origin.clone())
        return out

    _grow_tensor(patch, "depth", half)


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
    patch.setattr(dense.Width, "zero_side", "in")


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
    (zeroed_gains, "depth", "identity"),
    (stacking_called_exact, "depth", "stack"),
    (growth_in_place, "depth", "identity"),
    (global_randomness, "param_tokens", "bank"),
    (forgotten_moments, "depth", "identity"),
    (random_writes, "width", "pad"),
]


def _first_case(operator: str, method: str) -> contract.Case:
    """The case a mutant is tried on: for heads the grouped family, where order matters; else the first one."""
    found = [case for case in contract.cases() if (case.operator, case.method) == (operator, method)]
    grouped = [case for case in found if case.family == "transformer-gqa"]
    return grouped[0] if operator == "heads" else found[0]


@pytest.mark.parametrize(("mutant", "operator", "method"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_mutant_is_killed(mutant: Callable[[Patch], None], operator: str, method: str, monkeypatch: Patch) -> None:
    contract.check(_first_case(operator, method))  # sound before
    mutant(monkeypatch)
    case = _first_case(operator, method)
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
    with monkeypatch.context() as patch:
        _new_units(patch, lambda units: units.zero_())
        assert len(certificate().dead) == 2 * len(case.source.layers), "gate_up and down of every layer"
    with monkeypatch.context() as patch:
        _new_units(patch, lambda units: units.copy_(units[0].clone()))
        copies = certificate()
        assert not copies.dead and copies.locked_rows == 2 * (added - 1) * len(case.source.layers)
