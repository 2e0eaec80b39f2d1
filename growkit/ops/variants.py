"""Every way in which a kernel may be compiled and launched, as data: the launch takes one of them, and tests compile
the same ones ahead of time for each GPU."""

from __future__ import annotations

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One kernel, ready for a compiler.

    ``types``: of the arguments that are not constants, as Triton writes them (``*bf16``, ``i32``). ``constants``: the
    others; an optional tensor that is absent is the constant None. ``divisible``: the arguments that are multiples of
    16, pointers in bytes, which Triton finds out by itself when it launches.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int = 1
    fp_fusion: bool = True  # said on both sides: Triton's own default is about to change
