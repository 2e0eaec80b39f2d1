"""How many rows Pattention's compiled path takes at a time. Plain numbers: plans are made without torch."""

from __future__ import annotations

# Entries (rows × tokens). On a CPU two such buffers stay in cache; a GPU is only busy with more.
CPU_ENTRIES, GPU_ENTRIES = 2**19, 2**25
FEWEST = 512  # rows: each chunk's products of weights' gradients read and write all of them


def chunk_rows(rows: int, width: int, gpu: bool) -> int:
    """Of ``rows`` rows of ``width`` columns; 1 at the least."""
    return max(1, min(rows, max(FEWEST, (GPU_ENTRIES if gpu else CPU_ENTRIES) // width)))


def chunks(rows: int, width: int, gpu: bool) -> list[slice]:
    """Never empty, as x may be."""
    step = chunk_rows(rows, width, gpu)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]
