"""What an NF4 weight is: the stored parts, their layout and the two code tables.

A weight W [N, K] is flattened row by row and cut into blocks of 64 values; only the last block may be shorter.
    absmax[b] = max |W| over block b
    W_hat     = dtype(NF4_CODE[q] * absmax[b]),   q the code whose value is nearest to W / absmax[b]
Double quantisation stores absmax itself in 8 bits, in blocks of 256:
    absmax[b] = nested_code[u[b]] * nested_absmax[b // 256] + nested_offset,   two roundings, no fused multiply-add
Codes, order and every rounding are those of bitsandbytes, so that checkpoints move both ways without loss.

Sources: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314; Dettmers et al. 2022 (the 8-bit map), arXiv:2110.02861.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
"""Weight values that share one absmax."""
NESTED_BLOCK = 256
"""absmax values that share one nested_absmax."""

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What can be quantised, and what NF4 expands to."""

NF4_CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values, each exact in float32, in ascending order."""


@dataclass(frozen=True)
class Nf4Tensor:
    """A frozen weight [N, K] in NF4, in the layout that bitsandbytes stores.

    Attributes:
        packed: [ceil(N * K / 2)] uint8, row-major; the high nibble holds the value of even index.
        absmax: [blocks] uint8 with double quantisation, else float32; blocks = ceil(N * K / 64).
        nested_absmax: [ceil(blocks / 256)] float32, or None without double quantisation.
        nested_offset: [] float32, the mean of the float32 absmax, or None.
        nested_code: [256] float32, what each uint8 in absmax stands for, or None.
        shape: (N, K), out_features and in_features.
        decoded: [N, K] contiguous, the same weight expanded once and kept, for whoever multiplies in its dtype; or
            None. It is no part of what is stored: the bits above stay the weight, and readers may ignore it.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_code: Tensor | None
    shape: tuple[int, int]
    decoded: Tensor | None = None

    def __post_init__(self) -> None:
        blocks = block_count(self.shape)
        if self.decoded is not None:
            _require_copy(self.decoded, self.shape, self.packed.device)
        _require("packed", self.packed, (-(-self.shape[0] * self.shape[1] // 2),), torch.uint8)
        nested = (self.nested_absmax, self.nested_offset, self.nested_code)
        if self.nested_absmax is None or self.nested_offset is None or self.nested_code is None:
            if any(part is not None for part in nested):
                raise ValueError("NF4 double quantisation needs nested_absmax, nested_offset and nested_code together")
            _require("absmax", self.absmax, (blocks,), torch.float32)
            return
        _require("absmax", self.absmax, (blocks,), torch.uint8)
        _require("nested_absmax", self.nested_absmax, (-(-blocks // NESTED_BLOCK),), torch.float32)
        _require("nested_offset", self.nested_offset, (), torch.float32)
        _require("nested_code", self.nested_code, (256,), torch.float32)

    @property
    def is_nested(self) -> bool:
        """Whether absmax is itself quantised (double quantisation)."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together, without the decoded copy."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset, self.nested_code)
        return sum(part.nbytes for part in parts if part is not None)


def decoded_together(weights: Sequence[Nf4Tensor], dtype: torch.dtype) -> Tensor | None:
    """The kept copies of weights over one input as one matrix [sum N, K], without copying; None if that cannot be.

    It can if each weight has a copy in `dtype` and the copies are consecutive rows of one storage, in this order, as
    `layers.linear.keep_decoded_together` lays them. One weight alone only needs a copy.
    """
    first = weights[0].decoded
    if first is None or first.dtype != dtype or len(weights) == 1:
        return first if first is not None and first.dtype == dtype else None
    storage, end, rows = first.untyped_storage().data_ptr(), first.storage_offset(), 0
    for weight in weights:
        copy = weight.decoded
        if copy is None or copy.dtype != dtype or copy.storage_offset() != end or copy.shape[1] != first.shape[1]:
            return None
        if copy.untyped_storage().data_ptr() != storage:
            return None
        rows += copy.shape[0]
        end += copy.numel()
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def block_count(shape: tuple[int, int]) -> int:
    """Number of blocks of 64 values in a weight of this shape; the last may be partial."""
    return -(-shape[0] * shape[1] // BLOCK)


def nested_code(device: torch.device | str = "cpu") -> Tensor:
    """The signed 8-bit dynamic map, [256] float32 ascending: a tensor of the caller's own.

    Made once for each device and copied there, because a copy from the host would wait for all that a GPU has to do.

    Exponents 10^-6 to 1 each cover the decade below them; decade i has 2^i equal intervals, whose midpoints stand
    with both signs; 0 and 1 complete the 256.
    """
    return _shared_nested_code(torch.device(device)).clone()


@lru_cache(maxsize=16)
def _shared_nested_code(device: torch.device) -> Tensor:
    return torch.tensor(_nested_code_values(), dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def nf4_code(device: torch.device) -> Tensor:
    """NF4_CODE as a tensor, [16] float32, made once for each device and shared: do not write to it."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def check_quantizable(weight: Tensor) -> None:
    """Raise ValueError unless `weight` can be quantised: a non-empty matrix of float32, bfloat16 or float16."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"NF4 quantises float32, bfloat16 and float16, got {weight.dtype}; convert the weight first")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"NF4 quantises a non-empty matrix [out_features, in_features], got shape {tuple(weight.shape)}; "
            "leave this tensor unquantised"
        )


def check_dequantize_output(
    weight: Nf4Tensor, dtype: torch.dtype, out: Tensor | None, *, also: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """Where to dequantise into: `out` if it fits, or a new tensor.

    Raises: ValueError if `dtype` is neither a 16- or 32-bit float nor one of `also`, or if `out` does not fit.
    """
    return _check_output(weight.shape, weight.device, dtype, out, also)


def check_group_output(
    weights: Sequence[Nf4Tensor], dtype: torch.dtype, out: Tensor | None, *, also: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """As `check_dequantize_output`, for weights one below the other.

    Raises: ValueError also if the weights differ in width.
    """
    width = weights[0].shape[1]
    if any(weight.shape[1] != width for weight in weights):
        shapes = [weight.shape for weight in weights]
        raise ValueError(f"weights one below the other must have equal in_features, got {shapes}; expand each alone")
    shape = (sum(weight.shape[0] for weight in weights), width)
    return _check_output(shape, weights[0].device, dtype, out, also)


def _check_output(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype, out: Tensor | None, also: tuple[torch.dtype, ...]
) -> Tensor:
    if dtype not in WEIGHT_DTYPES and dtype not in also:
        raise ValueError(f"NF4 expands to float32, bfloat16 or float16, got {dtype}; convert the result instead")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out must be {dtype} of shape {shape} on {device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}; allocate it to match"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}; pass a slice of whole rows")
    return out


def check_linear(
    x: Tensor,
    weight: Nf4Tensor,
    lora_x: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    *,
    also: tuple[torch.dtype, ...] = (),
) -> Tensor:
    """Where x W^T + lora_x lora_B^T + bias goes: `out` if it fits, or a new tensor [M, N].

    Raises: ValueError if a shape or dtype does not fit, or if K is not divisible by 64.
    """
    out_features, in_features = weight.shape
    if in_features % BLOCK:
        raise ValueError(
            f"nf4_linear needs in_features divisible by {BLOCK}, got {in_features}; dequantise and multiply instead"
        )
    if x.dtype not in WEIGHT_DTYPES + also:
        raise ValueError(f"nf4_linear takes float32, bfloat16 or float16, got {x.dtype}; convert x first")
    rows = x.shape[0]
    _require_like("x", x, (rows, in_features), x)
    if (lora_x is None) != (lora_B is None):
        raise ValueError("nf4_linear needs lora_x and lora_B together, got only one of them; pass both or neither")
    if lora_x is not None and lora_B is not None:
        _require_like("lora_B", lora_B, (out_features, lora_B.shape[-1]), x)
        _require_like("lora_x", lora_x, (rows, lora_B.shape[-1]), x)
    if bias is not None:
        _require_like("bias", bias, (out_features,), x)
    if out is None:
        return torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    _require_like("out", out, (rows, out_features), x)
    if out.stride(1) != 1:
        raise ValueError(f"out must have dense rows, got strides {out.stride()}; pass a slice of rows or columns")
    return out


def _require_like(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise ValueError if an operand of nf4_linear does not have this shape and the dtype of x."""
    if tuple(tensor.shape) != shape or tensor.dtype != x.dtype:
        raise ValueError(
            f"{name} must be {x.dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}; "
            "all operands share the dtype of x"
        )


@lru_cache(maxsize=1)
def _nested_code_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        # A negative integer power is a Python float: the product is rounded once, to float32.
        magnitudes = (10 ** (i - 6) * midpoints).tolist()
        values += magnitudes + [-m for m in magnitudes]
    return tuple(sorted(values))


def _require_copy(copy: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError if a decoded copy is not the weight's shape in memory order, on its device."""
    if tuple(copy.shape) != shape or not copy.is_floating_point() or copy.device != device or not copy.is_contiguous():
        raise ValueError(
            f"NF4 decoded must be a contiguous floating-point tensor of shape {shape} on {device}, got {copy.dtype} of "
            f"shape {tuple(copy.shape)} with strides {copy.stride()} on {copy.device}; decode the weight again"
        )


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError if a stored part does not have the shape and dtype that the weight's shape implies."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"NF4 {name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}; "
            "the parts do not belong to one weight"
        )
