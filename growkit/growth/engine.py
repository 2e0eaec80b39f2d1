"""Growth as a pure function: a state in, a larger one out, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from growkit import faults
from growkit.errors import ConfigError
from growkit.growth.observe import Seen, observe, own
from growkit.growth.operator import TensorGrowth
from growkit.growth.path import Link, operator, path
from growkit.growth.state import Moments, TrainState
from growkit.growth.verify import Certificate, certify, certify_links
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
    states = lazy_states(state, links, generator, stage=stage, probe=probe)
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
        claims, entries = tuple(link.exactness for link in links), new_entries(state, links, probe)
        if len(links) > 1:
            names = [f"{link.operator} ({link.method})" for link in links]
            deltas = certify_links([state, *grown], claims, names, probe)
        certificate = certify(state, grown[-1], claims, probe, new=entries, dtype=dtype)
        deltas = deltas or (certificate.delta_logits_float64,)
    before, after = state.config.num_params(), grown[-1].config.num_params()
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
) -> list[TrainState]:
    """The state after each link, as mappings that grow a tensor when it is asked for, so that growth can stream.
    ``probe``: tokens (rows, context + 1) for methods that look before they grow, which hold the model once. Raises
    ConfigError for one of those without a probe."""
    require_probe(links, probe)
    states = []
    # One draw seeds everything; each tensor's own seed is a hash with its name, so order and sharding do not matter.
    seed = int(torch.randint(2**62, (), generator=generator))
    for number, link in enumerate(links):
        view = _Link(state, link, f"{seed}/{number}", probe)
        born = {name: state.born.get(name, 0) if name in view.old_specs else stage for name in view.specs}
        born = {name: at for name, at in born.items() if at or name in state.born}
        params = Lazy(list(view.specs), view.value)
        kept = [name for name in view.specs if name in view.old_specs and name in state.moments]
        state = TrainState(link.target, params, Lazy(kept, view.moments), born)
        states.append(state)
    return states


def new_entries(state: TrainState, links: Sequence[Link], probe: Tensor | None = None) -> dict[str, Tensor]:
    """Where the grown state holds entries that did not exist before (bool), of the parameters that have any. Of the
    clones of an entry all but the first are new. ``probe``: as for ``lazy_states``."""
    numbered = TrainState(state.config, state.params, _Numbered(state.config, state.params))
    marked = lazy_states(numbered, links, torch.Generator(), probe=probe)[-1]
    entries = {}
    for name, spec in param_specs(marked.config).items():
        if name not in marked.moments:
            entries[name] = torch.ones(spec.shape, dtype=torch.bool)
            continue
        numbers = marked.moments[name].exp_avg  # times what a gradient is multiplied by, alike for clones of one
        new = numbers == 0
        if int((~new).sum()) > state.params[name].numel():
            ordered, places = numbers.flatten().sort(stable=True)
            again = places[1:][ordered[1:] == ordered[:-1]]
            new.view(-1)[again] = True
        if new.any():
            entries[name] = new
    return entries


class _Numbered(Mapping[str, Moments]):
    """Carried along as moments, numbers from 1 on tell old entries apart; new entries start at zero."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Tensor]) -> None:
        self._params = params
        sizes = {name: spec.numel for name, spec in param_specs(config).items()}
        self._first = dict(zip(sizes, accumulate(sizes.values(), initial=1), strict=False))

    def __getitem__(self, name: str) -> Moments:
        shape, first = self._params[name].shape, self._first[name]
        numbers = torch.arange(first, first + shape.numel(), dtype=torch.float64).view(shape)
        return Moments(numbers, torch.ones((), dtype=torch.float64).expand(shape), 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


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


class _Link:
    """One link over a state: computes the target's tensors on demand."""

    def __init__(self, state: TrainState, link: Link, seed: str, probe: Tensor | None) -> None:
        self.state, self.link, self.seed, self.probe = state, link, seed, probe
        self.specs, self.old_specs = param_specs(link.target), param_specs(link.source)
        self.operator = operator(link.operator)
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

    def value(self, name: str) -> Tensor:
        spec, value = self.specs[name], self.operator.grow_tensor(self.about(name)).value
        assert value.shape == spec.shape, (name, tuple(value.shape), spec.shape)
        return value

    def moments(self, name: str) -> Moments:
        if self.specs[name].axes == self.old_specs[name].axes:
            return self.state.moments[name]
        growth = self.about(name)
        layer = self.of_layer(self.state.moments, growth.spec.layer)
        return self.operator.grow_moments(growth, self.state.moments[name], layer)
