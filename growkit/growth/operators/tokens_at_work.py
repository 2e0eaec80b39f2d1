"""What parameter tokens do on a probe, which says how banks are laid together and which tokens can go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from growkit.models.config import Pattention

if TYPE_CHECKING:
    from torch import Tensor

    from growkit.growth.observe import Seen


def tokens_of(layer: Mapping[str, Tensor], prefix: str, spec: Pattention) -> tuple[list[Tensor], list[Tensor]]:
    """Keys (n_g, in) and values (n_g, out) of each bank, in float32 at least."""
    import torch

    def side(name: str) -> list[Tensor]:
        found = (layer[f"{prefix}{name}.{bank}"] for bank in range(len(spec.banks)))
        return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in found]

    return side("keys"), side("values")


def activations(seen: Seen, keys: list[Tensor], spec: Pattention) -> list[Tensor]:
    """Θ of each bank on the probe, (N, n_g)."""
    import torch

    from growkit.ops.pattention.reference import activation

    scores = [seen.inputs.to(k.dtype) @ k.T for k in keys]
    if spec.scope == "shared":
        return list(
            torch.split(activation(torch.cat(scores, dim=1), spec.theta, spec.taus[0]), list(spec.banks), dim=1)
        )
    return [activation(a, spec.theta, tau) for a, tau in zip(scores, spec.taus, strict=True)]


def most_used(
    seen: Seen, layer: Mapping[str, Tensor], prefix: str, spec: Pattention, sizes: tuple[int, ...]
) -> list[Tensor]:
    """Of each bank the tokens to keep, as many as ``sizes`` says, in order: those that write most on the probe.

    Token i writes a_ti · v_i at position t; its score is the root of the mean square of that, √(mean_t a_ti²) · ‖v_i‖.
    """
    keys, values = tokens_of(layer, prefix, spec)
    kept = []
    for a, v, size in zip(activations(seen, keys, spec), values, sizes, strict=True):
        score = a.square().mean(dim=0).sqrt() * v.norm(dim=1)
        kept.append(score.topk(size).indices.sort().values)
    return kept


def scales_under_one_norm(
    seen: Seen, layer: Mapping[str, Tensor], prefix: str, spec: Pattention, joined: Pattention
) -> tuple[list[float], list[float]]:
    """Factors of the keys and of the values of each bank that make all banks under one norm (``joined``) do on the
    probe what they did, each under its own.

    ``l2_norm_gelu``: bank g divides its scores A_g by ‖A_g‖, and the one norm divides all by a root of the sum of
    squares. With keys times τ_g / rms‖A_g‖ every token is scaled as before where ‖A_g‖ is what it is on average. The
    other Θ do not pass a factor of the keys on. Values, for all: one factor a bank, the least-squares fit of what was
    written.
    """
    import torch

    keys, values = tokens_of(layer, prefix, spec)
    key_scales = [1.0] * len(keys)
    if spec.theta == "l2_norm_gelu":
        x = seen.inputs.to(keys[0].dtype)
        size = [float((x @ k.T).square().sum(dim=1).mean().sqrt()) for k in keys]
        relative = [tau / s for tau, s in zip(spec.taus, size, strict=True)]
        key_scales = [r / relative[0] for r in relative]
    wrote = torch.stack([a @ v for a, v in zip(activations(seen, keys, spec), values, strict=True)]).sum(dim=0)
    scaled = torch.cat([k * c for k, c in zip(keys, key_scales, strict=True)])
    (together,) = activations(seen, [scaled], joined)
    parts = torch.split(together, list(spec.banks), dim=1)
    writes = torch.stack([(a @ v).flatten() for a, v in zip(parts, values, strict=True)], dim=1)
    # Normal equations, as many as there are banks: torch.linalg.lstsq is not the same twice, to the bit.
    gram, aim = writes.T.double() @ writes.double(), writes.T.double() @ wrote.flatten().double()
    fit = torch.linalg.pinv(gram, hermitian=True) @ aim
    idle = gram.diagonal() == 0  # a bank that writes nothing, its values zero still, has no factor to find
    return key_scales, torch.where(idle, 1.0, fit).tolist()
