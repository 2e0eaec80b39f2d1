"""How Triton's kernels cut up their work, and what they keep. Plain numbers: plans are made without torch."""

from __future__ import annotations

PROVEN = False  # whether the kernels have been compared with the reference on a GPU; so far only interpreted

# The selective scan.
KEPT = 64  # tokens between two states that forward keeps
MOST_STATES = 256  # of a channel: beyond, a tile of states does not fit the registers
# Channels of a program, tokens of an unrolled chunk and warps, for up to so many states: the largest that spill no
# registers on the GPUs that tests compile for. Backward has the states of a chunk in registers. With more than 16
# states, a sum over them crosses warps.
FORWARD = {16: (32, 4, 1), 32: (32, 2, 2), 64: (32, 2, 4), 128: (32, 1, 8), 256: (32, 2, 8)}
ENDS = FORWARD | {16: (32, 2, 1)}
BACKWARD = {
    4: (32, 1, 1),
    8: (32, 1, 2),
    16: (32, 2, 1),
    32: (32, 1, 4),
    64: (32, 1, 8),
    128: (16, 1, 8),
    256: (8, 1, 8),
}
MOST_SPANS = 64
# Warps that a scheduler of a multiprocessor should have before L is left whole: a second pass over the tokens costs
# about half of the first, and below one warp for each scheduler more than half of the machine waits.
WARPS_WANTED = {"forward": 1, "backward": 2}
SCHEDULERS = 4  # of a multiprocessor

# Pattention.
WORK_ELEMENTS = 2**25  # of one buffer (rows, tokens) at the most; forward has one of them, backward three
CHUNK_MULTIPLE = 128
ALIGN = 16  # elements: rows of buffers begin at multiples of it, which wide loads and stores need
COLUMNS = {"narrow": 128, "ieee": 64, "tf32": 64}  # of a tile of scores, by how they are multiplied
GRAM_RATIO = 4  # of parameter tokens, and of tokens, to the width, from which on norms come from the Gram matrix


def scan_tile(name: str, states: int) -> tuple[int, int, int]:
    """Channels of a program of the kernel ``name``, tokens of a chunk, warps."""
    table = {"backward": BACKWARD, "ends": ENDS}.get(name, FORWARD)
    return next(tile for most, tile in table.items() if states <= most)


def scan_scratch(states: int) -> tuple[int, int, int]:
    """What a program of the backward pass puts aside: states before each chunk of a block, for each channel."""
    channels, chunk, _ = scan_tile("backward", states)
    return KEPT // chunk, power(states), channels


def scan_programs(name: str, states: int, channels: int, sequences: int) -> int:
    """Of one span."""
    return -(-channels // scan_tile(name, states)[0]) * sequences


def most_spans(name: str, states: int, channels: int, sequences: int, processors: int) -> int:
    """How many spans of L fill a GPU of so many multiprocessors."""
    warps = scan_programs(name, states, channels, sequences) * scan_tile(name, states)[2]
    return max(1, min(MOST_SPANS, WARPS_WANTED[name] * SCHEDULERS * processors // warps))


def scan_spans(length: int, most: int) -> tuple[int, int]:
    """Tokens of a span, whole numbers of those between kept states, and how many spans there are."""
    span = -(-length // (most * KEPT)) * KEPT
    return span, -(-length // span)


def power(states: int) -> int:
    """The power of two from ``states`` on."""
    return 1 << (states - 1).bit_length()


def chunk_rows(width: int) -> int:
    """Rows that Pattention has in its buffers at once, ``width`` parameter tokens wide."""
    return max(CHUNK_MULTIPLE, WORK_ELEMENTS // width // CHUNK_MULTIPLE * CHUNK_MULTIPLE)


def padded(width: int) -> int:
    """Elements between two rows of a buffer."""
    return -(-width // ALIGN) * ALIGN


def norms_ahead(rows: int, depth: int, width: int, norms: int) -> bool:
    """Whether the norms of ``width`` scores, under ``norms`` norms, come from Gram matrices, where x is in 16 bits."""
    return width >= GRAM_RATIO * depth * norms and rows >= GRAM_RATIO * depth
