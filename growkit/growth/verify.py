"""Certificates: what a growth step did to the function, measured, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.errors import ConfigError, PreservationError
from growkit.growth.gradients import PROBE_STEPS, any_nonzero, probe_gradients
from growkit.growth.logits import Pair, stream_logits
from growkit.growth.operator import Exactness
from growkit.growth.state import TrainState
from growkit.growth.ties import Ties

# Relative Δlogits of an exact step, measured in the dtype of training: the same function in another order of sums.
# 1e-4 is about 1000 float32 roundings of 6e-8; 5e-2 is some ten bf16 roundings of 4e-3.
TRAINING_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}
READ_NEW = 4  # one token in so many of the probe is a new one, where the vocabulary grew
GRADIENT_TOKENS = 32  # of the probe, for the gradients: whether there are any does not take all of it
LIVE_BY = 2  # the step by which what one operator adds has a gradient
# Gradients of equal rows differ by the order in which a matrix product adds, some 1e-8 to 1e-6 of them; those of rows
# that a little noise tells apart, by 1e-4 or more.
SAME_GRADIENT = 1e-5
DIGEST = 0x1E3779B97F4A7C15  # odd, without a pattern
COLUMNS = 64  # of a transposed matrix, squared and summed at a time: they stay in the cache
PASSED = 1 << 18  # entries that are gone through at a time
COMPARED = 16  # entries of a row that are compared before whole rows are


@dataclass(frozen=True)
class Certificate:
    """Measured on a probe batch; relative differences are ‖Δ‖/‖logits‖ (Frobenius), of the tokens that both models
    have; the losses are over all tokens of each.

    New entries are new parameters and what was added to old ones. ``new_grad_norms``: of all of them on the first two
    steps, and on a third if some have none by then (one operator's do; in a chain, a zero inside a zero may not);
    ``dead``: parameters whose new entries get none on any. ``locked_rows``: wholly new rows (columns, experts) that
    equal another one of their parameter in value and, up to rounding, in gradient on the last of these steps, so that
    training cannot tell them apart. ``tied_blocks``: pairs of an AltUp stream's blocks that are alike in the same way.
    """

    exact: bool
    reason: str
    delta_logits_float64: float
    max_delta_logits_float64: float
    delta_logits_training: float
    training_dtype: str
    loss_before: float
    loss_after: float
    parameters_before: int
    parameters_after: int
    new_grad_norms: tuple[float, ...]
    dead: tuple[str, ...]
    locked_rows: int
    tied_blocks: tuple[tuple[int, int], ...] = ()

    @property
    def delta_loss(self) -> float:
        return self.loss_after - self.loss_before


def certify(
    before: TrainState,
    after: TrainState,
    claims: tuple[Exactness, ...],
    probe: Tensor,
    *,
    new: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    wide: tuple[Tensor, Tensor] | None = None,
) -> Certificate:
    """Compares ``before`` and ``after`` on ``probe`` (rows, context + 1). Raises PreservationError if all ``claims``
    are exact and a tolerance is missed, ConfigError if the logits before are no numbers. ``new``: where the new entries
    are (bool), of the parameters that have any; it may be lazy, as the states. ``wide``: the float64 logits of both, if
    they are known. One layer at a time is in memory."""
    tokens, targets = probe[:, :-1], probe[:, 1:]
    sizes = before.config.vocab_size, after.config.vocab_size
    exact = all(claim.kind == "exact" for claim in claims)
    pair = Pair(before, after)
    wide_before, wide_after = pair.logits(tokens, torch.float64) if wide is None else wide
    _require_finite(before, wide_before)
    rows = with_new_tokens(probe, *sizes)[: max(1, GRADIENT_TOKENS // tokens.shape[1]), : GRADIENT_TOKENS + 1]
    streams: list[Tensor] = []  # of the tokens that gradients are taken of

    def keep(stream: Tensor) -> None:
        streams.append(stream[..., : rows.shape[0], : rows.shape[1] - 1, :].clone())

    same = dtype == torch.float32 and sizes[0] == sizes[1]
    run_before, run_after = pair.logits(tokens, dtype, keep) if same else pair.logits(tokens, dtype)
    norms, alive, locked, tied = _new_gradients(after, rows, new, streams)
    certificate = Certificate(
        exact=exact,
        reason="; ".join(dict.fromkeys(claim.reason for claim in claims)),
        delta_logits_float64=_relative(wide_after, wide_before),
        max_delta_logits_float64=float((wide_after[..., : sizes[0]] - wide_before).abs().max()),
        delta_logits_training=_relative(run_after, run_before),
        training_dtype=str(dtype).removeprefix("torch."),
        loss_before=_loss(run_before, targets),
        loss_after=_loss(run_after, targets),
        parameters_before=before.config.num_params(),
        parameters_after=after.config.num_params(),
        new_grad_norms=norms,
        dead=tuple(name for name in new if name not in alive),
        locked_rows=locked,
        tied_blocks=tied,
    )
    if exact:
        stored = next(iter(after.params.values())).dtype
        _hold_to(certificate, max(claim.tolerance(stored == torch.float64) for claim in claims), dtype)
    return certificate


def certify_links(
    states: Sequence[TrainState], claims: Sequence[Exactness], names: Sequence[str], probe: Tensor
) -> tuple[tuple[float, ...], tuple[Tensor, Tensor]]:
    """Relative Δlogits, in float64, of each link between two ``states``, and the logits of the first and the last.
    Raises PreservationError for one that claims to be exact and is not: in a chain with others that are not, the
    chain's own certificate would let it pass."""
    deltas = []
    first = before = stream_logits(states[0].config, states[0].params, probe[:, :-1], torch.float64)
    _require_finite(states[0], first)
    stored = next(iter(states[0].params.values())).dtype
    for state, claim, name in zip(states[1:], claims, names, strict=True):
        after = stream_logits(state.config, state.params, probe[:, :-1], torch.float64)
        deltas.append(_relative(after, before))
        tolerance = claim.tolerance(stored == torch.float64)
        if claim.kind == "exact" and not deltas[-1] <= tolerance:  # NaN fails too
            raise _not_preserved(f"{name}: {claim.reason}", deltas[-1], tolerance, "float64")
        before = after
    return tuple(deltas), (first, before)


def _hold_to(certificate: Certificate, float64_tolerance: float, dtype: torch.dtype) -> None:
    for measured, tolerance, where in (
        (certificate.delta_logits_float64, float64_tolerance, "float64"),
        (certificate.delta_logits_training, TRAINING_TOLERANCE[dtype], certificate.training_dtype),
    ):
        if not measured <= tolerance:  # NaN fails too
            raise _not_preserved(certificate.reason, measured, tolerance, where)


def _require_finite(state: TrainState, logits: Tensor) -> None:
    """Raises ConfigError if ``logits``, those of ``state``, are no numbers: nothing can be measured against
    them."""
    if logits.isfinite().all():
        return
    broken = next((name for name, tensor in state.params.items() if not tensor.isfinite().all()), None)
    problem = "computes logits that are no numbers" + (f": {broken} holds some that are none" if broken else "")
    mend = "use weights from before they broke"
    raise ConfigError("not-finite", f"the model that is to grow {problem}", key="grow", mend=mend)


def _not_preserved(reason: str, measured: float, tolerance: float, where: str) -> PreservationError:
    return PreservationError(
        "not-preserved",
        f"was to keep the function ({reason}), but the logits moved by {measured:.2e} (relative, {where}); the "
        f"tolerance is {tolerance:.0e}",
        key="grow",
        mend="the state before the growth is kept; please report this with the recipe",
    )


def _new_gradients(
    state: TrainState, rows: Tensor, new: Mapping[str, Tensor], streams: Sequence[Tensor]
) -> tuple[tuple[float, ...], set[str], int, tuple[tuple[int, int], ...]]:
    """Of the ``new`` entries: the norm of their gradients on each step of ``rows``, the parameters in which any of
    them has one, and the locked rows and tied blocks on the last step. ``streams``: as ``probe_gradients``."""
    if not new:
        return (), set(), 0, ()
    norms: list[dict[str, Tensor]] = [{} for _ in range(PROBE_STEPS)]
    locked, ties = [0] * PROBE_STEPS, [Ties(state, new) for _ in range(PROBE_STEPS)]
    alive: set[str] = set()

    def all_live(steps: int) -> bool:
        return steps >= LIVE_BY and len(alive) == len(new)

    taken = probe_gradients(state, rows[:, :-1], rows[:, 1:], new.keys(), streams=streams, enough=all_live)
    for step, name, gradient in taken:
        at = new[name]
        norms[step][name] = _norm_at(gradient, at)
        # A norm may underflow.
        if norms[step][name] > 0 or any_nonzero(gradient if _everywhere(at) else torch.where(at, gradient, 0)):
            alive.add(name)
        if step >= LIVE_BY - 1:
            locked[step] += _locked(state.params[name], gradient, at)
            ties[step].look(name, state.params[name], gradient)
    totals = [torch.stack([of[name] for name in new]).norm() for of in norms if of]
    last = len(totals) - 1
    return tuple(map(float, totals)), alive, locked[last], tuple(sorted(ties[last].pairs))


def _norm_at(gradient: Tensor, at: Tensor) -> Tensor:
    """‖gradient[at]‖, ``at`` (bool). Indices of so many entries would take four times the gradient's memory."""
    if _everywhere(at):
        return gradient.norm()
    rows = max(1, PASSED // gradient[0].numel())
    pairs = zip(torch.split(gradient, rows), torch.split(at, rows), strict=True)
    return torch.stack([torch.where(new, part, 0).norm() for part, new in pairs]).norm()


def _everywhere(new: Tensor) -> bool:
    """Whether all entries are new; of a new parameter they are one that is expanded, and it alone is read."""
    return bool(new[(0,) * new.dim()] if not any(new.stride()) else new.all())


def _locked(value: Tensor, gradient: Tensor, new: Tensor) -> int:
    """How many of the slices along each dimension (rows, columns, experts) that are wholly ``new`` and move add none to
    the different ones."""
    if value.dim() < 2:
        return 0
    sides = ((value.movedim(d, 0).flatten(1), gradient.movedim(d, 0).flatten(1)) for d in range(value.dim()))
    return sum(_locked_rows(*side, _rows(new, d)) for d, side in enumerate(sides))


def _rows(new: Tensor, dim: int) -> Tensor:
    """Which of the slices along ``dim`` are wholly new."""
    if _everywhere(new):
        return torch.ones(new.shape[dim], dtype=torch.bool)
    return new.movedim(dim, 0).flatten(1).all(dim=1)


def _locked_rows(value: Tensor, gradient: Tensor, added: Tensor) -> int:
    norms = _norms(gradient)
    moving = norms > 0
    different = [_different_rows(value, gradient, norms, of) for of in (moving, moving & ~added)]
    return int((moving & added).sum()) - (different[0] - different[1])


def _norms(rows: Tensor) -> Tensor:
    """Of each row. Where rows lie across memory they are summed a few columns at a time, ten times faster than
    torch's."""
    if rows.stride(1) == 1:
        return rows.norm(dim=1)
    total = rows.new_zeros(len(rows))
    for columns in torch.split(rows, COLUMNS, dim=1):
        total += columns.square().sum(dim=1)
    return total.sqrt_()


def _different_rows(value: Tensor, gradient: Tensor, norms: Tensor, of: Tensor) -> int:
    """How many different rows ``of`` the two tensors, side by side, have. Whole rows are gathered and compared only
    where some of their entries already agree."""
    index = of.nonzero()[:, 0]
    if not len(index):
        return 0
    columns = torch.linspace(0, value.shape[1] - 1, COMPARED).long()
    near = SAME_GRADIENT * norms
    group = _groups(value[index[:, None], columns], gradient[index[:, None], columns], near[index])
    size = group.bincount()
    alike = index[size[group] > 1]
    whole = _groups(value[alike], gradient[alike], near[alike])
    return int((size == 1).sum()) + len(whole.bincount())


def _groups(value: Tensor, gradient: Tensor, near: Tensor) -> Tensor:
    """The number of each row's group, in which values are equal and gradients are within ``near`` (rows,)."""
    _, equal = torch.unique(_digest(value), return_inverse=True)
    # Gradients that are near each other are neighbours in the order of any projection.
    order = (gradient @ torch.arange(1.0, gradient.shape[1] + 1).sin()).argsort()
    order = order[equal[order].argsort(stable=True)]
    apart = equal[order].diff() != 0
    apart |= gradient[order].diff(dim=0).norm(dim=1) > near[order][1:]
    group = torch.zeros_like(order)
    group[order[1:]] = apart.cumsum(0)
    return group


def _digest(value: Tensor) -> Tensor:
    """A number (int64) for each row, the same for equal rows and, but for one in 2**32, no others."""
    bits = (value.float() + 0.0).view(torch.int32).long()  # of a negative zero, those of zero
    place = torch.arange(1, value.shape[1] + 1) * DIGEST
    return (bits * (place ^ place >> 29)).sum(dim=1)


def with_new_tokens(probe: Tensor, before: int, after: int) -> Tensor:
    """``probe`` with every fourth token, in turn, one of those that a vocabulary of ``before`` tokens has more when it
    has ``after``: what the text does not hold cannot be seen to learn."""
    if before == after:
        return probe
    place = torch.arange(probe.numel(), device=probe.device).view_as(probe)
    return torch.where(place % READ_NEW == 0, before + place // READ_NEW % (after - before), probe)


def _relative(new: Tensor, old: Tensor) -> float:
    return float((new[..., : old.shape[-1]] - old).norm() / old.norm())


def _loss(logits: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
