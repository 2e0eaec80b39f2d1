"""The selective scan as torch calls, for any device: what runs where there is no kernel.

Token by token there is one call forward and one back, in place, on views that one ``unbind`` makes: indexing each
token would cost a tensor of zeros as large as the sequence in the backward pass. Everything else is done for ``CHUNK``
tokens at once. Forward keeps the state before each chunk; backward makes a chunk's states again from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.ops.chunks import CHUNK


class Inputs(NamedTuple):
    """Of the scan, as the package says; ``starts`` (B, L): where a document begins."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor | None
    z: Tensor | None
    h0: Tensor | None
    starts: Tensor | None

    def first_state(self) -> Tensor:
        """(B, N, D)"""
        if self.h0 is None:
            return self.A.new_zeros(self.x.shape[0], self.A.shape[1], self.A.shape[0])
        return self.h0.transpose(1, 2).contiguous()


class Chunk:
    """Tokens [start, stop) in the wide dtype, time first; ``states`` (T, B, N, D) are filled by ``run``."""

    def __init__(self, inputs: Inputs, start: int, stop: int, A_ND: Tensor) -> None:
        wide = A_ND.dtype
        self.x, raw, self.B, self.C = (
            tensor[:, start:stop].transpose(0, 1).to(wide) for tensor in (inputs.x, inputs.dt, inputs.B, inputs.C)
        )
        self.raw = raw if inputs.dt_bias is None else raw + inputs.dt_bias
        self.delta = F.softplus(self.raw, threshold=20)
        self.decay = torch.exp_(self.delta.unsqueeze(2) * A_ND)
        self.starts = None if inputs.starts is None else inputs.starts[:, start:stop].T[:, :, None, None]
        if self.starts is not None:
            self.decay.masked_fill_(self.starts, 0)
        self.states = (self.delta * self.x).unsqueeze(2) * self.B.unsqueeze(3)

    def run(self, h: Tensor) -> Tensor:
        """Fills ``states`` from the state before the chunk, ``h``; returns the last."""
        before = h
        for t, (state, decay) in enumerate(zip(self.states.unbind(), self.decay.unbind(), strict=True)):
            if self.starts is not None:  # a state that is not finite would outlast a product with 0
                h = h.masked_fill(self.starts[t], 0)
            h = state.addcmul_(decay, h)
        self.before = torch.cat((before.unsqueeze(0), self.states[:-1]))
        if self.starts is not None:
            self.before.masked_fill_(self.starts, 0)
        return h

    def output(self, D_D: Tensor) -> Tensor:
        """Σ_n C h + D x, (T, B, D)"""
        return torch.matmul(self.C.unsqueeze(2), self.states).squeeze(2).addcmul_(self.x, D_D)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h_T, the state before each chunk (B, chunks, N, D); none of them unless ``keep``)."""
    x, A_ND = inputs.x, inputs.A.T.contiguous()
    y, kept, h = torch.empty_like(x, memory_format=torch.contiguous_format), [], inputs.first_state()
    for start in range(0, x.shape[1], CHUNK):
        stop = min(start + CHUNK, x.shape[1])
        if keep:
            kept.append(h.clone())
        chunk = Chunk(inputs, start, stop, A_ND)
        h = chunk.run(h)
        out = chunk.output(inputs.D)
        if inputs.z is not None:
            out *= F.silu(inputs.z[:, start:stop].transpose(0, 1).to(out.dtype))
        y[:, start:stop] = out.transpose(0, 1)
    last = h.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return y, last, torch.stack(kept, 1) if keep else h.new_empty(0)


def backward(inputs: Inputs, kept: Tensor, dy_BLD: Tensor, dh_BDN: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias, z and h0; an absent one's is empty."""
    x, A_ND = inputs.x, inputs.A.T.contiguous()
    dx, d_dt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:2] + inputs[3:5])
    dz = x.new_empty(0) if inputs.z is None else torch.empty_like(dx)
    dA, dD, d_bias = torch.zeros_like(A_ND), torch.zeros_like(inputs.D), torch.zeros_like(inputs.D)
    dh = dh_BDN.transpose(1, 2).contiguous()  # of the state after the chunk
    for index in reversed(range(kept.shape[1])):
        start = index * CHUNK
        part = slice(start, min(start + CHUNK, x.shape[1]))
        chunk = Chunk(inputs, start, part.stop, A_ND)
        chunk.run(kept[:, index])
        ds = dy_BLD[:, part].transpose(0, 1).to(dh.dtype)
        if inputs.z is not None:
            z = inputs.z[:, part].transpose(0, 1).to(dh.dtype)
            gate = torch.sigmoid(z)
            d_silu = gate * (1 + z * (1 - gate))
            dz[:, part] = (ds * chunk.output(inputs.D) * d_silu).transpose(0, 1)
            ds = ds * z * gate
        dC[:, part] = torch.matmul(chunk.states, ds.unsqueeze(3)).squeeze(3).transpose(0, 1)

        states = chunk.C.unsqueeze(3) * ds.unsqueeze(2)  # becomes the gradient of each state
        gradients, decays = states.unbind(), chunk.decay.unbind()
        for t in reversed(range(len(decays))):
            dh = torch.mul(gradients[t].add_(dh), decays[t])
            if chunk.starts is not None:
                dh.masked_fill_(chunk.starts[t], 0)
        u = chunk.delta * chunk.x
        dB[:, part] = torch.matmul(states, u.unsqueeze(3)).squeeze(3).transpose(0, 1)
        du = torch.matmul(chunk.B.unsqueeze(2), states).squeeze(2)
        powers = states.mul_(chunk.decay).mul_(chunk.before)  # gradient of Δ A
        d_delta = torch.mul(powers, A_ND, out=chunk.decay).sum(2).addcmul_(du, chunk.x)
        dA += powers.mul_(chunk.delta.unsqueeze(2)).sum((0, 1))
        d_raw = torch.where(chunk.raw > 20, d_delta, d_delta * torch.sigmoid(chunk.raw))
        d_bias += d_raw.sum((0, 1))
        dD += (ds * chunk.x).sum((0, 1))
        d_dt[:, part] = d_raw.transpose(0, 1)
        dx[:, part] = (du * chunk.delta + ds * inputs.D).transpose(0, 1)
    return (
        dx,
        d_dt,
        dA.T.contiguous(),
        dB,
        dC,
        dD,
        dD.new_empty(0) if inputs.dt_bias is None else d_bias,
        dz,
        dD.new_empty(0) if inputs.h0 is None else dh.transpose(1, 2).contiguous(),
    )
