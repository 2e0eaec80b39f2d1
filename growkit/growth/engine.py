"""Growth as a pure function: a state in, a larger one out, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from growkit import faults
from growkit.growth.expand import expand_moments, index_maps
from growkit.growth.operator import Grown, TensorGrowth
from growkit.growth.path import Link, operator, path
from growkit.growth.state import Moments, TrainState
from growkit.growth.verify import Certificate, certify, certify_links
from growkit.models.axes import NEW
from growkit.models.config import ModelConfig
from growkit.models.decoder import init_tensor
from growkit.models.spec import param_specs

T = TypeVar("T")


@dataclass(frozen=True)
class GrowthReport:
    """What a growth did. ``new``: parameters that did not exist before. ``certificate``: of the whole chain, None
    without a probe. ``deltas``: relative Δlogits of each link by itself, in float64; empty without a probe."""

    links: tuple[Link, ...]
    deltas: tuple[float, ...]
    new: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    certificate: Certificate | None

    def record(self) -> dict[str, Any]:
        """The report as plain values, for a lineage or a log."""
        links = [{"operator": link.operator, "method": link.method, **asdict(link.exactness)} for link in self.links]
        for link, delta in zip(links, self.deltas):
            link["delta_logits_float64"] = delta
        return {
            "links": links,
            "new_parameters": len(self.new),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "certificate": asdict(self.certificate) if self.certificate is not None else None,
        }


def grow(
    state: TrainState,
    target: ModelConfig,
    methods: Mapping[str, str],
    generator: torch.Generator,
    probe: Tensor | None = None,
    *,
    stage: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[TrainState, GrowthReport]:
    """``state`` grown to ``target``; the input is left bitwise as it was.

    ``methods``: operator → method, where a default is not wanted. ``generator``: the only source of randomness.
    ``probe``: tokens (rows, context + 1) to measure the certificate on; ``dtype``: the training run's.
    ``stage``: what new parameters are marked as born in. Raises ConfigError for a target that cannot be reached and
    PreservationError when a step that claims to be exact is not.
    """
    links = path(state.config, target, methods)
    states = lazy_states(state, links, generator, stage=stage)
    grown = states[-1].materialized()
    faults.point("mid_growth")
    return grown, growth_report(state, [*states[:-1], grown], links, probe, dtype=dtype)


def growth_report(
    state: TrainState,
    grown: Sequence[TrainState],
    links: Sequence[Link],
    probe: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> GrowthReport:
    """What ``links`` made of ``state``, ``grown`` after each, measured on ``probe`` if there is one. Raises
    PreservationError as ``grow``."""
    new = tuple(name for name in grown[-1].params if name not in state.params)
    certificate, deltas = None, tuple[float, ...]()
    if probe is not None:
        claims, entries = tuple(link.exactness for link in links), new_entries(state, links)
        wide = None
        if len(links) > 1:
            names = [f"{link.operator} ({link.method})" for link in links]
            deltas, wide = certify_links([state, *grown], claims, names, probe)
        certificate = certify(state, grown[-1], claims, probe, new=entries, dtype=dtype, wide=wide)
        deltas = deltas or (certificate.delta_logits_float64,)
    before, after = state.config.num_params(), grown[-1].config.num_params()
    return GrowthReport(tuple(links), deltas, new, before, after, certificate)


def lazy_states(
    state: TrainState, links: Sequence[Link], generator: torch.Generator, *, stage: int = 0
) -> list[TrainState]:
    """The state after each link, as mappings that grow a tensor when it is asked for, so that growth can stream."""
    # One draw seeds everything; each tensor's own seed is a hash with its name, so order and sharding do not matter.
    seed = int(torch.randint(2**62, (), generator=generator))
    return [state for _, state in _chain(state, links, seed, stage)]


def _chain(state: TrainState, links: Sequence[Link], seed: int, stage: int) -> list[tuple[_Link, TrainState]]:
    chain = []
    for number, link in enumerate(links):
        view = _Link(state, link, f"{seed}/{number}")
        born = dict(state.born) | {name: stage for name in view.specs if name not in view.old_specs}
        params = _Lazy(list(view.specs), view.value)
        kept = [name for name in view.specs if name in view.old_specs and name in state.moments]
        state = TrainState(link.target, params, _Lazy(kept, view.moments), born)
        chain.append((view, state))
    return chain


def new_entries(state: TrainState, links: Sequence[Link]) -> Mapping[str, Tensor]:
    """Where the grown state holds entries that did not exist before (bool), of the parameters that have any, made when
    asked for. Of the clones of an entry all but the first are new."""
    views = [view for view, _ in _chain(state, links, 0, 0)]
    before, after = param_specs(state.config), param_specs(links[-1].target)

    def marked(name: str) -> Tensor:
        shape = after[name].shape
        if name not in before:
            return torch.ones((), dtype=torch.bool).expand(shape)  # takes no memory
        held: list[Sequence[int]] = [range(size) for size in before[name].shape]
        for view in views:
            maps = view.maps(name)
            held = [[NEW if i == NEW else old[i] for i in new] for old, new in zip(held, maps, strict=True)]
        new = torch.zeros(shape, dtype=torch.bool)
        for dim, indices in enumerate(held):
            firsts = {old: place for place, old in reversed(list(enumerate(indices)))}
            again = [old == NEW or firsts[old] != place for place, old in enumerate(indices)]
            new |= torch.tensor(again).view(-1, *[1] * (len(shape) - 1 - dim))
        return new

    # Every old entry is held at least once, so a parameter has new entries where it has more of them.
    return _Lazy([n for n, spec in after.items() if n not in before or spec.numel > before[n].numel], marked)


class _Lazy(Mapping[str, T]):
    """Names in order, values computed on access."""

    def __init__(self, names: list[str], compute: Callable[[str], T]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Link:
    """One link over a state: computes the target's tensors on demand."""

    def __init__(self, state: TrainState, link: Link, seed: str) -> None:
        self.state, self.link, self.seed = state, link, seed
        self.specs, self.old_specs = param_specs(link.target), param_specs(link.source)
        self.operator = operator(link.operator)
        self._how: dict[str, Grown] = {}
        self._by_place = {(s.layer, s.local): name for name, s in self.old_specs.items() if s.layer is not None}

    def grown(self, name: str) -> Grown:
        spec, old_spec = self.specs[name], self.old_specs.get(name)
        old = self.state.params[name] if old_spec is not None else None
        origin = None
        if old is None and spec.layer is not None:
            layer = self.link.target.layer(spec.layer).origin
            if layer is not None and (source := self._by_place.get((layer, spec.local))) is not None:
                origin = self.state.params[source]
        dtype = old.dtype if old is not None else next(iter(self.state.params.values())).dtype

        def fresh() -> Tensor:
            digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
            own = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            return init_tensor(spec, own).to(dtype)

        link = self.link
        growth = TensorGrowth(spec, old_spec, old, origin, link.source, link.target, link.method, fresh)
        result = self.operator.grow_tensor(growth)
        assert result.value.shape == spec.shape, (name, tuple(result.value.shape), spec.shape)
        self._how[name] = replace(result, value=result.value.new_empty(0))
        return result

    def how(self, name: str) -> Grown:
        """What growing ``name`` does to its gradient and where it lays it, without the value: moments and marks need
        no more, and the value is grown once already where it was written or measured before them."""
        return self._how[name] if name in self._how else self.grown(name)

    def maps(self, name: str) -> list[list[int]]:
        """For each dimension of an old parameter, what every index of it holds now."""
        axes, old_axes = self.specs[name].axes, self.old_specs[name].axes
        return index_maps(old_axes, axes, self.how(name).placement if axes != old_axes else None)

    def value(self, name: str) -> Tensor:
        return self.grown(name).value

    def moments(self, name: str) -> Moments:
        old, spec, old_spec = self.state.moments[name], self.specs[name], self.old_specs[name]
        if spec.axes == old_spec.axes:
            return old
        grown = self.how(name)
        return expand_moments(old, old_spec.axes, spec.axes, gradient=grown.gradient, placement=grown.placement)
