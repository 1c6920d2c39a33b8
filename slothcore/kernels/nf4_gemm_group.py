"""Products with NF4 weights over one input, for many rows, decoded while the tensor cores multiply.

Forward   y  = x W^T + u B^T + b,   W = x.dtype(code * absmax), one weight or several below each other, u = lora_x
Backward  dx = dy W + v A,          v = lora_dy
Shapes    x, dx [M, K]; W [N, K] in NF4; u, v [M, R]; B [N, R]; b [N]; A [R, K]; y, dy [M, N].
          M = rows (tokens), N = out_features of all weights, K = in_features, R = LoRA rank.
Dtypes    x, u, B, b, y (dy, v, A, dx) bfloat16 or float16, all alike; sums float32.
Rounding  W is rounded to x.dtype before the product, as if dequantised first; the result is rounded once.
Kernel    nf4_gemm_warps.py. It is written in Gluon, which older versions of Triton lack; where it is missing, on other
          GPUs and where it would not be faster, `takes` says no and the caller dequantises, then multiplies: the eager
          twin of these operations is nf4_eager.nf4_dequantize_group followed by lora_gemm_eager.
"""

from collections.abc import Sequence
from functools import cache
from math import gcd

import torch
from torch import Tensor

from slothcore.kernels.gpu import copy_engine_takes, has_gluon, is_hopper, multiprocessors
from slothcore.kernels.launch import ceil_div
from slothcore.kernels.nf4 import absmax_arguments
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor

LARGEST_GROUP = 3
TILE_ROWS, TILE_TOKENS = 128, 256
"""Outputs and tokens that a program sums at a time."""
UNIT = 4 * BLOCK
"""Summands between which tiles may be cut."""
PIECES = 4
"""In which a tile is stored; as in the kernel."""
ADDING = 2
"""What it costs to add up a tile's sums once more, in units of a program's time."""
BEGINNING = 1 / 8
"""And what each place in a tile costs where programs begin: at different places they share no x in the cache."""

# All linears of a Llama-3.1-8B layer, LoRA of rank 16: times the bare products', and the same by the other way (H100,
# bfloat16). The other way decodes first; forward up to 256 rows, in the product. * with other cuts than are made now.
#          128           256           512           768           1024          2048
# y   1.61 / 1.58   1.12 / 1.91   1.23 / 1.79   1.31* / 1.58   1.13 / 1.41   1.18* / 1.19
# dx  1.51 / 2.24   1.25 / 2.20   1.21 / 1.76   1.61* / 1.46   1.16 / 1.39   1.58* / 1.24
# At 2,048 rows every product is faster whose x (or dy) stays in the cache, by 3 to 7%.
FORWARD_ROWS, BACKWARD_ROWS = 129, 64
MANY_ROWS, MOST_ROWS = 1024, 2048
MANY_BYTES = 32 * 2**20
"""With fewer rows or more, other ways are faster; beyond `MANY_ROWS`, with more bytes of x (or dy) too."""
LEAST_WEIGHTS = 4096 * 4096
"""A launch takes some 13 us however little it multiplies; smaller weights are decoded and multiplied about as fast."""

FLAG_STREAMS = 64
"""Streams for which flags are kept; on others each call clears its own."""


def pays(rows: int, summands: int, *, backward: bool) -> bool:
    """Whether a product with so many rows and summands is faster with weights that are decoded meanwhile.

    Rows are multiplied 256 at a time: up to 256 take as long as 256, and 513 as long as 768. So from there to some 600
    rows decoding first is as fast.
    """
    if rows > MANY_ROWS and 2 * rows * summands > MANY_BYTES:
        return False
    return (BACKWARD_ROWS if backward else FORWARD_ROWS) <= rows <= MOST_ROWS


def takes(left: Tensor, weights: Sequence[Nf4Tensor], operands: Sequence[Tensor | None], *, backward: bool) -> bool:
    """Whether the products below are possible for these tensors, and faster than other ways.

    Args:
        left: x, or dy if `backward`.
        weights: in the order of their outputs.
        operands: what else the copy engine reads: the factors and what they are multiplied with.
    """
    large = sum(weight.shape[0] * weight.shape[1] for weight in weights) >= LEAST_WEIGHTS
    return large and pays(*left.shape, backward=backward) and can_take(left, weights, operands, backward=backward)


def can_take(left: Tensor, weights: Sequence[Nf4Tensor], operands: Sequence[Tensor | None], *, backward: bool) -> bool:
    """As `takes`, whether faster or not: for benchmarks."""
    if not is_hopper(left.device) or left.itemsize != 2 or not 1 <= len(weights) <= LARGEST_GROUP or not has_gluon():
        return False
    in_features = weights[0].shape[1]
    *others, last = (weight.shape[0] for weight in weights)
    # A tile has outputs of one weight and a unit summands of one, and a unit's absmax codes lie in whole words.
    if backward:
        whole = in_features % BLOCK == 0 and all(n % UNIT == 0 for n in (*others, last))
    else:
        whole = in_features % UNIT == 0 and all(n % TILE_ROWS == 0 for n in others) and last % 8 == 0
    return (
        whole
        and all(w.is_nested == weights[0].is_nested for w in weights)
        and all(w.packed.data_ptr() % 16 == 0 and w.absmax.data_ptr() % 4 == 0 for w in weights)
        and all(copy_engine_takes(t) for t in (left, *operands) if t is not None)
    )


def nf4_linear_group(
    x: Tensor,
    weights: Sequence[Nf4Tensor],
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x W^T + lora_x lora_B^T + bias, the weights' outputs side by side.

    Args:
        x: [M, K] bfloat16 or float16.
        weights: one to three, [N_i, K], as `takes` takes them.
        lora_x: [M, R], or None.
        lora_B: [N, R]; both or neither.
        bias: [N] contiguous, or None.
        out: [M, N] to write to; rows may be strided.
    Returns: `out`, or a new tensor [M, N].
    """
    if out is None:
        out = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
    _launch(x, weights, lora_x, lora_B, bias, out, backward=False)
    return out


def nf4_input_grad_group(
    dy: Tensor,
    weights: Sequence[Nf4Tensor],
    *,
    lora_dy: Tensor | None = None,
    lora_A: Tensor | None = None,
) -> Tensor:
    """dx = dy W + lora_dy lora_A, the gradient of `nf4_linear_group` with respect to its x.

    Args:
        dy: [M, N] bfloat16 or float16.
        weights: one to three, [N_i, K], as `takes` takes them.
        lora_dy: [M, R], or None.
        lora_A: [R, K]; both or neither.
    Returns: [M, K].
    """
    dx = dy.new_empty(dy.shape[0], weights[0].shape[1])
    _launch(dy, weights, lora_dy, lora_A, None, dx, backward=True)
    return dx


@cache
def cut_and_share(tiles: int, units: int, *, multiprocessors: int) -> tuple[int, int]:
    """How many of `tiles` tiles of `units` units each are cut, and how many units of them a program takes.

    Tiles that fill all multiprocessors are not cut. The rest are laid end to end and dealt out: as few units each as
    there must be, or more, up to whole tiles, where fewer parts are then added up and fewer places begun at.
    """
    cut = tiles % multiprocessors

    def cost(share: int) -> float:
        step = gcd(units, share)  # between the places at which programs begin
        return share + ADDING * ceil_div(units - step, share) + BEGINNING * (units // step)

    share = min(range(units, max(1, ceil_div(cut * units, multiprocessors)) - 1, -1), key=cost)
    return (cut, share) if cut and share < units else (0, units)


class _Flags:
    """Zeros, one for each consumer of each program, by which programs that share a tile say that their sums are there.

    Who has waited for a flag clears it, so they are cleared once only, and a captured graph can be replayed. Kernels
    that may run at once must not share them, so each stream has its own, as it has a workspace of cuBLAS.
    """

    def __init__(self, device: torch.device) -> None:
        self._programs = multiprocessors(device)
        self._all = torch.zeros(FLAG_STREAMS, 2 * self._programs, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # other streams will not wait for the zeros
        self._of: dict[int, Tensor] = {}

    def of_stream(self) -> Tensor:
        """Those of the current stream."""
        stream = torch.cuda.current_stream(self._all.device).cuda_stream
        found = self._of.get(stream)
        if found is None:
            if len(self._of) == FLAG_STREAMS:
                return torch.zeros_like(self._all[0])
            found = self._of[stream] = self._all[len(self._of)]
        return found


_flags: dict[torch.device, _Flags] = {}


def _flags_for(device: torch.device) -> Tensor:
    if device not in _flags:
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(2 * multiprocessors(device), dtype=torch.int32, device=device)
        _flags[device] = _Flags(device)
    return _flags[device].of_stream()


def _launch(
    left: Tensor, weights: Sequence[Nf4Tensor], lora_left: Tensor | None, lora_right: Tensor | None,
    bias: Tensor | None, out: Tensor, *, backward: bool,
) -> None:  # fmt: skip
    from slothcore.kernels.nf4_blocks import describe_words
    from slothcore.kernels.nf4_gemm_warps import describe, nf4_gemm_warps_kernel

    rows, outputs = out.shape
    left_desc = describe(left, TILE_TOKENS)
    # Never read without a LoRA term, but a kernel's argument must be something.
    lora_left_desc, lora_right_desc, rank = left_desc, describe(out, BLOCK), 0
    if lora_left is not None and lora_right is not None:
        lora_left_desc, lora_right_desc = describe(lora_left, TILE_TOKENS), describe(lora_right, BLOCK)
        rank = lora_left.shape[1]
    count = len(weights)
    out_features, in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
    described = [(describe_words(w, backward=backward), *absmax_arguments(w)) for w in weights]
    described += described[-1:] * (LARGEST_GROUP - count)
    starts = [sum(w.shape[0] for w in weights[:i]) for i in range(1, LARGEST_GROUP)]
    tiles = ceil_div(rows, TILE_TOKENS) * ceil_div(outputs, TILE_ROWS)
    units = ceil_div(out_features if backward else in_features, UNIT)
    cut, share = cut_and_share(tiles, units, multiprocessors=multiprocessors(left.device))
    parts = ceil_div(cut * units, share)
    programs = parts if tiles == cut else min(tiles, multiprocessors(left.device))
    nf4_gemm_warps_kernel[(programs,)](
        left_desc, lora_left_desc, lora_right_desc, bias, describe(out, TILE_TOKENS // PIECES),
        *described[0], *described[1], *described[2], *starts,
        left.new_empty(parts * TILE_ROWS * TILE_TOKENS, dtype=torch.float32), _flags_for(left.device), cut, share,
        rows, out_features, in_features, rank,
        COUNT=count, NESTED=weights[0].is_nested, HAS_BIAS=bias is not None, BACKWARD=backward,
        TOKENS=TILE_TOKENS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
