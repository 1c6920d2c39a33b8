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

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import triton
from torch import Tensor

from slothcore.kernels.launch import ceil_div, with_contiguous_rows
from slothcore.kernels.nf4 import Decode, absmax_arguments
from slothcore.kernels.nf4_gemm_permute import nf4_linear_registers_kernel, nf4_linear_shared_kernel
from slothcore.kernels.nf4_gemm_table import nf4_linear_kernel, nf4_linear_one_row_kernel, nf4_linear_reduce_kernel
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor, check_linear, nf4_code

REDUCE_COLUMNS = 256
STEP_OF_REGISTERS = 4
"""Blocks in a step of the kernel that decodes into registers: one for each of the four lanes that share a row."""


@dataclass(frozen=True)
class LinearConfig:
    """How nf4_linear is launched."""

    block_m: int
    """Tokens of a tile, times slices at least 16; 1 chooses the table kernel for a single row."""
    block_n: int
    """Weight rows of a tile; for "registers", times slices, a multiple of 16 * num_warps."""
    parts: int
    """Parts into which the columns are cut; fewer if there are not as many blocks of 64."""
    step: int = 1
    """Blocks of 64 columns in one turn of the loop; always 4 for "registers"."""
    num_warps: int = 4
    num_stages: int = 4
    kernel: Literal["table", "registers", "shared"] = "table"
    """Decode by a table, or by permutes into registers or shared memory."""
    decode: Decode = "gather"
    """Which table."""
    slices: int = 1
    """Slices of its columns that a program of "registers" sums side by side, for few tokens."""


@dataclass(frozen=True)
class _Rule:
    """The tile for up to `rows` rows, and how far K is split: until there are `programs`, or parts of `columns`."""

    rows: int
    tile: LinearConfig
    programs: int
    columns: int


PERMUTE_RULES = (
    _Rule(4, LinearConfig(4, 16, 1, 4, num_stages=3, kernel="registers", slices=4), programs=256, columns=2048),
    _Rule(8, LinearConfig(8, 32, 1, 4, num_stages=3, kernel="registers", slices=2), programs=256, columns=2048),
    _Rule(16, LinearConfig(16, 64, 1, 4, num_stages=3, kernel="registers"), programs=528, columns=512),
    _Rule(32, LinearConfig(32, 64, 1, 4, num_stages=3, kernel="registers"), programs=528, columns=512),
    _Rule(64, LinearConfig(64, 128, 1, 2, num_stages=2, kernel="shared"), programs=396, columns=512),
    _Rule(128, LinearConfig(128, 128, 1, 2, num_warps=8, num_stages=2, kernel="shared"), programs=264, columns=1024),
    _Rule(2**31, LinearConfig(256, 128, 1, 2, num_warps=8, num_stages=2, kernel="shared"), programs=132, columns=1024),
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
    permute: whether the kernels that decode by permutes can be used.
    """
    assert itemsize == 2 or not permute, "permutes give 16-bit weights"
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
    """Whether the kernels that decode by permutes take these operands: they copy 16 bytes at a time, and are
    laid out for the tensor cores of Hopper.
    """
    return x.is_cuda and x.itemsize == 2 and _is_hopper(x.device) and weight.packed.data_ptr() % 16 == 0


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


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
    blocks = in_features // BLOCK
    blocks_per_part = ceil_div(blocks, config.parts)
    if config.kernel != "table":
        blocks_per_part = ceil_div(blocks_per_part, config.step) * config.step
    parts = ceil_div(blocks, blocks_per_part)
    target = out if parts == 1 else torch.empty(parts, rows, out_features, dtype=torch.float32, device=x.device)
    launch = _launch_table if config.kernel == "table" else _launch_permute
    launch(x, weight, lora_x, lora_B, bias, out, target, config, blocks_per_part, parts)
    if parts > 1:
        nf4_linear_reduce_kernel[(ceil_div(out_features, REDUCE_COLUMNS), rows)](
            target, bias, out, out.stride(0), rows, out_features, parts,
            PARTS=triton.next_power_of_2(parts), HAS_BIAS=bias is not None, COLUMNS=REDUCE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


def _launch_permute(
    x: Tensor, weight: Nf4Tensor, lora_x: Tensor | None, lora_B: Tensor | None, bias: Tensor | None,
    out: Tensor, target: Tensor, config: LinearConfig, blocks_per_part: int, parts: int,
) -> None:  # fmt: skip
    rows, (out_features, in_features) = x.shape[0], weight.shape
    rank = 0 if lora_B is None else lora_B.shape[1]
    in_registers = config.kernel == "registers"
    kernel, constants = nf4_linear_shared_kernel, {"STEP": config.step}
    if in_registers:
        assert config.step == STEP_OF_REGISTERS, f"four lanes share a row, not {config.step}"
        rows_of_product = config.block_n * config.slices
        assert rows_of_product % (16 * config.num_warps) == 0, f"{rows_of_product} rows are no whole fragments"
        kernel, constants = nf4_linear_registers_kernel, {"WARPS": config.num_warps, "SLICES": config.slices}
    grid = (ceil_div(out_features, config.block_n), ceil_div(rows, config.block_m), parts)
    kernel[grid](
        x, weight.packed.view(torch.int32), *absmax_arguments(weight), lora_x, lora_B, bias, target,
        x.stride(0), 0 if lora_x is None else lora_x.stride(0), out.stride(0),
        rows, out_features, in_features, rank, blocks_per_part,
        NESTED=weight.is_nested, HAS_LORA=lora_B is not None, HAS_BIAS=bias is not None, IN_PARTS=parts > 1,
        ON_GPU=x.is_cuda,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=_rank_step(rank), STAGES=config.num_stages,
        num_warps=config.num_warps, enable_fp_fusion=False, **constants,
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
