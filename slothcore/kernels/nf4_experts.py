"""The NF4 weights of all experts of one projection, stacked, and their expansion to dense in one launch.

Every expert is quantised as a tensor of its own (blocks never cross from one to the next, each has its own offset and
8-bit map), so that experts move to and from checkpoints bit for bit. Layout and equations of one are in nf4_tensor.py.

Shapes    W [E, N, K]; packed [E, ceil(N K / 2)]; absmax [E, B]; nested_absmax [E, ceil(B / 256)]; nested_offset [E];
          nested_code [E, 256].
          E = experts, N = out_features, K = in_features, B = ceil(N K / 64), the blocks of one expert.
Rounding  as nf4.py: launches forbid the compiler to fuse a product with a sum (enable_fp_fusion=False).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.launch import ceil_div
from slothcore.kernels.nf4 import DEFAULT_CONFIG, decode_nf4, load_absmax
from slothcore.kernels.nf4_tensor import BLOCK, WEIGHT_DTYPES, Nf4Tensor, block_count, nf4_code


@dataclass(frozen=True)
class Nf4Experts:
    """Frozen weights [E, N, K] in NF4, each expert in the layout that bitsandbytes stores.

    Attributes:
        packed: [E, ceil(N * K / 2)] uint8.
        absmax: [E, blocks] uint8 with double quantisation, else float32; blocks = ceil(N * K / 64).
        nested_absmax: [E, ceil(blocks / 256)] float32, or None without double quantisation.
        nested_offset: [E] float32, or None.
        nested_code: [E, 256] float32, or None.
        shape: (E, N, K).
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_code: Tensor | None
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        experts, out_features, in_features = self.shape
        blocks = block_count((out_features, in_features))
        parts = [
            ("packed", self.packed, (experts, -(-out_features * in_features // 2))),
            ("absmax", self.absmax, (experts, blocks)),
        ]
        if self.nested_absmax is not None and self.nested_offset is not None and self.nested_code is not None:
            parts.append(("nested_absmax", self.nested_absmax, (experts, -(-blocks // 256))))
            parts.append(("nested_offset", self.nested_offset, (experts,)))
            parts.append(("nested_code", self.nested_code, (experts, 256)))
        elif not (self.nested_absmax is None and self.nested_offset is None and self.nested_code is None):
            raise ValueError("NF4 double quantisation needs nested_absmax, nested_offset and nested_code together")
        for name, part, shape in parts:
            if tuple(part.shape) != shape or not part.is_contiguous():
                raise ValueError(
                    f"NF4 {name} of experts {self.shape} must be contiguous of shape {shape}, got shape "
                    f"{tuple(part.shape)} with strides {part.stride()}; stack the experts with Nf4Experts.stack"
                )

    @classmethod
    def stack(cls, experts: Sequence[Nf4Tensor]) -> "Nf4Experts":
        """Copy the parts of one projection's experts into one stack.

        Raises: ValueError unless there is at least one and all agree in shape and double quantisation.
        """
        if not experts:
            raise ValueError("a stack needs at least one expert; got none")
        first = experts[0]
        for number, expert in enumerate(experts):
            if (expert.shape, expert.is_nested) != (first.shape, first.is_nested):
                raise ValueError(
                    "experts of one projection must agree in shape and double quantisation; expert 0 has "
                    f"{first.shape}, {first.is_nested}, expert {number} has {expert.shape}, {expert.is_nested}"
                )
        return cls(
            packed=torch.stack([e.packed for e in experts]),
            absmax=torch.stack([e.absmax for e in experts]),
            nested_absmax=_stacked([e.nested_absmax for e in experts]),
            nested_offset=_stacked([e.nested_offset for e in experts]),
            nested_code=_stacked([e.nested_code for e in experts]),
            shape=(len(experts), *first.shape),
        )

    def expert(self, index: int) -> Nf4Tensor:
        """One expert's weight; its parts are views of the stack."""
        return Nf4Tensor(
            packed=self.packed[index],
            absmax=self.absmax[index],
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax[index],
            nested_offset=None if self.nested_offset is None else self.nested_offset[index],
            nested_code=None if self.nested_code is None else self.nested_code[index],
            shape=self.shape[1:],
        )

    @property
    def is_nested(self) -> bool:
        """Whether absmax is itself quantised (double quantisation)."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset, self.nested_code)
        return sum(part.nbytes for part in parts if part is not None)


@triton.jit
def nf4_experts_dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr, out_ptr,
    total, expert_bytes, expert_blocks,
    NESTED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """This program expands BLOCKS blocks of one expert, whose `total` values lie in `expert_bytes` bytes."""
    programs = tl.cdiv(expert_blocks, BLOCKS)
    expert = (tl.program_id(0) // programs).to(tl.int64)
    block = (tl.program_id(0) % programs) * BLOCKS + tl.arange(0, BLOCKS)
    in_weight = block < expert_blocks
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    index = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    # A mask that is constant along a block keeps the loads and stores wide.
    byte_mask = in_weight[:, None] if WHOLE_BLOCKS else byte < expert_bytes
    value_mask = in_weight[:, None] if WHOLE_BLOCKS else index < total

    packed = tl.load(packed_ptr + expert * expert_bytes + byte, mask=byte_mask, other=0)
    absmax = load_expert_absmax(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, expert_blocks, block, in_weight,
        NESTED,
    )  # fmt: skip
    code = tl.reshape(tl.join(packed >> 4, packed & 15), [BLOCKS, 64])
    values = decode_nf4(code, table_ptr, DECODE) * absmax[:, None]
    tl.store(out_ptr + expert * total + index, values.to(out_ptr.dtype.element_ty), mask=value_mask)


@triton.jit
def load_expert_absmax(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, expert_blocks, block, mask,
    NESTED: tl.constexpr,
):  # fmt: skip
    """The float32 absmax of a tile of one expert's blocks. expert: int64; expert_blocks: blocks of each expert."""
    absmax_ptr += expert * expert_blocks
    if NESTED:
        nested_absmax_ptr += expert * tl.cdiv(expert_blocks, 256)
        nested_offset_ptr += expert
        nested_code_ptr += expert * 256
    return load_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block, mask, NESTED)


def nf4_experts_dequantize(experts: Nf4Experts, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Expand the NF4 weights of all experts in one launch; bits as `nf4_dequantize` of each.

    Args:
        experts: NF4 [E, N, K].
        dtype: float32, bfloat16 or float16: each value is the float32 product rounded to it.
        out: where to write, [E, N, K] contiguous of `dtype`.
    Returns: `out`, or a new tensor [E, N, K].
    Raises: ValueError if `out` does not fit or `dtype` is not one of these.
    """
    out = check_experts_output(experts, dtype, out)
    number, out_features, in_features = experts.shape
    total, blocks, config = out_features * in_features, block_count(experts.shape[1:]), DEFAULT_CONFIG
    nf4_experts_dequantize_kernel[(number * ceil_div(blocks, config.blocks),)](
        experts.packed, *expert_absmax_arguments(experts), nf4_code(out.device), out,
        total, experts.packed.shape[1], blocks,
        NESTED=experts.is_nested, WHOLE_BLOCKS=total % BLOCK == 0,
        BLOCKS=config.blocks, DECODE=config.decode, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def check_experts_output(
    experts: Nf4Experts, dtype: torch.dtype, out: Tensor | None, *, also: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """Where to expand into: `out` if it fits, or a new tensor.

    Raises: ValueError if `dtype` is neither a 16- or 32-bit float nor one of `also`, or if `out` does not fit.
    """
    if dtype not in WEIGHT_DTYPES + also:
        raise ValueError(f"NF4 expands to float32, bfloat16 or float16, got {dtype}; convert the result instead")
    if out is None:
        return torch.empty(experts.shape, dtype=dtype, device=experts.device)
    if tuple(out.shape) != experts.shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} of shape {experts.shape}, got {out.dtype} of shape {tuple(out.shape)} "
            f"with strides {out.stride()}; allocate it to match"
        )
    return out


def expert_absmax_arguments(experts: Nf4Experts) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The pointers that `load_expert_absmax` takes, in its order."""
    return experts.absmax, experts.nested_absmax, experts.nested_offset, experts.nested_code


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
