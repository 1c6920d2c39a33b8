"""Products with NF4 weights over one input, for 33 rows and more, decoded while the tensor cores multiply.

Forward   y  = x W^T + u B^T + b,   W = x.dtype(code * absmax), one weight or several below each other, u = lora_x
Backward  dx = dy W + v A,          v = lora_dy
Shapes    x, dx [M, K]; W [N, K] in NF4; u, v [M, R]; B [N, R]; b [N]; A [R, K]; y, dy [M, N].
          M = rows (tokens), N = out_features of all weights, K = in_features, R = LoRA rank.
Dtypes    x, u, B, b, y (dy, v, A, dx) bfloat16 or float16, all alike; sums float32.
Rounding  W is rounded to x.dtype before the product, as if dequantised first; the result is rounded once.
Early     The kernel may begin while the one in front of it ends (early.py), which must not be one that writes a weight.
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
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor

LARGEST_GROUP = 3
TILE_ROWS = 128
"""Outputs that a program sums at a time, for `tile_tokens` tokens."""
UNIT = 4 * BLOCK
"""Summands between which tiles may be cut."""
PIECES = 4
"""In which a tile is stored; as in the kernel."""
ADDING = 2
"""What it costs that one program adds up a tile's sums once more, in units of a program's time."""
EXCHANGING = 1
"""And that two or four programs with equal parts of a tile add up a piece of it each."""
BEGINNING = 1 / 8
"""And what each place in a tile costs where programs begin: at different places they share no x in the cache."""

# All linears of a Llama-3.1-8B layer, LoRA of rank 16: times the bare products', and the same by the other way (H100,
# bfloat16). The other way decodes first; forward up to 256 rows, in the product. * with other cuts than are made now.
#          128           256           512           768           1024          2048
# y   1.61 / 1.58   1.12 / 1.91   1.10 / 1.79   1.31* / 1.58   1.13 / 1.41   1.18* / 1.19
# dx  1.51 / 2.24   1.25 / 2.20   1.14 / 1.76   1.61* / 1.46   1.16 / 1.39   1.58* / 1.24
# At 2,048 rows every product is faster whose x (or dy) stays in the cache, by 3 to 7%. Only 512 rows were timed since
# programs add up tiles together and begin early: 1.18 and 1.21 before, in the same run. 4096 x 4096 alone, now and
# before (y at 64 rows: by permutes):
#           64            256           512           1024
# y   0.86 / 1.08   1.07 / 1.75   1.18 / 1.41   1.09 / 1.17
# dx  0.91 / 2.48   1.14 / 1.88   1.25 / 1.48   1.13 / 1.22
LEAST_ROWS, FEW_ROWS = 33, 64
FORWARD_ROWS, BACKWARD_ROWS = 129, 64
MANY_ROWS, MOST_ROWS = 1024, 2048
MANY_BYTES = 32 * 2**20
"""With fewer rows or more, other ways are faster; beyond `MANY_ROWS`, with more bytes of x (or dy) too."""
LEAST_WEIGHTS = 4096 * 4096
"""A launch takes some 8 us however little it multiplies; smaller weights are decoded and multiplied about as fast."""

MOST_WEIGHTS_OF_FEW = 4096 * 4096
"""Of products with up to `FEW_ROWS`. Larger weights gain less: us at 64 rows, and by permutes, 4096 x 4096 13.6 (17.1),
14336 x 4096 34.0 (39.5), 4096 x 14336 32.3 (32.8).
"""
LONGEST_RANK = 64
"""Of factors that are not joined."""

FLAG_STREAMS = 64
"""Streams for which flags are kept; on others each call clears its own."""


def tile_tokens(rows: int) -> int:
    """Tokens of a tile."""
    return FEW_ROWS if rows <= FEW_ROWS else 256


def parts_together(units: int, share: int) -> int:
    """How many equal parts of `share` units a tile has whose programs add it up together; 1 where they do not."""
    return units // share if units % share == 0 and units // share in (2, PIECES) else 1


def pays(rows: int, summands: int, *, backward: bool) -> bool:
    """Whether a product with so many rows and summands is faster with weights that are decoded meanwhile.

    Up to 64 rows are multiplied as 64, more 256 at a time: 65 take as long as 256, and 513 as long as 768. So from
    there to some 600 rows decoding first is as fast.
    """
    if rows > MANY_ROWS and 2 * rows * summands > MANY_BYTES:
        return False
    if not backward and LEAST_ROWS <= rows <= FEW_ROWS:
        return True
    return (BACKWARD_ROWS if backward else FORWARD_ROWS) <= rows <= MOST_ROWS


def takes(left: Tensor, weights: Sequence[Nf4Tensor], operands: Sequence[Tensor | None], *, backward: bool) -> bool:
    """Whether the products below are possible for these tensors, and faster than other ways.

    Args:
        left: x, or dy if `backward`.
        weights: in the order of their outputs.
        operands: what else the copy engine reads: the factors and what they are multiplied with.
    """
    size = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    if size < LEAST_WEIGHTS or (not backward and left.shape[0] <= FEW_ROWS and size > MOST_WEIGHTS_OF_FEW):
        return False
    return pays(*left.shape, backward=backward) and can_take(left, weights, operands, backward=backward)


def takes_few(x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms) -> bool:
    """Whether `nf4_linear_few` is possible for these tensors, and faster than other ways."""
    short = all(B is None or B.shape[1] <= LONGEST_RANK for B in terms.lora_B)
    plain = short and x.shape[0] <= FEW_ROWS and all(bias is None for bias in terms.biases)
    return plain and takes(x, weights, (terms.lora_x,), backward=False)


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


def nf4_linear_few(x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms) -> Tensor:
    """y_i = x W_i^T + u_i (c_i B_i)^T side by side, the factors read where they lie.

    Args:
        x: [M, K] bfloat16 or float16.
        weights: one to three, [N_i, K], which `takes_few` takes with the rest.
        terms: u, every B_i and its scaling, which are multiplied and then rounded; no biases.
    Returns: [M, sum of N_i].
    """
    out = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
    _launch(x, weights, terms.lora_x, None, None, out, backward=False, apart=terms)
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
        adding = EXCHANGING if parts_together(units, share) > 1 else ADDING * ceil_div(units - step, share)
        return share + adding + BEGINNING * (units // step)

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
    bias: Tensor | None, out: Tensor, *, backward: bool, apart: Terms | None = None,
) -> None:  # fmt: skip
    """apart: factors and scalings of each weight, instead of lora_right."""
    from slothcore.kernels.nf4_blocks import describe_words
    from slothcore.kernels.nf4_gemm_warps import describe, nf4_gemm_warps_kernel

    (rows, outputs), count = out.shape, len(weights)
    tokens, missing = tile_tokens(rows), LARGEST_GROUP - count
    left_desc = describe(left, tokens)
    # Never read without a LoRA term, but a kernel's argument must be something.
    lora_left_desc, lora_right_desc, rank = left_desc, describe(out, BLOCK), 0
    if lora_left is not None:
        lora_left_desc, rank = describe(lora_left, tokens), lora_left.shape[1]
    if lora_right is not None:
        lora_right_desc = describe(lora_right, BLOCK)
    lora_B, scalings = ([None] * count, [1.0] * count) if apart is None else (apart.lora_B, apart.scalings)
    some_B = next((B for B in lora_B if B is not None), None)
    factors = [*(some_B if B is None else B.contiguous() for B in lora_B), *[some_B] * missing]
    ranks = [*(0 if B is None else B.shape[1] for B in lora_B), *[0] * missing]
    out_features, in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
    described = [(describe_words(w, backward=backward), *absmax_arguments(w)) for w in weights]
    described += described[-1:] * missing
    starts = [sum(w.shape[0] for w in weights[:i]) for i in range(1, LARGEST_GROUP)]
    tiles = ceil_div(rows, tokens) * ceil_div(outputs, TILE_ROWS)
    units = ceil_div(out_features if backward else in_features, UNIT)
    cut, share = cut_and_share(tiles, units, multiprocessors=multiprocessors(left.device))
    parts = ceil_div(cut * units, share)
    programs = parts if tiles == cut else min(tiles, multiprocessors(left.device))
    nf4_gemm_warps_kernel[(programs,)](
        left_desc, lora_left_desc, lora_right_desc, bias, describe(out, tokens // PIECES),
        *described[0], *described[1], *described[2], *starts,
        left.new_empty(parts * TILE_ROWS * tokens, dtype=torch.float32), _flags_for(left.device), cut, share,
        rows, out_features, in_features, rank, *factors, *ranks, *scalings, *[1.0] * missing,
        COUNT=count, NESTED=weights[0].is_nested, HAS_BIAS=bias is not None, BACKWARD=backward,
        TOKENS=tokens, TOGETHER=parts_together(units, share) if cut else 1, APART=some_B is not None,
        num_warps=4, enable_fp_fusion=False, launch_pdl=True,
    )  # fmt: skip
