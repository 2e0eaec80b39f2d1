"""Growth as a pure function: a state in, a larger one out, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from growkit import faults
from growkit.errors import ConfigError
from growkit.growth.expand import aligned, expand_moments, index_maps
from growkit.growth.observe import Seen, observe, own
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
    chain = lazy_states(state, links, generator, stage=stage, probe=probe)
    grown = chain[-1].materialized()
    faults.point("mid_growth")
    return grown, growth_report(chain, probe, grown=grown, dtype=dtype)


def growth_report(
    chain: Chain, probe: Tensor | None, *, grown: TrainState | None = None, dtype: torch.dtype = torch.float32
) -> GrowthReport:
    """What ``chain`` made of its start, measured on ``probe`` if there is one. ``grown``: its last state, if that is in
    memory or on the disk. Raises PreservationError as ``grow``."""
    links, last = chain.links, grown or chain[-1]
    states = [chain.start, *chain[:-1], last]
    new = tuple(name for name in last.params if not all(name in one.params for one in states))
    certificate, deltas = None, tuple[float, ...]()
    if probe is not None:
        claims, entries = tuple(link.exactness for link in links), chain.new_entries()
        wide = None
        if len(links) > 1:
            names = [f"{link.operator} ({link.method})" for link in links]
            deltas, wide = certify_links(states, claims, names, probe)
        certificate = certify(chain.start, last, claims, probe, new=entries, dtype=dtype, wide=wide)
        deltas = deltas or (certificate.delta_logits_float64,)
    before, after = chain.start.config.num_params(), last.config.num_params()
    return GrowthReport(tuple(links), deltas, new, before, after, certificate)


def require_probe(links: Sequence[Link], probe: Tensor | None) -> None:
    """Raises ConfigError if one of ``links`` looks before it grows and there is nothing to look at."""
    looking = next((link for link in links if link.method in operator(link.operator).looks), None)
    if looking is not None and probe is None:
        problem = "chooses by what the model does on real text, and there is none"
        mend = "give it some (grow's probe, `growkit grow --data`), or use another method"
        raise ConfigError("needs-a-probe", problem, key=f"methods.{looking.operator}", value=looking.method, mend=mend)


def lazy_states(
    state: TrainState,
    links: Sequence[Link],
    generator: torch.Generator,
    *,
    stage: int = 0,
    probe: Tensor | None = None,
) -> Chain:
    """The state after each link, as mappings that grow a tensor when it is asked for, so that growth can stream.
    ``probe``: tokens (rows, context + 1) for methods that look before they grow, which hold the model once. Raises
    ConfigError for one of those without a probe."""
    require_probe(links, probe)
    # One draw seeds everything; each tensor's own seed is a hash with its name, so order and sharding do not matter.
    seed = int(torch.randint(2**62, (), generator=generator))
    views, states, start = [], [], state
    for number, link in enumerate(links):
        view = _Link(state, link, f"{seed}/{number}", probe)
        born = {name: state.born.get(name, 0) if name in view.old_specs else stage for name in view.specs}
        born = {name: at for name, at in born.items() if at or name in state.born}
        params = Lazy(list(view.specs), view.value)
        kept = [name for name in view.specs if name in view.old_specs and name in state.moments]
        state = TrainState(link.target, params, Lazy(kept, view.moments), born)
        views.append(view)
        states.append(state)
    return Chain(start, states, views)


def _new_entries(start: TrainState, views: Sequence[_Link]) -> Mapping[str, Tensor]:
    before, after = param_specs(start.config), views[-1].specs

    def marked(name: str) -> Tensor:
        shape = after[name].shape
        held: list[Sequence[int]] | None = [range(size) for size in before[name].shape] if name in before else None
        for view in views:
            if held is None or name not in view.specs:
                held = None  # a bank laid into another one; a later link may make a new one of its name
                continue
            held = [range(1)] * (len(view.specs[name].shape) - len(held)) + held  # axes it had not
            held = [_composed(old, new) for old, new in zip(held, view.maps(name), strict=True)]
        if held is None:
            return torch.ones((), dtype=torch.bool).expand(shape)  # takes no memory
        new = torch.zeros(shape, dtype=torch.bool)
        for dim, indices in enumerate(held):
            firsts = {old: place for place, old in reversed(list(enumerate(indices)))}
            again = [old == NEW or firsts[old] != place for place, old in enumerate(indices)]
            new |= torch.tensor(again).view(-1, *[1] * (len(shape) - 1 - dim))
        return new

    # Every old entry is held at least once, so a parameter has new entries where it has more of them: its own old ones,
    # or those of others that were laid into it.
    def grown(name: str) -> bool:
        if not all(name in view.old_specs for view in views):
            return True
        if any(view.gathers(name) for view in views):
            return bool(marked(name).any())
        return after[name].numel > before[name].numel

    return Lazy([name for name in after if grown(name)], marked)


def added_entries(links: Sequence[Link]) -> Mapping[str, Tensor]:
    """``Chain.new_entries`` from the configurations alone: where entries go does not depend on what they hold, so any
    state and any probe show it. Weights are drawn, since methods that look divide by what they see."""
    source = links[0].source
    specs, generator = param_specs(source), torch.Generator().manual_seed(0)
    params = Lazy(list(specs), lambda name: init_tensor(specs[name], generator))
    probe = torch.zeros(1, 2, dtype=torch.int64)
    return lazy_states(TrainState(source, params), links, generator, probe=probe).new_entries()


def _composed(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """What each index holds after a second step, ``new`` of what ``old`` held; beyond ``old`` are entries that came
    from other parameters, and keep their numbers."""
    return [NEW if i == NEW else old[i] if i < len(old) else i for i in new]


class Lazy(Mapping[str, T]):
    """Names in order, values computed on access."""

    def __init__(self, names: list[str], compute: Callable[[str], T]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Chain(Sequence[TrainState]):
    """The state after each link, from ``start`` on, as mappings that grow a tensor when it is asked for."""

    def __init__(self, start: TrainState, states: Sequence[TrainState], views: Sequence[_Link]) -> None:
        self.start, self._states, self._views = start, states, views

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(view.link for view in self._views)

    def kept_params(self) -> frozenset[str]:
        """Names of the parameters that the last state has as ``start`` has them."""
        return frozenset(name for name in self.start.params if all(view.keeps(name) for view in self._views))

    def kept_moments(self) -> frozenset[str]:
        """Names of the parameters of which the last state has the moments that ``start`` has."""
        with_moments = (name for name in self.start.params if name in self._states[-1].moments)
        return frozenset(name for name in with_moments if all(view.keeps_place(name) for view in self._views))

    def new_entries(self) -> Mapping[str, Tensor]:
        """Where the last state holds entries that ``start`` has not (bool), of the parameters that have any, made when
        asked for. Of the clones of an entry all but the first are new."""
        return _new_entries(self.start, self._views)

    @overload
    def __getitem__(self, place: int) -> TrainState: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[TrainState]: ...

    def __getitem__(self, place: int | slice) -> TrainState | Sequence[TrainState]:
        return self._states[place]

    def __len__(self) -> int:
        return len(self._states)


class _Link:
    """One link over a state: computes the target's tensors on demand."""

    def __init__(self, state: TrainState, link: Link, seed: str, probe: Tensor | None) -> None:
        self.state, self.link, self.seed, self.probe = state, link, seed, probe
        self.specs, self.old_specs = param_specs(link.target), param_specs(link.source)
        self.operator = operator(link.operator)
        self._how: dict[str, Grown] = {}
        self._by_place: dict[int | None, dict[str, str]] = {}  # layer → local name → name
        for name, spec in self.old_specs.items():
            self._by_place.setdefault(spec.layer, {})[spec.local or name] = name

    @cached_property
    def seen(self) -> Mapping[str, Seen]:
        """What the model before the step sees on the probe; looked at once, when the first tensor is asked for."""
        assert self.probe is not None
        return observe(self.state, self.probe) if self.link.method in self.operator.looks else {}

    def of_layer(self, tensors: Mapping[str, T], layer: int | None) -> Mapping[str, T]:
        """Those of ``tensors`` that belong to ``layer``, by local name."""
        names = {local: name for local, name in self._by_place.get(layer, {}).items() if name in tensors}
        return Lazy(list(names), lambda local: tensors[names[local]])

    def about(self, name: str) -> TensorGrowth:
        spec, old_spec = self.specs[name], self.old_specs.get(name)
        old = self.state.params[name] if old_spec is not None else None
        origin = None
        if old is None and spec.layer is not None:
            copied = self.link.target.layer(spec.layer).origin
            if copied is not None and (source := self._by_place.get(copied, {}).get(spec.local)) is not None:
                origin = self.state.params[source]
        dtype = old.dtype if old is not None else next(iter(self.state.params.values())).dtype

        def fresh() -> Tensor:
            digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
            own = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            return init_tensor(spec, own).to(dtype)

        link = self.link
        seen = own(self.seen, name) if link.method in self.operator.looks else None
        layer = self.of_layer(self.state.params, spec.layer)
        return TensorGrowth(spec, old_spec, old, origin, link.source, link.target, link.method, fresh, layer, seen)

    def grown(self, name: str) -> Grown:
        spec, result = self.specs[name], self.operator.grow_tensor(self.about(name))
        assert result.value.shape == spec.shape, (name, tuple(result.value.shape), spec.shape)
        self._how[name] = replace(result, value=result.value.new_empty(0))
        return result

    def how(self, name: str) -> Grown:
        """What growing ``name`` does to its gradient and where it lays it, without the value: moments and marks need
        no more, and the value is grown once already where it was written or measured before them."""
        return self._how[name] if name in self._how else self.grown(name)

    def keeps_place(self, name: str) -> bool:
        """Whether ``name`` is an old parameter with its old axes; its moments are its old ones then."""
        return name in self.specs and name in self.old_specs and self.specs[name].axes == self.old_specs[name].axes

    def keeps(self, name: str) -> bool:
        """Whether the parameter ``name`` is handed on as it is."""
        if not self.keeps_place(name):
            return False
        growth = self.about(name)
        return self.operator.grow_tensor(growth).value is growth.old

    def gathers(self, name: str) -> bool:
        """Whether this link lays several old parameters, or parts of one, into an old parameter."""
        return self.specs[name].axes != self.old_specs[name].axes and self.how(name).moments is not None

    def maps(self, name: str) -> list[list[int]]:
        """For each dimension of an old parameter, what every index of it holds now."""
        axes, old_axes = self.specs[name].axes, self.old_specs[name].axes
        if self.gathers(name):
            return [list(range(size)) for size in self.specs[name].shape]
        return index_maps(aligned(old_axes, axes), axes, self.how(name).placement if axes != old_axes else None)

    def value(self, name: str) -> Tensor:
        return self.grown(name).value

    def moments(self, name: str) -> Moments:
        if self.keeps_place(name):
            return self.state.moments[name]
        spec, old_spec = self.specs[name], self.old_specs[name]
        how = self.how(name)
        if how.moments is not None:
            return how.moments(self.of_layer(self.state.moments, spec.layer))
        factors: dict[str, Any] = {"gradient": how.gradient, "squared": how.squared}
        return expand_moments(self.state.moments[name], old_spec.axes, spec.axes, placement=how.placement, **factors)
