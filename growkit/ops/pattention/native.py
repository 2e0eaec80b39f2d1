"""What is elementwise in Pattention as a kernel in C++, for the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from growkit.ops.native import loaded
from growkit.ops.pattention.reference import NORM_FLOOR
from growkit.ops.pattention.rows import Layout

SOURCE = Path(__file__).with_name("kernel.cpp")
DTYPES = (torch.float32, torch.bfloat16)


class _Scores(ctypes.Structure):
    """``Scores`` of kernel.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "norms", "threads", "narrow")),
        ("floor", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("ends", "taus", "scales", "s", "g", "slope")),
        *((name, ctypes.c_int64) for name in ("s_row", "g_row", "slope_row")),
    ]


class Kernel:
    """``Rows`` for tensors of the CPU in ``DTYPES``; results do not depend on the threads."""

    def __init__(self, library: Path) -> None:
        found = ctypes.CDLL(str(library))
        names = ("forward", "weights", "backward")
        self._forward, self._weights, self._backward = (getattr(found, f"growkit_pattention_{name}") for name in names)
        for function in (self._forward, self._weights, self._backward):
            function.argtypes, function.restype = [ctypes.POINTER(_Scores)], ctypes.c_int64

    def scales(self, s: Tensor, norms: int) -> Tensor:
        return s.new_empty(len(s), norms, dtype=torch.float32)

    def forward(self, layout: Layout, s: Tensor, scales: Tensor, g: Tensor) -> None:
        _run(self._forward, layout, s, scales, g, None)

    def room(self, g: Tensor) -> Tensor:
        return torch.empty_like(g)

    def weights(self, layout: Layout, s: Tensor, g: Tensor, slope: Tensor | None) -> None:
        _run(self._weights, layout, s, None, g, slope)

    def backward(self, layout: Layout, s: Tensor, scales: Tensor, slope: Tensor | None, g: Tensor) -> None:
        _run(self._backward, layout, s, scales, g, slope)


@cache
def kernel() -> Kernel | None:
    instead = "Pattention's scores pass through torch calls on the CPU; the kernel is faster"
    return loaded(SOURCE, Kernel, instead)


def _run(
    function: Callable[..., int], layout: Layout, s: Tensor, scales: Tensor | None, g: Tensor, slope: Tensor | None
) -> None:
    norms = len(layout.norms)
    ends = (ctypes.c_int64 * norms)(*(columns.stop for columns, _ in layout.norms))
    taus = (ctypes.c_float * norms)(*(float(tau) for _, tau in layout.norms))
    scores = _Scores(len(s), norms, torch.get_num_threads(), s.dtype == torch.bfloat16, NORM_FLOOR)
    scores.ends, scores.taus = ctypes.addressof(ends), ctypes.addressof(taus)
    scores.scales = None if scales is None else scales.data_ptr()
    scores.s, scores.s_row = s.data_ptr(), s.stride(0)
    scores.g, scores.g_row = g.data_ptr(), g.stride(0)
    if slope is not None:
        scores.slope, scores.slope_row = slope.data_ptr(), slope.stride(0)
    if function(ctypes.byref(scores)) != 0:
        raise MemoryError("no memory for Pattention")
