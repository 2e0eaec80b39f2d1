"""How much of their work the compiled paths take at a time. Plain numbers: plans are made without torch."""

from __future__ import annotations

CHUNK = 32  # tokens of the scan: the states kept are 1/32 of all, those made again at a time as well

# Bytes of Pattention's buffer (rows, tokens). On a CPU two of them stay in cache; a GPU is only busy with more.
CPU_BYTES, GPU_BYTES = 2**21, 2**27
FEWEST = 512  # rows: each chunk's products of weights' gradients read and write all of them


def chunk_rows(rows: int, row_bytes: int, gpu: bool) -> int:
    """Of ``rows`` rows; 1 at the least."""
    return max(1, min(rows, max(FEWEST, (GPU_BYTES if gpu else CPU_BYTES) // row_bytes)))


def chunks(rows: int, row_bytes: int, gpu: bool) -> list[slice]:
    """Never empty, as x may be."""
    step = chunk_rows(rows, row_bytes, gpu)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]
