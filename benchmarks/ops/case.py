"""What one measured operation is, and NF4 weights whose bits both sides share."""

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes.functional as bnb
from torch import Tensor

from slothcore.kernels.nf4_tensor import Nf4Tensor

# Two roundings to bfloat16 along different ways differ by up to about 0.5% in norm; a mistake differs by far more.
TOLERANCE = 0.02


@dataclass(frozen=True)
class OpCase:
    """One operation at one shape.

    Attributes:
        op, shape: names for the table.
        run: what is timed.
        check: pairs of our result and the expected one, from fresh calls.
        peer_name, peer: what is timed beside it.
        bytes: least traffic with the memory. flops: least arithmetic. The larger floor of the two counts.
        tolerance: largest relative error; 0 asks for equal bits.
    """

    op: str
    shape: str
    run: Callable[[], object]
    check: Callable[[], list[tuple[Tensor, Tensor]]]
    peer_name: str
    peer: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    tolerance: float = TOLERANCE


def quantize_by_bitsandbytes(weight: Tensor) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def nf4_tensor(packed: Tensor, state: bnb.QuantState) -> Nf4Tensor:
    """bitsandbytes' double-quantised weight in slothcore's terms."""
    return Nf4Tensor(
        packed=packed.flatten(),
        absmax=state.absmax,
        nested_absmax=state.state2.absmax,
        nested_offset=state.offset,
        nested_code=state.state2.code,
        shape=tuple(state.shape),
    )
