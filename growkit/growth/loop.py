"""Growth inside a training loop of one's own: ``from growkit import grow``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from growkit.errors import ConfigError
from growkit.growth.engine import GrowthReport, require_probe
from growkit.growth.engine import grow as grow_state
from growkit.growth.path import grown_config, path
from growkit.growth.state import Moments, TrainState
from growkit.models.config import ModelConfig
from growkit.models.decoder import DecoderLM, build
from growkit.models.spec import ParamSpec, param_specs

ADAMS = (torch.optim.Adam, torch.optim.AdamW)


@runtime_checkable
class Wrapped(Protocol):
    """A model around a DecoderLM, with no parameters beside: GrowkitForCausalLM, for transformers."""

    growkit: DecoderLM

    def with_decoder(self, model: DecoderLM) -> Self:
        """The same around ``model``."""
        ...


M = TypeVar("M", bound=DecoderLM | Wrapped)


def grow(
    model: M,
    optimizer: torch.optim.Optimizer,
    *,
    methods: Mapping[str, str] | None = None,
    probe: Tensor | None = None,
    seed: int = 0,
    **sizes: Any,
) -> tuple[M, torch.optim.Optimizer, GrowthReport]:
    """A larger model with its optimizer, and what the growth did; ``model`` and ``optimizer`` are left as they were.
    A model that wraps a DecoderLM comes back as its own kind.

    ``sizes``: what a recipe's ``grow:`` may say (``num_layers=24``), ``methods`` its ``methods:``. ``probe``: tokens
    (rows, context + 1) that the certificate is measured on, and that methods that look before they grow choose by;
    random ones if None, but not for these. ``optimizer``: Adam or AdamW over this model's parameters; the new one has
    its groups and options, the moments of old parameters, and each new parameter in the group of those like it.
    Learning-rate schedulers hold on to an optimizer: make them anew. What the methods ``masked`` and ``annealed`` grow
    comes in as you say: call the larger model's ``set_ramp`` with numbers from 0 to 1 while you train.

    Raises ConfigError for a size that cannot be reached, and for another kind of model (half precision, one that
    torch.compile returned), optimizer, ``methods`` or ``probe``; PreservationError if a step that claims to be exact is
    not.
    """
    if hasattr(model, "_orig_mod"):
        mend = "pass the model that torch.compile was given, and compile the larger one"
        kind = type(model).__name__
        raise ConfigError("wrong-type", "is a compiled model", key="model", value=kind, mend=mend)
    if isinstance(model, Wrapped):
        larger, further, report = _grow(model.growkit, optimizer, methods or {}, probe, seed, sizes)
        return model.with_decoder(larger), further, report
    result: Any = _grow(model, optimizer, methods or {}, probe, seed, sizes)
    return result


def _require_model(model: Any) -> None:
    """Raises ConfigError for what is no DecoderLM, or in a precision that keeps no function."""
    if not isinstance(model, DecoderLM):
        kind = type(model).__name__
        mend = "pass a DecoderLM or a GrowkitForCausalLM; `growkit grow` takes folders of Hugging Face's"
        raise ConfigError("wrong-type", "is not a model of growkit", key="model", value=kind, mend=mend)
    for name, p in model.named_parameters():
        if p.dtype not in (torch.float32, torch.float64):
            problem = f"is in {str(p.dtype).removeprefix('torch.')}, to which an exact step would be rounded"
            mend = "keep weights in float32 (model.float(), before its optimizer is made) and train under autocast"
            raise ConfigError("wrong-type", problem, key=f"model: {name}", mend=mend)


def _require_methods(methods: Any) -> None:
    if not isinstance(methods, Mapping) or not all(isinstance(method, str) for method in methods.values()):
        mend = "write a method's name for each operator, such as {'depth': 'stack'}"
        raise ConfigError("not-a-section", "must name a method for each", key="methods", value=methods, mend=mend)


def _require_tokens(probe: Any, config: ModelConfig) -> None:
    whole = isinstance(probe, Tensor) and not (probe.is_floating_point() or probe.dtype == torch.bool)
    if not whole or probe.dim() != 2 or probe.shape[0] < 1 or probe.shape[1] < 2:
        found = f"{probe.dtype} {tuple(probe.shape)}" if isinstance(probe, Tensor) else type(probe).__name__
        problem, mend = "is not rows of tokens", "pass whole numbers (rows, context + 1), two columns at least"
        raise ConfigError("wrong-type", problem, key="probe", value=found, mend=mend)
    least, most = int(probe.min()), int(probe.max())
    if least < 0 or most >= config.vocab_size:
        mend = f"use ids of the model's, from 0 to {config.vocab_size - 1}"
        problem = "holds ids that the model does not have"
        raise ConfigError("out-of-range", problem, key="probe", value=least if least < 0 else most, mend=mend)


def _grow(
    model: DecoderLM,
    optimizer: torch.optim.Optimizer,
    methods: Mapping[str, str],
    probe: Tensor | None,
    seed: int,
    sizes: Mapping[str, Any],
) -> tuple[DecoderLM, torch.optim.Optimizer, GrowthReport]:
    _require_model(model)
    _require_methods(methods)
    if probe is not None:
        _require_tokens(probe, model.config)
    if type(optimizer) not in ADAMS or any(group["amsgrad"] for group in optimizer.param_groups):
        kind, mend = type(optimizer).__name__, "use torch.optim.AdamW or Adam, without amsgrad"
        raise ConfigError("unknown-optimizer", "has moments that do not grow", key="optimizer", value=kind, mend=mend)
    names = _names(model, optimizer)
    if not sizes:
        raise ConfigError("nothing-grows", "names no size", key="grow", mend="name one, such as num_layers=24")
    target = grown_config(model.config, sizes, methods)
    device = model.embedding.weight.device
    params = {name: p.detach().cpu() for name, p in model.named_parameters()}
    state = TrainState(model.config, params, _moments(model, optimizer))
    generator = torch.Generator().manual_seed(seed)
    if probe is None:
        require_probe(path(model.config, target, methods), probe)
        probe = torch.randint(model.config.vocab_size, (2, 65), generator=generator)
    grown, report = grow_state(state, target, methods, generator, probe.cpu().long())
    larger = build(target, grown.params, checkpoint_layers=model.checkpoint_layers).to(device).train(model.training)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, p in larger.named_parameters():
        p.requires_grad_(name in trained or name not in params)
    return larger, _optimizer(optimizer, names, larger, grown, model.config), report


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The parameters of each group by name. Raises ConfigError for one that is not the model's."""
    known = {id(p): name for name, p in model.named_parameters()}
    groups = [[known.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if any(name is None for names in groups for name in names):
        mend = "pass the optimizer that trains this model"
        raise ConfigError("not-its-optimizer", "holds parameters that are not the model's", key="optimizer", mend=mend)
    return [[name for name in names if name is not None] for names in groups]


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Moments]:
    """Of the parameters that were updated already."""
    found = {}
    for name, p in model.named_parameters():
        if "exp_avg" in (state := optimizer.state.get(p, {})):
            found[name] = Moments(state["exp_avg"].cpu(), state["exp_avg_sq"].cpu(), float(state["step"]))
    return found


def _optimizer(
    old: torch.optim.Optimizer,
    names: Sequence[Sequence[str]],
    model: DecoderLM,
    grown: TrainState,
    source: ModelConfig,
) -> torch.optim.Optimizer:
    named, specs = dict(model.named_parameters()), param_specs(model.config)
    before = param_specs(source)
    home = {name: index for index, group in enumerate(names) for name in group}
    like = {_likeness(before[name]): index for name, index in home.items()}
    members: list[list[nn.Parameter]] = [[] for _ in names]
    for name, p in named.items():
        if name in home:
            members[home[name]].append(p)
        elif name not in before:
            members[like.get(_likeness(specs[name]), 0)].append(p)
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": params}
        for group, params in zip(old.param_groups, members, strict=True)
    ]
    kind: Any = type(old)
    optimizer: torch.optim.Optimizer = kind(groups)
    optimizer.defaults.update(old.defaults)
    moved = {
        named[name]: {
            "step": torch.tensor(m.step),
            "exp_avg": m.exp_avg.clone(),  # what did not grow is the old optimizer's own
            "exp_avg_sq": m.exp_avg_sq.clone(),
        }
        for name, m in grown.moments.items()
    }
    order = [p for group in optimizer.param_groups for p in group["params"]]
    saved = optimizer.state_dict() | {"state": {i: moved[p] for i, p in enumerate(order) if p in moved}}
    optimizer.load_state_dict(saved)  # puts every tensor on the device where this optimizer wants it
    return optimizer


def _likeness(spec: ParamSpec) -> tuple[str, str]:
    return spec.role, spec.component
