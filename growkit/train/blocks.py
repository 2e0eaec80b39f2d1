"""What there is to say of a model whose tokens are several blocks (AltUp): how its layers read, mix and write them, how
far apart they end, and how much of the gradient is in what a growth has added to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from growkit.models.axes import NEW, AnyAxis, Axis, Concat, Product, index_map
from growkit.models.config import ModelConfig
from growkit.models.decoder import DecoderLM
from growkit.models.layers import Layer
from growkit.models.spec import param_specs
from growkit.models.stream import Blocks, Coefficients, Compute, RoutedBlocks

DIGITS = 5  # of what is logged


def measure(model: DecoderLM, tokens_BT: Tensor) -> dict[str, Any]:
    """``distances``: of each two blocks at the end of the stack, in the order (0, 1), (0, 2), …, (1, 2), …,
    ‖x_i − x_j‖ over the mean of all blocks' norms, over all tokens; ``distance``: the smallest. ``layers``: of each the
    ``read`` a, ``mix`` M = N + b aᵀ and ``write`` b of models/stream.py; of routed coefficients their means over the
    tokens. The model must have a stream; every process calls this."""
    training = model.training
    model.eval()
    with torch.no_grad(), _watched(model) as (found, ends):
        model(tokens_BT)
    model.train(training)
    layers = []
    for spec in model.config.layers:
        a, M, b = found[spec.id]
        layers.append({"id": spec.id, "block": spec.block, "read": _plain(a), "mix": _plain(M), "write": _plain(b)})
    apart = distances(ends[0])
    return {"distance": min(apart), "distances": _plain(torch.tensor(apart)), "layers": layers}


def distances(R_KBTD: Tensor) -> list[float]:
    flat = R_KBTD.flatten(1).float()
    size = flat.norm(dim=1).mean()
    return [float((flat[i] - flat[j]).norm() / size) for i in range(len(flat)) for j in range(i + 1, len(flat))]


def new_share(model: DecoderLM, source: ModelConfig) -> float | None:
    """The share of the squared norm of all gradients that is in what ``source`` did not have of the blocks of a token
    and of the parts of embedding and head; None where there is nothing new, or no gradient. Clipping leaves it as it
    is. Every process calls this."""
    if isinstance(model, FSDPModule):  # a validation leaves whole parameters behind, which have no gradients
        model.reshard()
    sizes = {"blocks": source.stream.blocks if source.stream is not None else 0, "parts": source.parts}
    total = new = 0.0
    there, specs = False, param_specs(model.config)
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is None:
            continue
        axes = specs[name].axes
        total += (squared := _squared(gradient))
        old = [_steady(axis, sizes) for axis in axes]
        if any(len(indices) < axis.size for indices, axis in zip(old, axes, strict=True)):
            there, new = True, new + squared - _squared(gradient, old)
    return new / total if there and total > 0 else None


def _steady(axis: AnyAxis, sizes: Mapping[str, int]) -> list[int]:
    """The indices that were there when there were ``sizes`` of the blocks, which stay the first."""
    return [i for i, index in enumerate(index_map(_sized(axis, sizes), axis)) if index != NEW]


def _sized(axis: AnyAxis, sizes: Mapping[str, int]) -> Any:
    """``axis`` with fewer of the blocks."""
    if isinstance(axis, Axis):
        return Axis(axis.name, min(axis.size, sizes.get(axis.name, axis.size)))
    if isinstance(axis, Product):
        return Product(tuple(_sized(factor, sizes) for factor in axis.axes))
    return Concat(tuple(_sized(part, sizes) for part in axis.parts))


def _squared(gradient: Tensor, at: Sequence[list[int]] = ()) -> float:
    """Σ g², in float64; with ``at``, of those indices of each dimension."""
    if at and isinstance(gradient, DTensor):
        gradient = gradient.full_tensor()
    for dim, indices in enumerate(at):
        if len(indices) < gradient.shape[dim]:
            gradient = gradient.index_select(dim, torch.tensor(indices, dtype=torch.int64, device=gradient.device))
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2


@contextlib.contextmanager
def _watched(model: DecoderLM) -> Iterator[tuple[dict[int, Coefficients], list[Tensor]]]:
    """By layer (a, M, b) of the forward passes inside, and the blocks after the last layer."""
    found: dict[int, Coefficients] = {}
    ends: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for spec in model.config.layers:
            layer = model.layers[str(spec.id)]
            assert isinstance(layer, Layer) and isinstance(layer.stream, Blocks | RoutedBlocks)
            hook = layer.stream.register_forward_pre_hook(_Kept(spec.id, found))
            hooks.callback(hook.remove)
        hooks.callback(layer.register_forward_hook(lambda _, __, output: ends.append(output[0])).remove)
        yield found, ends


class _Kept:
    """Puts itself between a layer's blocks and what it computes, since routed coefficients depend on both."""

    def __init__(self, layer: int, found: dict[int, Coefficients]) -> None:
        self.layer, self.found = layer, found

    def __call__(self, stream: nn.Module, inputs: tuple[Tensor, Compute]) -> tuple[Tensor, Compute]:
        R_KBTD, compute = inputs

        def watched(z: Tensor) -> tuple[Tensor, Tensor | None]:
            y, balance = compute(z)
            if isinstance(stream, RoutedBlocks):
                a, N, b = stream.coefficients(stream.predicting(R_KBTD[stream.block]), y)
            else:
                assert isinstance(stream, Blocks)
                a, N, b = stream.coefficients()
            M = N + b[..., :, None] * a[..., None, :]
            self.found[self.layer] = (_mean(a, 1), _mean(M, 2), _mean(b, 1))
            return y, balance

        return R_KBTD, watched


def _mean(values: Tensor, dims: int) -> Tensor:
    """Over the tokens, if each has its own. A copy: a sharded parameter is whole in its layer only."""
    values = values.detach().to(torch.float64, copy=True)
    return values.flatten(0, -1 - dims).mean(0) if values.ndim > dims else values


def _plain(values: Tensor) -> Any:
    return [_plain(row) for row in values] if values.ndim else float(f"{float(values):.{DIGITS}g}")
