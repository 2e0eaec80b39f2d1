"""The scan's kernel in C++, for the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from growkit.ops.chunks import CHUNK
from growkit.ops.native import loaded
from growkit.ops.selective_scan.loop import Inputs

SOURCE = Path(__file__).with_name("kernel.cpp")


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("sequence", ctypes.c_int64), ("token", ctypes.c_int64)]


class _Scan(ctypes.Structure):
    """``Scan`` of kernel.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "channels", "states", "threads")),
        *((name, ctypes.c_int64) for name in ("wide_double", "narrow")),
        *((name, _Rows) for name in ("x", "dt", "z", "B", "C", "y")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "h0", "starts", "last", "kept")),
        ("dy", _Rows),
        *((name, ctypes.c_void_p) for name in ("d_last", "dx", "d_dt", "dz", "dB", "dC", "dA", "dD", "d_bias", "dh0")),
    ]


class Kernel:
    """The loaded library. Same functions as ``loop``, for tensors of the CPU; results do not depend on the threads."""

    def __init__(self, library: Path) -> None:
        found = ctypes.CDLL(str(library))
        self._forward, self._backward = found.growkit_scan_forward, found.growkit_scan_backward
        for function in (self._forward, self._backward):
            function.argtypes, function.restype = [ctypes.POINTER(_Scan)], ctypes.c_int64

    def forward(self, inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        scan, inputs = _described(inputs)
        batch, length, channels = inputs.x.shape
        states = inputs.A.shape[1]
        y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
        last = inputs.A.new_empty(batch, channels, states)
        kept = inputs.A.new_empty((batch, -(-length // CHUNK), states, channels) if keep else 0)
        scan.y, scan.last, scan.kept = _rows(y), last.data_ptr(), kept.data_ptr() if keep else None
        _run(self._forward, scan)
        return y, last, kept

    def backward(self, inputs: Inputs, kept: Tensor, dy_BLD: Tensor, dh_BDN: Tensor) -> tuple[Tensor, ...]:
        scan, inputs = _described(inputs)
        dy, d_last, kept = _dense(dy_BLD), dh_BDN.contiguous(), kept.contiguous()
        scan.dy, scan.d_last, scan.kept = _rows(dy), d_last.data_ptr(), kept.data_ptr()
        wanted = {
            "dx": inputs.x,
            "d_dt": inputs.dt,
            "dA": inputs.A,
            "dB": inputs.B,
            "dC": inputs.C,
            "dD": inputs.D,
            "d_bias": inputs.dt_bias,
            "dz": inputs.z,
            "dh0": inputs.h0,
        }
        gradients = []
        for name, of in wanted.items():
            shape = torch.Size([0]) if of is None else of.shape
            gradients.append(inputs.x.new_empty(shape, dtype=inputs.A.dtype if of is None else of.dtype))
            setattr(scan, name, None if of is None else gradients[-1].data_ptr())
        _run(self._backward, scan)
        return tuple(gradients)


@cache
def kernel() -> Kernel | None:
    loop = "the selective scan runs on the CPU as a loop of torch calls; the kernel is several times faster"
    return loaded(SOURCE, Kernel, loop)


def _described(inputs: Inputs) -> tuple[_Scan, Inputs]:
    """The kernel's description of the inputs, and the tensors it points into."""
    inputs = inputs._replace(
        **{name: _dense(getattr(inputs, name)) for name in ("x", "dt", "B", "C")},
        z=None if inputs.z is None else _dense(inputs.z),
        A=inputs.A.contiguous(),
        D=inputs.D.contiguous(),
        dt_bias=None if inputs.dt_bias is None else inputs.dt_bias.contiguous(),
        h0=None if inputs.h0 is None else inputs.h0.contiguous(),
        starts=None if inputs.starts is None else inputs.starts.contiguous(),
    )
    scan = _Scan(*inputs.x.shape, inputs.A.shape[1], torch.get_num_threads())
    scan.wide_double, scan.narrow = inputs.A.dtype == torch.float64, inputs.x.dtype == torch.bfloat16
    for name in ("x", "dt", "B", "C", "z"):
        tensor = getattr(inputs, name)
        setattr(scan, name, _Rows() if tensor is None else _rows(tensor))
    for name in ("A", "D", "dt_bias", "h0", "starts"):
        tensor = getattr(inputs, name)
        setattr(scan, name, None if tensor is None else tensor.data_ptr())
    return scan, inputs


def _dense(tensor: Tensor) -> Tensor:
    """Rows whose numbers lie side by side: parts of a wider projection do, and are not copied."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _run(function: Callable[..., int], scan: _Scan) -> None:
    if function(ctypes.byref(scan)) != 0:
        raise MemoryError("no memory for the selective scan")
