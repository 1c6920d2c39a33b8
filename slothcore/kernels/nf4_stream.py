"""Products of few rows with NF4 weights on Hopper at the pace of its memory: launches of nf4_stream_kernel.py.

Forward, shapes, dtypes, rounding: those of nf4_few.py, which asks `takes` first. Elsewhere, for other shapes and with a
Triton without Gluon, it has kernels of its own; the eager twin is nf4_few_eager.py.
Order     y and h of a row do not depend on the rows beside it or on their number, among all that `takes` takes.
Early     As there: a program begins while the kernel in front ends, and has the first of its weights when x is there.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from slothcore.kernels.early import begins_early, is_hopper
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.launch import ceil_div
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_tensor import Nf4Tensor
from slothcore.kernels.nf4_weights import weight_arguments

IS_ON = True
MOST_ROWS = 4
"""With more rows the kernel by permutes is as fast: x is what they wait for."""
COLUMNS_OF_UNIT = 256
ROWS_OF_TILE = 16
WARPS = 8
WORDS_BY_TABLE = 4
"""Of the eight words of a block; the permutes have the others."""

# What decides how many programs a multiprocessor has, and so where those of the next product go that begin early: there
# must be as many places as programs, or some would get two on one multiprocessor while others idle.
PROGRAMS_EACH = 1
LEAST_SHARED = 115 * 1024
MOST_SHARED = 202 * 1024
MOST_STAGES = 6
MOST_REGISTERS = 144

RING_BYTES = {True: 2048 + 64 + 64, False: 2048 + 256}
"""Of a unit, by whether absmax is nested."""
SUMS_BYTES = WARPS * 512
TABLE_BYTES = 256 * 128
BLOCK_BYTES, BETWEEN_TOKENS = 144, 64


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
    """As many stages as fit; None if x is too large for two."""
    x_bytes = ceil_div(rows * (in_features // 64 * BLOCK_BYTES + BETWEEN_TOKENS), 128) * 128
    rest = 2 * SUMS_BYTES + (TABLE_BYTES if WORDS_BY_TABLE else 0)
    for stages in range(MOST_STAGES, 1, -1):
        total = WARPS * stages * RING_BYTES[nested] + rest + x_bytes
        if total <= MOST_SHARED:
            padding = max(0, LEAST_SHARED - total)
            return Plan(stages, x_bytes + padding, total + padding)
    return None


@cache
def has_gluon() -> bool:
    """Whether this Triton has the parts of Gluon that the kernel is written with."""
    try:
        from triton.experimental import gluon
        from triton.experimental.gluon import language as gl
    except ImportError:
        return False
    return hasattr(gl, "allocate_shared_memory") and hasattr(gluon, "jit")


def takes(x: Tensor, weights: Sequence[Nf4Tensor]) -> bool:
    """Whether `launch` takes these, of what nf4_few.py takes."""
    if not (IS_ON and x.is_cuda and is_hopper(x.device) and has_gluon()):
        return False
    return fits(x, weights)


def fits(x: Tensor, weights: Sequence[Nf4Tensor]) -> bool:
    """As `takes`, for any GPU."""
    rows, in_features = x.shape
    nested = weights[0].is_nested
    # Units are whole, and what is copied at once lies in whole words.
    aligned = all(w.packed.data_ptr() % 16 == 0 and w.absmax.data_ptr() % (4 if nested else 16) == 0 for w in weights)
    whole = rows <= MOST_ROWS and in_features % COLUMNS_OF_UNIT == 0 and aligned
    return whole and plan(rows, in_features, nested=nested) is not None


def launch(
    x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms, out: Tensor, *, activation: Activation | None = None
) -> Tensor:
    """The products, or with an activation act(gate) * up, to `out`.

    Args:
        x: [M, K], which `takes` takes with the weights.
        weights: at most three, NF4 [N_i, K]; with an activation gate and up, or one that holds the rows of both.
        out: [M, sum of N_i], or with an activation [M, half of it].
    Returns: out.
    """
    from slothcore.kernels.nf4_stream_kernel import nf4_stream_kernel

    (rows, in_features), lora_x, nested = x.shape, terms.lora_x, weights[0].is_nested
    space = plan(rows, in_features, nested=nested)
    assert space is not None, f"x of {rows} rows of {in_features} does not fit"
    outputs = [weight.shape[0] for weight in weights] if activation is None else [2 * out.shape[1]]
    tiles = sum(ceil_div(n, ROWS_OF_TILE) for n in outputs)
    early = begins_early(x)
    nf4_stream_kernel[(min(tiles, PROGRAMS_EACH * multiprocessors(x.device)),)](
        x, lora_x, out, *weight_arguments(weights, terms),
        x.stride(0), 0 if lora_x is None else lora_x.stride(0), out.stride(0), rows, in_features, tiles, 128,
        WEIGHTS=len(weights), NESTED=nested, HAS_LORA=lora_x is not None, HAS_BIAS=terms.biases[0] is not None,
        ACTIVATION=activation, STAGES=space.stages, X_BYTES=space.x_bytes, TABLED=WORDS_BY_TABLE,
        WHOLE=in_features % (COLUMNS_OF_UNIT * WARPS) == 0, EARLY=early,
        num_warps=WARPS, maxnreg=MOST_REGISTERS, enable_fp_fusion=False,
        launch_pdl=early,
    )  # fmt: skip
    return out


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
