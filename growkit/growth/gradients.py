"""Gradients of a model that is never whole in memory: only the residual stream is kept between layers, forward and
backward hold the weights of one layer at a time.

Legend: B batch, T tokens, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from growkit.errors import ConfigError
from growkit.growth.state import TrainState
from growkit.models.config import LayerSpec, ModelConfig
from growkit.models.layers import Layer, rope_table
from growkit.models.loss import chunked_cross_entropy
from growkit.models.norm import Normalize
from growkit.models.ramp import stream_mask
from growkit.models.spec import param_specs
from growkit.models.stream import Ends

PROBE_STEPS = 3  # gradients taken at most by the dead-parameter check
PROBE_SIZE = 1e-3  # sign step between them, about one Adam step at lr 1e-3
HELD_BYTES = 64 << 20  # signs of smaller models stay in memory

_FIRST = frozenset({"embedding.weight", "stream.enter"})  # before all layers

M = TypeVar("M", bound=nn.Module)


def probe_gradients(
    state: TrainState,
    tokens: Tensor,
    targets: Tensor,
    of: Collection[str],
    *,
    streams: Sequence[Tensor] = (),
    enough: Callable[[int], bool] = lambda steps: False,
) -> Iterator[tuple[int, str, Tensor]]:
    """(step, parameter, gradient) of the parameters ``of``, of the loss on PROBE_STEPS steps in float32, or until there
    are ``enough``, a sign step of PROBE_SIZE on each of them between; within a step from the head down, as far as there
    are any. ``tokens``, ``targets`` (B, T). A ramp rises from step to step, as it does in training: under a mask at 0
    nothing has a gradient. ``streams``: the residual stream before each layer and after the last, if a float32 pass
    over ``tokens`` has been; steps take from there what they leave as it was.

    Raises ConfigError when there is no room for the signs of a large model in the folder of temporary files.
    """
    params, unmoved = _Stepped(state, of), _unmoved(state.config, of)
    for step in range(PROBE_STEPS):
        config = dataclasses.replace(state.config, ramp=max(state.config.ramp, step / PROBE_STEPS))
        known = streams if step == 0 else streams[:unmoved] if config.ramp == state.config.ramp else ()
        for name, gradient in _backward(config, params, tokens, targets, of, known):
            yield step, name, gradient
            if step == 0:
                params.add(name, gradient)
        if enough(step + 1) or step == PROBE_STEPS - 1:
            return
        if step:  # seldom: a pass more, where others are spared the signs
            for name, gradient in _backward(config, params, tokens, targets, of, known):
                params.add(name, gradient)
        params.steps += 1


def _unmoved(config: ModelConfig, of: Collection[str]) -> int:
    """How many of the streams stay as they are when the parameters ``of`` move."""
    if not _FIRST.isdisjoint(of):
        return 0
    moved = {name.split(".")[1] for name in of if name.startswith("layers.")}
    places = (place for place, spec in enumerate(config.layers) if str(spec.id) in moved)
    return next(places, len(config.layers)) + 1


def any_nonzero(tensor: Tensor) -> bool:
    """``tensor.any()``, ten times as fast for floats."""
    return tensor.numel() > 0 and any(bool(end != 0) for end in tensor.aminmax())  # NaN is nonzero


class _Stepped(Mapping[str, Tensor]):
    """Parameters (float32) after the sign steps so far. Of earlier gradients only the sum of the signs is kept."""

    def __init__(self, state: TrainState, of: Collection[str]) -> None:
        specs = param_specs(state.config)
        self._params, self.steps = state.params, 0
        self._signs = _Signs({name: specs[name].shape for name in of})

    def __getitem__(self, name: str) -> Tensor:
        value = self._params[name].detach().float()
        return self._moved(value, self._signs.read(name)) if self._moves(name) else value

    def rows(self, name: str, index: Tensor) -> Tensor:
        """The rows ``index`` of a matrix, without the others."""
        value = self._params[name].detach()[index].float()
        return self._moved(value, self._signs.read(name)[index]) if self._moves(name) else value

    def _moves(self, name: str) -> bool:
        return self.steps > 0 and name in self._signs

    def _moved(self, value: Tensor, signs: Tensor) -> Tensor:
        # Not value.sub(signs, alpha=PROBE_SIZE): the same bits, but of two dtypes, which takes twice as long.
        return signs.float().mul_(-PROBE_SIZE).add_(value)

    def add(self, name: str, gradient: Tensor) -> None:
        """Remembers a gradient of this step, for the parameters after it."""
        if not any_nonzero(gradient):  # what feeds a zero matrix has none on the first step
            return
        signs = gradient.sign().to(torch.int8)
        self._signs.write(name, signs.add_(self._signs.read(name)) if name in self._signs else signs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


class _Signs:
    """A byte for every entry of tensors of ``shapes``: in memory, or in a file without a name if there are more than
    HELD_BYTES. It is read and written, not mapped: to touch a mapped page for the first time takes ten times as
    long."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes, self._held = shapes, dict[str, Tensor]()
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._start = dict(zip(shapes, itertools.accumulate(sizes, initial=0)))
        self._file = _unnamed_file(sum(sizes)) if sum(sizes) > HELD_BYTES else None
        self._written: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether there is anything of it."""
        return name in self._written

    def write(self, name: str, signs: Tensor) -> None:
        self._written.add(name)
        if self._file is None:
            self._held[name] = signs
            return
        self._file.seek(self._start[name])
        self._file.write(signs.contiguous().view(-1).numpy().data)

    def read(self, name: str) -> Tensor:
        if self._file is None:
            return self._held[name]
        signs = torch.empty(tuple(self._shapes[name]), dtype=torch.int8)
        self._file.seek(self._start[name])
        self._file.readinto(signs.view(-1).numpy().data)
        return signs


def _unnamed_file(size: int) -> io.BufferedRandom:
    """With room for ``size`` bytes; gone when it is closed, as it is with its last user."""
    try:
        file = tempfile.TemporaryFile(prefix="growkit-signs-")
        assert isinstance(file, io.BufferedRandom)
        if hasattr(os, "posix_fallocate"):  # said now, where it can be, rather than when most of the work is done
            os.posix_fallocate(file.fileno(), 0, size)
        return file
    except OSError as error:
        mend = f"free {size / 1e9:.1f} GB there, or name another folder in TMPDIR"
        problem = f"cannot hold what the certificate remembers between its steps ({error})"
        raise ConfigError("no-room", problem, key="TMPDIR", value=tempfile.gettempdir(), mend=mend) from error


def _backward(
    config: ModelConfig,
    params: _Stepped,
    tokens: Tensor,
    targets: Tensor,
    of: Collection[str],
    known: Sequence[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    # Autograd records nothing on the way up, but is on: ops choose their path by it, and it is to be training's.
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    x, mask = params.rows("embedding.weight", tokens), stream_mask(config, parts=config.parts)
    parts = x = x if mask is None else mask(x)
    ends = fill(empty_ends(config), params, "stream.", x.dtype).requires_grad_(False) if config.stream else None
    x = x if ends is None else ends.entered(x)
    streams = [stream.detach() for stream in known]  # those that ask for gradients here are no one else's
    x = streams.pop() if streams else x
    for spec in config.layers[len(streams) :]:
        streams.append(x)
        layer = fill(empty_layer(spec, config), params, f"layers.{spec.id}.", x.dtype).requires_grad_(False)
        x, _ = layer(x, rope_table(spec.mixer, positions, x.dtype))
        del layer  # before the next one is there
    norm = fill(empty_norm(config), params, "final_norm.", x.dtype)
    last = _wanted(norm, "final_norm.", of)
    if ends is not None and "stream.leave" in of:
        last = {"stream.leave": ends.leave.requires_grad_(), **last}
    head_name = "embedding.weight" if config.tied_head else "head.weight"
    head, x = params[head_name].detach().requires_grad_(head_name in of), x.requires_grad_()
    h = norm(x if ends is None else ends.left(x))
    loss = chunked_cross_entropy(
        h.flatten(0, 1), head, targets.flatten(), logit_scale=config.logit_scale, z_loss=0.0, chunk_tokens=0
    )
    wanted = [head] if head_name in of else []
    along, *gradients = torch.autograd.grad(loss.total, [x, *wanted, *last.values()])
    tied = gradients.pop(0) if wanted else None
    del head, wanted, loss, h
    yield from _last_first(list(last), gradients)
    if tied is not None and not config.tied_head:
        yield head_name, tied
        tied = None
    left = {name.split(".")[1] for name in of if name.startswith("layers.")}  # layers that have any
    for spec in reversed(config.layers):
        if not left and _FIRST.isdisjoint(of):
            return
        left.discard(str(spec.id))
        prefix, x = f"layers.{spec.id}.", streams.pop().requires_grad_()
        layer = fill(empty_layer(spec, config), params, prefix, x.dtype)
        named = _wanted(layer, prefix, of)
        out, _ = layer(x, rope_table(spec.mixer, positions, x.dtype))
        # The sum's gradient is ``along``; given as one (grad_outputs) it would load sympy, which takes a second.
        along, *gradients = torch.autograd.grad((out * along).sum(), [x, *named.values()])
        names = list(named)
        del layer, named, out
        yield from _last_first(names, gradients)
    if ends is not None:
        ends.enter.requires_grad_()
        entered = (ends.entered(parts.requires_grad_()) * along).sum()
        along, of_enter = torch.autograd.grad(entered, [parts, ends.enter])
        if "stream.enter" in of:
            yield "stream.enter", of_enter
    if "embedding.weight" not in of:
        return
    along = along if mask is None else mask(along)
    # A look-up's gradient lies in the rows that were looked up, each summed before it joins the tied head's.
    rows, place = torch.unique(tokens, return_inverse=True)
    width = along.shape[-1]
    summed = along.new_zeros(len(rows), width).index_add_(0, place.flatten(), along.flatten(0, 1))
    embedding = tied if tied is not None else along.new_zeros(config.vocab_size, width)
    yield "embedding.weight", embedding.index_add_(0, rows, summed)


def _wanted(module: nn.Module, prefix: str, of: Collection[str]) -> dict[str, Tensor]:
    """Name → those of the module's parameters that are ``of`` them; the others ask for no gradient."""
    module.requires_grad_(False)
    named = ((prefix + name, parameter) for name, parameter in module.named_parameters())
    return {name: parameter.requires_grad_() for name, parameter in named if name in of}


def _last_first(names: list[str], gradients: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Pairs of both, which are emptied: what was looked at is let go."""
    while names:
        yield names.pop(), gradients.pop()


def empty_layer(spec: LayerSpec, config: ModelConfig) -> Layer:
    with torch.device("meta"):
        return Layer(spec, config, "auto").eval()


def empty_norm(config: ModelConfig) -> Normalize:
    with torch.device("meta"):
        return Normalize(config.final_norm, config.embed_dim, config.parts)


def empty_ends(config: ModelConfig) -> Ends:
    assert config.stream is not None
    with torch.device("meta"):
        return Ends(config.stream)


def fill(
    module: M,
    params: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
    room: Room | None = None,
    *,
    stored: Collection[str] = (),
) -> M:
    """``module`` with its parameters from ``params``, where their names start with ``prefix``, in ``dtype``; converted
    in ``room``, if there is one. Those called ``stored`` (without the prefix) are as they are."""
    room = Room() if room is None else room
    names = [name for name, _ in module.named_parameters()]
    given = {name: params[prefix + name] for name in names}
    state = {name: of if name in stored else room.converted(name, of, dtype) for name, of in given.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module


class Room:
    """Where the weights of one layer at a time are converted, over those of the layer before it that was like it. From
    the heap, given back and asked for again between the blocks of other threads, they come to take twice the memory."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def converted(self, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        if stored.dtype == dtype:
            return stored
        key = name, stored.shape, dtype
        if key not in self._places:
            self._places[key] = torch.empty_like(stored, dtype=dtype)
        return self._places[key].copy_(stored)

    def clear(self) -> None:
        self._places.clear()
