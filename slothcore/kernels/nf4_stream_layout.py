"""How the shared memory of a program of nf4_stream_kernel.py is divided; nf4_stream_parts.py says what lies where."""

from functools import cache
from typing import NamedTuple

from slothcore.kernels.launch import ceil_div

# A program takes more than half of a multiprocessor's shared memory, so that one finds place on each. The next product
# begins while this one runs: its programs then come where this one's have left, and fill their rings while the small
# kernels in between run. With two places some got two programs on one multiprocessor, while others idled. A step of
# Llama-3.1-8B with 1 and with 4 rows, in ms: without this kernel 3.52 and 3.98, with two places 3.27 and 3.81, with one
# 3.22 and 3.51.
LEAST_SHARED = 115 * 1024
MOST_SHARED = 203 * 1024
MOST_STAGES = 6

WARPS = 8
UNIT_BYTES = {True: 2048 + 64 + 64, False: 2048 + 256}
"""Of a unit, by whether absmax is nested: words, and codes of absmax with their scales, or absmax."""
SUMS_BYTES = WARPS * 512
TABLE_BYTES = 256 * 128
BLOCK_BYTES, BETWEEN_TOKENS = 144, 64
"""Of a block of x, with the padding that keeps lanes apart; and between tokens."""


class Plan(NamedTuple):
    """How the shared memory of a program is used.

    Attributes:
        stages: units in the ring of each warp.
        x_bytes: what is left for x and, at its end, the barriers.
        total: all of it, in bytes.
    """

    stages: int
    x_bytes: int
    total: int


@cache
def plan(rows: int, in_features: int, *, nested: bool) -> Plan | None:
    """As many stages as fit; None if x leaves no room for two."""
    x_bytes = ceil_div(rows * (in_features // 64 * BLOCK_BYTES + BETWEEN_TOKENS), 128) * 128
    for stages in range(MOST_STAGES, 1, -1):
        total = WARPS * stages * UNIT_BYTES[nested] + 2 * SUMS_BYTES + TABLE_BYTES + x_bytes
        if total <= MOST_SHARED:
            padding = max(0, LEAST_SHARED - total)
            return Plan(stages, x_bytes + padding, total + padding)
    return None
