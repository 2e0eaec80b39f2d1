"""Compiles a kernel for a GPU that is not there, and reads off what became of it.

    built = build(variant, "sm_90")
    built.registers, built.spilled, built.shared, built.instructions("mma"), built.loops()

Registers and spills are ptxas's own figures, instructions those of the machine code (nvdisasm; Triton's wheel brings
both). For AMD they come from the assembly.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from growkit.ops.selective_scan import triton as scan
from growkit.ops.variants import Variant

NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MOST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program
LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", re.MULTILINE)


@dataclass(frozen=True)
class Loop:
    """The instructions between a label and a branch back to it."""

    lines: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.lines)


@dataclass(frozen=True)
class Built:
    variant: Variant
    target: str
    registers: int  # of each thread
    spilled: int  # bytes of each thread, stores and loads; for AMD vector registers
    shared: int  # bytes of each program
    assembly: str  # machine code as text

    @cached_property
    def lines(self) -> tuple[str, ...]:
        """Labels (``.L_x_1:``) and instructions in the order of the program."""
        found = []
        for line in self.assembly.splitlines():
            label = re.match(r"\s*(\.?L\w+):", line)
            instruction = LINE.match(line)
            if label:
                found.append(label[1] + ":")
            elif instruction:
                found.append(instruction[1])
            elif self.target.startswith("gfx") and re.match(r"\s+[svdgb]\w*_\w+", line):
                found.append(line.strip())
        return tuple(found)

    def instructions(self, pattern: str) -> int:
        """How many instructions ``pattern`` is found in."""
        return sum(re.search(pattern, line) is not None for line in self.lines)

    def loops(self) -> list[Loop]:
        """Innermost loops."""
        at, spans = {}, []
        for index, line in enumerate(self.lines):
            if line.endswith(":"):
                at[line[:-1]] = index
                continue
            to = re.search(r"(?:BRA|s_c?branch\w*)\b.*?(\.?L\w+)\b", line)
            if to and to[1] in at:
                spans.append((at[to[1]], index + 1))
        inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [Loop(tuple(line for line in self.lines[a:b] if not line.endswith(":"))) for a, b in sorted(set(inner))]


def build(variant: Variant, target: str) -> Built:
    arguments = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in arguments}
    assert set(variant.types) | set(variant.constants) == set(arguments), f"{variant.name}: arguments without a type"
    attributes = {(arguments.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": variant.fp_fusion}
    if target.startswith("gfx"):  # a warp of AMD's has twice the threads
        options["num_warps"] = max(1, variant.num_warps // 2)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # what comes out of the cache has no log
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        return _amd(variant, target, compiled.asm["amdgcn"])
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill", log.getvalue())
    assert registers and spills, f"ptxas said nothing of registers: {log.getvalue()}"
    assembly, spilled = _disassembled(compiled.asm["cubin"]), sum(map(int, spills))
    return Built(variant, target, int(registers[1]), spilled, compiled.metadata.shared, assembly)


def of_a_state(name: str, states: int, dtype: torch.dtype, target: str, absent: tuple[str, ...] = ()) -> float | None:
    """Instructions of the scan's ``forward`` or ``backward`` for each state of each token, on a GPU of NVIDIA; None if
    the loops over tokens are not recognised, as with states that lie in several warps."""
    variant = scan.variant(name, states, dtype, frozenset(absent))
    built = build(variant, target)
    of_thread = variant.constants["BN"] * variant.constants["BD"] // (32 * variant.num_warps)
    loops = [loop for loop in built.loops() if loop.count("MUFU.EX2") >= variant.constants["U"] * of_thread]
    if len(loops) != (1 if name == "forward" else 2):
        return None
    return sum(len(loop.lines) for loop in loops) / (variant.constants["U"] * of_thread)


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd(variant: Variant, target: str, assembly: str) -> Built:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"the assembly says nothing of {name}"
        return int(found[1])

    # A scalar register spills into a lane of a vector register, not into memory.
    return Built(
        variant, target, figure("vgpr_count"), figure("vgpr_spill_count"), figure("group_segment_fixed_size"), assembly
    )
