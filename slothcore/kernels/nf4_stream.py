"""Products of one to four rows with NF4 weights on Hopper: launches of nf4_stream_kernel.py.

Forward, shapes, dtypes, rounding: those of nf4_few.py, which asks `takes` first. Elsewhere, for other shapes and with a
Triton without Gluon, it has kernels of its own; the eager twin is nf4_few_eager.py.
Order     y and h of a row do not depend on the rows beside it or on their number, among all that `takes` takes.
Early     As there: a program begins while the kernel in front ends, and has the first of its weights when x is there.
"""

from collections.abc import Sequence

from torch import Tensor

from slothcore.kernels.early import begins_early
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.gpu import has_gluon, is_hopper, multiprocessors
from slothcore.kernels.launch import ceil_div
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_stream_layout import WARPS, plan
from slothcore.kernels.nf4_tensor import Nf4Tensor
from slothcore.kernels.nf4_weights import weight_arguments

MOST_ROWS = 4
"""With more rows the kernel by permutes is as fast: x is what they wait for."""
COLUMNS_OF_UNIT = 256
ROWS_OF_TILE = 16
MOST_REGISTERS = 144
"""Of a thread, with room beside it for the small kernels between two products."""


def takes(x: Tensor, weights: Sequence[Nf4Tensor]) -> bool:
    """Whether `launch` takes these, of what nf4_few.py takes."""
    return x.is_cuda and is_hopper(x.device) and has_gluon() and fits(x, weights)


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
    nf4_stream_kernel[(min(tiles, multiprocessors(x.device)),)](
        x, lora_x, out, *weight_arguments(weights, terms),
        x.stride(0), 0 if lora_x is None else lora_x.stride(0), out.stride(0), rows, in_features, tiles, 128,
        WEIGHTS=len(weights), NESTED=nested, HAS_LORA=lora_x is not None, HAS_BIAS=terms.biases[0] is not None,
        ACTIVATION=activation, STAGES=space.stages, X_BYTES=space.x_bytes,
        WHOLE=in_features % (WARPS * COLUMNS_OF_UNIT) == 0, EARLY=early,
        num_warps=WARPS, maxnreg=MOST_REGISTERS, enable_fp_fusion=False, launch_pdl=early,
    )  # fmt: skip
    return out
