"""Product with an NF4 weight that is decoded in the inner loop: for few rows, where reading the weight is the cost.

Forward   y = x W^T + u B^T + b,   W = x.dtype(code * absmax),   u = lora_x, B = lora_B (scaling inside one of them)
Shapes    x [M, K]; W [N, K] in NF4, K divisible by 64; u [M, R]; B [N, R]; b [N]; y [M, N].
          M = rows (tokens), N = out_features, K = in_features, R = LoRA rank.
Dtypes    x, u, B, b, y float32, bfloat16 or float16, all alike; sums float32.
Rounding  W is rounded to x.dtype before the product, as if dequantised first; y is rounded once.
Layout    A byte holds columns 2j (high nibble) and 2j + 1.
Split K   Few rows give few tiles, so the columns are cut into parts, each summed by its own program into a workspace
          [parts, M, N] float32; a second launch adds the parts. No atomics: the result is the same every time.
          For the fewest rows a program cuts its columns into slices besides, which needs no second launch.
Kernels   nf4_gemm_permute.py decodes by byte permutes (16-bit x on Hopper), nf4_gemm_table.py by a table (the rest).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor

from slothcore.kernels.glu import glu_forward
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.gpu import is_hopper
from slothcore.kernels.launch import ceil_div, with_contiguous_rows
from slothcore.kernels.nf4 import Decode, absmax_arguments
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_gemm_permute import BLOCKS_OF_STEP, nf4_linear_registers_kernel
from slothcore.kernels.nf4_gemm_table import nf4_linear_kernel, nf4_linear_one_row_kernel, nf4_linear_reduce_kernel
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor, check_linear, nf4_code
from slothcore.kernels.nf4_weights import weight_arguments

REDUCE_COLUMNS = 256


@dataclass(frozen=True)
class LinearConfig:
    """How nf4_linear is launched."""

    block_m: int
    """Tokens of a tile; for "registers", times slices, at least 16; for "table", 1 chooses that of a single row."""
    block_n: int
    """Weight rows of a tile; for "registers", times slices, a multiple of 16 * num_warps."""
    parts: int
    """Parts into which the columns are cut; fewer if there are not as many blocks of 64."""
    num_warps: int = 4
    kernel: Literal["table", "registers"] = "table"
    """Decode by a table, or by permutes into registers. What follows is for one of the two."""
    step: int = 1
    """For "table": blocks of 64 columns in one turn of the loop."""
    num_stages: int = 4
    """For "table": turns in flight."""
    decode: Decode = "gather"
    """For "table": which table."""
    slices: int = 1
    """For "registers": slices of its columns that a program sums side by side, for few tokens."""
    prefetch: bool = False
    """For "registers": whether the next step's weights are loaded while this one's are decoded."""
    max_registers: int | None = None
    """For "registers": what a thread may use, where fewer than the compiler likes let more programs run at once."""


@dataclass(frozen=True)
class _Rule:
    """The tile for up to `rows` rows, and how far K is split: until there are `programs`, or parts of `columns`."""

    rows: int
    tile: LinearConfig
    programs: int
    columns: int


# Microseconds on an H100 (bfloat16, LoRA of rank 16, weights not in cache) by rows and N x K; as many by the table, and
# by dequantising, then multiplying:
#         4096 x 4096       14336 x 4096        4096 x 14336
#   1      8.7  14  29       21.1  39  103       22.3  41  103
#   4      8.7  15  29       21.2  49  104       23.6  40  103
#   8     10.1  15  29       23.2  49  104       22.9  40  102
#  16     10.3  16  30       24.4  49  104       23.4  41  103
#  32     11.7  32  28       29.0  49  102       25.6  44  104
#  64     15.1  34  28       38.6  55  102       33.9  48  105
# 128     24.3  24  33       62.7  61  104       64.5  73  111
# Only at 128 rows was a prefetch not tried: its sums fill the registers. From 33 to 64 rows of 4096 x 4096 the warps of
# nf4_gemm_group.py are faster (13.6 beside 17.1, in a chain of the same product).
PERMUTE_RULES = (
    _Rule(4, LinearConfig(4, 16, 1, kernel="registers", slices=4, prefetch=True), programs=256, columns=4096),
    _Rule(16, LinearConfig(16, 64, 1, kernel="registers", prefetch=True), programs=896, columns=512),
    _Rule(32, LinearConfig(32, 128, 1, num_warps=8, kernel="registers", prefetch=True), programs=256, columns=512),
    _Rule(
        64,
        LinearConfig(64, 128, 1, num_warps=8, kernel="registers", prefetch=True, max_registers=128),
        programs=256,
        columns=1024,
    ),
    _Rule(128, LinearConfig(128, 128, 1, num_warps=8, kernel="registers"), programs=132, columns=1024),
)
TABLE_RULES = (
    _Rule(1, LinearConfig(1, 8, 1, step=4, num_stages=3), programs=512, columns=2048),
    _Rule(16, LinearConfig(16, 64, 1), programs=512, columns=512),
    _Rule(32, LinearConfig(32, 64, 1), programs=396, columns=2304),
    _Rule(64, LinearConfig(64, 64, 1), programs=396, columns=2304),
    _Rule(128, LinearConfig(128, 128, 1, num_warps=8, num_stages=3), programs=132, columns=1024),
    _Rule(2**31, LinearConfig(256, 128, 1, num_warps=8, num_stages=3), programs=132, columns=1024),
)


def linear_config(
    rows: int, out_features: int, in_features: int, *, itemsize: int = 2, permute: bool = False
) -> LinearConfig:
    """Launch configuration for M, N and K: enough programs to fill a large GPU, each with work enough.

    itemsize: bytes of an element of x; float32 keeps fewer turns in flight, to fit the shared memory of smaller GPUs.
    permute: whether the kernel that decodes by permutes can be used.
    """
    assert itemsize == 2 or not permute, "permutes give 16-bit weights"
    # For more tokens the decoding hides behind the products, and the table's simpler loop keeps them busier; up to the
    # last of the rules that is so only where the columns are too few to be cut into many parts.
    permute = permute and (rows <= 64 or (rows <= 128 and in_features > out_features))
    rule = next(rule for rule in (PERMUTE_RULES if permute else TABLE_RULES) if rows <= rule.rows)
    tile = rule.tile
    if itemsize != 2:
        tile = replace(tile, block_m=min(tile.block_m, 128), num_stages=2)
    tiles = ceil_div(rows, tile.block_m) * ceil_div(out_features, tile.block_n)
    # From 1.5 programs on each of 132 multiprocessors on, splitting K costs more than it fills.
    filled = tiles >= (rule.programs if permute else 198)
    parts = 1 if filled else max(1, min(rule.programs // tiles, in_features // rule.columns, 8))
    return replace(tile, parts=parts)


def can_permute(x: Tensor, weight: Nf4Tensor) -> bool:
    """Whether the kernel that decodes by permutes takes these operands: it reads 16 bytes at a time, and is laid out
    for the tensor cores of Hopper.
    """
    return x.is_cuda and x.itemsize == 2 and is_hopper(x.device) and weight.packed.data_ptr() % 16 == 0


def nf4_linear(
    x: Tensor,
    weight: Nf4Tensor,
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    _config: LinearConfig | None = None,
) -> Tensor:
    """y = x W^T + lora_x lora_B^T + bias with W in NF4, decoded on the way.

    Args:
        x: [M, K] float32, bfloat16 or float16; rows may be strided.
        weight: NF4 [N, K], K divisible by 64.
        lora_x: [M, R] of x.dtype, the input already multiplied by lora_A (and the scaling), or None.
        lora_B: [N, R] of x.dtype, or None; both or neither.
        bias: [N], or None.
        out: [M, N] of x.dtype to write to; rows may be strided.
        _config: a launch configuration other than `linear_config`'s; for benchmarks.
    Returns: `out`, or a new tensor [M, N] of x.dtype.
    Raises: ValueError if a shape or dtype does not fit, or K is not divisible by 64.
    """
    out = check_linear(x, weight, lora_x, lora_B, bias, out)
    rows, (out_features, in_features) = x.shape[0], weight.shape
    if rows == 0:
        return out
    x = with_contiguous_rows(x)
    lora_x = None if lora_x is None else with_contiguous_rows(lora_x)
    lora_B = None if lora_B is None else lora_B.contiguous()
    bias = None if bias is None else bias.contiguous()

    config = _config or linear_config(
        rows, out_features, in_features, itemsize=x.itemsize, permute=can_permute(x, weight)
    )
    if config.kernel == "registers":
        return linear_by_permutes(x, [weight], Terms(lora_x, [lora_B], [1.0], [bias]), out=out, _config=config)
    blocks_per_part, parts = _parts(in_features, config)
    target = _target(out, parts)
    _launch_table(x, weight, lora_x, lora_B, bias, out, target, config, blocks_per_part, parts)
    _add_parts(target, bias, out, parts)
    return out


def linear_by_permutes(
    x: Tensor,
    weights: Sequence[Nf4Tensor],
    terms: Terms,
    *,
    out: Tensor | None = None,
    activation: Activation | None = None,
    early: bool = False,
    _config: LinearConfig | None = None,
) -> Tensor:
    """Products with up to three weights side by side, in one launch and, where K is split, a second one.

    Args:
        x: [M, K] 16-bit, dense rows; `can_permute` takes it with each weight.
        weights: NF4 [N_i, K], which are `alike` with what `terms` brings.
        terms: u [M, sum of the ranks], every B_i and its scaling, which are multiplied and then rounded, and biases.
        out: [M, sum of N_i] of x.dtype to write to; rows may be strided.
        activation: of a gated unit: the first half of the outputs are the gate's, the others those of up, and the
            result is act(gate) * up [M, sum of N_i / 2].
        early: begin while the kernel in front ends, and read words of the weights until x is there; on Hopper. The
            kernel in front must not be one that writes a weight.
    Returns: `out`, or a new tensor.
    """
    (rows, in_features), out_features = x.shape, sum(weight.shape[0] for weight in weights)
    config = _config or linear_config(rows, out_features, in_features, permute=True)
    assert config.kernel == "registers", f"{config} is not decoded by permutes"
    rows_of_product = config.block_n * config.slices
    assert rows_of_product % (16 * config.num_warps) == 0, f"{rows_of_product} rows are no whole fragments"
    if out is None:
        out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    blocks_per_part, parts = _parts(in_features, config)
    target, lora_x = _target(out, parts), terms.lora_x
    limits = {} if config.max_registers is None or not x.is_cuda else {"maxnreg": config.max_registers}
    tiles = sum(ceil_div(weight.shape[0], config.block_n) for weight in weights)
    nf4_linear_registers_kernel[(tiles, ceil_div(rows, config.block_m), parts)](
        x, lora_x, target, *weight_arguments(weights, terms),
        x.stride(0), 0 if lora_x is None else lora_x.stride(0), target.stride(-2), rows, in_features, blocks_per_part,
        WEIGHTS=len(weights), NESTED=weights[0].is_nested, HAS_LORA=lora_x is not None,
        HAS_BIAS=terms.biases[0] is not None, IN_PARTS=parts > 1, ON_GPU=x.is_cuda,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_R=_rank_step(max([B.shape[1] for B in terms.lora_B if B is not None], default=0)), SLICES=config.slices,
        WARPS=config.num_warps, PREFETCH=config.prefetch, EARLY=early,
        num_warps=config.num_warps, enable_fp_fusion=False, launch_pdl=early, **limits,
    )  # fmt: skip
    if activation is None:
        _add_parts(target, None, out, parts, early=early)
        return out
    if parts == 1:
        return glu_forward(out, activation=activation, early=early)
    gated = out.new_empty(rows, out_features // 2)
    _add_parts(target, None, gated, parts, activation=activation, early=early)
    return gated


def _parts(in_features: int, config: LinearConfig) -> tuple[int, int]:
    """Blocks of a part, and how many parts that makes."""
    blocks = in_features // BLOCK
    blocks_per_part = ceil_div(blocks, config.parts)
    if config.kernel == "registers":
        blocks_per_part = ceil_div(blocks_per_part, BLOCKS_OF_STEP) * BLOCKS_OF_STEP
    return blocks_per_part, ceil_div(blocks, blocks_per_part)


def _target(out: Tensor, parts: int) -> Tensor:
    """Where a kernel writes: the result, or a workspace of the sums of each part."""
    return out if parts == 1 else torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)


def _add_parts(
    target: Tensor, bias: Tensor | None, out: Tensor, parts: int, *,
    activation: Activation | None = None, early: bool = False,
) -> None:  # fmt: skip
    """Make the result of a workspace, with an activation that of a gated unit; nothing if it is there already."""
    rows, out_features = out.shape
    if parts > 1:
        nf4_linear_reduce_kernel[(ceil_div(out_features, REDUCE_COLUMNS), rows)](
            target, bias, out, out.stride(0), rows, out_features, parts,
            PARTS=triton.next_power_of_2(parts), HAS_BIAS=bias is not None, ACTIVATION=activation,
            COLUMNS=REDUCE_COLUMNS, EARLY=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip


def _launch_table(
    x: Tensor, weight: Nf4Tensor, lora_x: Tensor | None, lora_B: Tensor | None, bias: Tensor | None,
    out: Tensor, target: Tensor, config: LinearConfig, blocks_per_part: int, parts: int,
) -> None:  # fmt: skip
    rows, (out_features, in_features) = x.shape[0], weight.shape
    rank = 0 if lora_B is None else lora_B.shape[1]
    operands = (weight.packed, *absmax_arguments(weight), nf4_code(x.device), lora_x, lora_B, bias, target)
    tiles = ceil_div(out_features, config.block_n)
    constants = {
        "NESTED": weight.is_nested,
        "HAS_LORA": lora_B is not None,
        "HAS_BIAS": bias is not None,
        "IN_PARTS": parts > 1,
        "BLOCK_N": config.block_n,
        "STEP": config.step,
        "DECODE": config.decode,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,
    }
    if config.block_m == 1:
        assert rows == 1, f"the kernel for a single row was asked to multiply {rows}"
        nf4_linear_one_row_kernel[(tiles, 1, parts)](
            x, *operands, out.stride(0), out_features, in_features, rank, blocks_per_part,
            BLOCK_R=max(16, triton.next_power_of_2(rank)), **constants,
        )  # fmt: skip
        return
    nf4_linear_kernel[(tiles, ceil_div(rows, config.block_m), parts)](
        x, *operands, x.stride(0), 0 if lora_x is None else lora_x.stride(0), out.stride(0),
        rows, out_features, in_features, rank, blocks_per_part,
        BLOCK_M=config.block_m, BLOCK_R=_rank_step(rank), **constants,
    )  # fmt: skip


def _rank_step(rank: int) -> int:
    """Columns of the LoRA product in one step: tl.dot wants at least 16, and longer ranks are walked in steps of 64."""
    return max(16, min(64, triton.next_power_of_2(rank)))
