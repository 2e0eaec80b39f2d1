"""The Mamba mixer (arXiv 2312.00752, section 3.4): a selective state space between two projections.

    [x | z] = W_in u                    x = silu(conv(x) + b), causal, depthwise
    [r | B | C] = W_x x                 Δ = softplus(W_dt r + b_dt)
    h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t x_t B_t,  A = −exp(A_log)
    y = Σ_n C_t h_t + D x               out = W_out (y ⊙ silu(z))

Legend: B batch, T tokens, D embed, E inner, N state, R dt_rank, W taps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.models.config import Mamba
from growkit.models.projections import projection
from growkit.models.spec import ParamSpec
from growkit.ops.selective_scan import selective_scan

if TYPE_CHECKING:
    from growkit.models.layers import LayerCache


NO_TIME = -1e4  # before its softplus, whatever the bias: a Δ of zero, over which a state stays as it is


class MambaMixer(nn.Module):
    def __init__(self, spec: Mamba, embed_dim: int, backend: str, ramp: float) -> None:
        super().__init__()
        self.spec, self.scan = spec, selective_scan(backend)
        self.A_log = nn.Parameter(torch.empty(spec.inner, spec.state))
        self.D = nn.Parameter(torch.empty(spec.inner))
        self.dt_bias = nn.Parameter(torch.empty(spec.inner))
        self.conv_weight = nn.Parameter(torch.empty(spec.inner, spec.conv))
        self.conv_bias = nn.Parameter(torch.empty(spec.inner)) if spec.conv_bias else None
        self.in_proj = projection(spec.in_proj, embed_dim, 2 * spec.inner, backend, ramp)
        self.x_proj = projection(spec.x_proj, spec.inner, spec.dt_rank + 2 * spec.state, backend, ramp)
        self.dt_proj = projection(spec.dt_proj, spec.dt_rank, spec.inner, backend, ramp)
        self.out_proj = projection(spec.out_proj, spec.inner, embed_dim, backend, ramp)

    def forward(
        self,
        u_BTD: Tensor,
        cache: LayerCache | None = None,
        segments: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """``cache`` holds the last inputs of the convolution and the state, which are of the document of the first
        token; ``segments`` (B, T): the documents. ``real`` (B, T), bool, in rows of one document: the others are
        padding, and nothing of it reaches a token, wherever it lies; what is made of it has no meaning."""
        spec = self.spec
        x, z = self.in_proj(u_BTD).chunk(2, dim=-1)
        x = F.silu(self._convolved(x, cache, segments, real))
        r, B, C = self.x_proj(x).split([spec.dt_rank, spec.state, spec.state], dim=-1)
        if spec.inner_norm is not None:
            r, B, C = (_normed(part, spec.inner_norm) for part in (r, B, C))
        dt = self.dt_proj(r)
        if real is not None:
            dt = dt.masked_fill(~real[..., None], NO_TIME)
        wide = torch.promote_types(x.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(wide))
        h0 = cache.state if cache is not None else None
        y, h = self.scan(
            x, dt, A, B, C, self.D.to(wide), dt_bias_D=self.dt_bias.to(wide), z_BLD=z, h0_BDN=h0, segments_BL=segments
        )
        if cache is not None:
            cache.state = h
        return self.out_proj(y)

    def _convolved(
        self, x_BTE: Tensor, cache: LayerCache | None, segments: Tensor | None, real: Tensor | None
    ) -> Tensor:
        """Σ_k w_k x_{t−W+1+k} + b: a few passes over memory, which at four taps no convolution needs less of. Taps that
        would reach into another document read zero. Where there is padding, what is none is moved together to the end
        of its row for it, the cached inputs before it, and back."""
        W, T = self.spec.conv, x_BTE.shape[1]
        before = cache.inputs if cache is not None and cache.inputs is not None else None
        if before is None:
            before = x_BTE.new_zeros(x_BTE.shape[0], W - 1, x_BTE.shape[2])
        padded = torch.cat((before, x_BTE), 1)
        if real is not None:
            known = torch.cat((real.new_ones(before.shape[:2]), real), 1)
            padded = _gathered(padded, known.int().argsort(stable=True, dim=1))
            x_BTE = padded[:, W - 1 :]
        if cache is not None:
            cache.inputs = padded[:, padded.shape[1] - (W - 1) :]
        weight = self.conv_weight.to(x_BTE.dtype)
        out = x_BTE * weight[:, W - 1]
        for back in range(1, W):
            tap = padded[:, W - 1 - back : W - 1 - back + T]
            if segments is not None:
                earlier = torch.arange(-back, T - back, device=segments.device).clamp_min(0)
                tap = tap * (segments == segments[:, earlier])[..., None].to(tap.dtype)
            out = torch.addcmul(out, tap, weight[:, W - 1 - back])
        if real is not None:
            out = _gathered(out, real.int().argsort(stable=True, dim=1).argsort(1))
        return out if self.conv_bias is None else out + self.conv_bias.to(out.dtype)


def _gathered(x_BTE: Tensor, order_BT: Tensor) -> Tensor:
    """The tokens of each row in another order."""
    return x_BTE.gather(1, order_BT[..., None].expand(-1, -1, x_BTE.shape[2]))


def _normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a gain, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def mamba_start(spec: ParamSpec, generator: torch.Generator) -> Tensor:
    """``a_log``: log(n + 1), so that A_n = −(n + 1) (S4D-real). ``dt_bias``: softplus⁻¹ of Δ, log-uniform
    ``between``. ``uniform``: as wide as has ``init_std``."""
    if spec.start == "a_log":
        return torch.arange(1.0, spec.shape[1] + 1).log().expand(spec.shape).clone()
    drawn = torch.empty(spec.shape).uniform_(generator=generator)
    if spec.start == "uniform":
        assert spec.init_std is not None
        return drawn.mul_(2).sub_(1).mul_(spec.init_std * math.sqrt(3))
    assert spec.between is not None
    least, most = map(math.log, spec.between)
    dt = torch.exp(drawn * (most - least) + least)
    return dt + torch.log(-torch.expm1(-dt))
