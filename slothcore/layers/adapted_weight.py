"""What every layer with LoRA has: a base weight, dense or NF4, trainable or frozen, and a pair of factors beside it."""

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from slothcore.kernels.nf4_experts import Nf4Experts
from slothcore.kernels.nf4_tensor import Nf4Tensor

NF4_BUFFERS = ("weight", "weight_absmax", "weight_nested_absmax", "weight_nested_offset", "weight_nested_code")
"""Where an NF4 weight lies in a layer: its packed codes and what `Nf4Tensor` calls absmax, nested_absmax, ..."""

Nf4 = TypeVar("Nf4", Nf4Tensor, Nf4Experts)


class AdaptedWeight(nn.Module, Generic[Nf4]):
    """A weight with an optional LoRA term; what is done with it is the subclass's.

    Attributes:
        weight: parameter whose `requires_grad` says if it trains; or a uint8 buffer of NF4 codes.
        lora_A, lora_B: parameters, or None.
        lora_scaling: factor of the LoRA term.
        lora_dropout: probability that the LoRA term does not see an element of its input, in training mode.
    """

    nf4_kind: ClassVar[type[Any]]
    """The dataclass in which the NF4 parts are handed to kernels."""

    weight: Tensor
    weight_absmax: Tensor
    weight_nested_absmax: Tensor | None
    weight_nested_offset: Tensor | None
    weight_nested_code: Tensor | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight_shape = tuple(weight.shape)
        self.weight = nn.Parameter(weight)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scaling = 1.0
        self.lora_dropout = 0.0
        self._nf4: Nf4 | None = None

    @property
    def is_nf4(self) -> bool:
        return "weight" in self._buffers

    @property
    def is_frozen(self) -> bool:
        """Whether the base weight gets no gradient."""
        return self.is_nf4 or not self.weight.requires_grad

    def base_weight(self) -> Tensor | Nf4:
        """The weight without LoRA: the dense parameter or the NF4 parts, with their decoded copy if one is kept."""
        if not self.is_nf4:
            return self.weight
        if self._nf4 is None or any(
            part is not self._buffers[name] for part, name in zip(nf4_parts(self._nf4), NF4_BUFFERS, strict=True)
        ):
            # Buffers were replaced since the last call. A decoded copy was of the old ones and goes with them.
            self._nf4 = self.nf4_kind(
                packed=self.weight,
                absmax=self.weight_absmax,
                nested_absmax=self.weight_nested_absmax,
                nested_offset=self.weight_nested_offset,
                nested_code=self.weight_nested_code,
                shape=self.weight_shape,
            )
        assert self._nf4 is not None
        return self._nf4

    def detach_lora(self) -> None:
        """Remove the LoRA term; the base weight stays as it is."""
        self.lora_A = self.lora_B = None
        self.lora_scaling, self.lora_dropout = 1.0, 0.0

    def _set_lora(self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {dropout}")
        self.lora_A = lora_A if isinstance(lora_A, nn.Parameter) else nn.Parameter(lora_A)
        self.lora_B = lora_B if isinstance(lora_B, nn.Parameter) else nn.Parameter(lora_B)
        self.lora_scaling = float(scaling)
        self.lora_dropout = float(dropout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedWeight[Nf4]":
        """Move or cast as any module does, but never cast an NF4 weight's statistics: float32 is their format."""
        if not self.is_nf4:
            return super()._apply(fn, recurse)
        # It would keep the parts in memory that are replaced below, and a decoded copy of the dtype before.
        self._nf4 = None
        statistics = {name: self._buffers.pop(name) for name in NF4_BUFFERS[1:]}
        try:
            super()._apply(fn, recurse)
        finally:
            for name, value in statistics.items():
                self._buffers[name] = None if value is None else _move_without_cast(fn, value)
        return self

    def _clear_weight(self) -> None:
        self._parameters.pop("weight", None)
        for name in NF4_BUFFERS:
            self._buffers.pop(name, None)
        self._nf4 = None


def nf4_parts(weight: Nf4Tensor | Nf4Experts) -> tuple[Tensor | None, ...]:
    """The tensors of an NF4 weight in the order of `NF4_BUFFERS`."""
    return weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset, weight.nested_code


def _move_without_cast(fn: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """`fn(value)` if that keeps the dtype, else the value itself on the device that `fn` chose."""
    moved = fn(value)
    return moved if moved.dtype == value.dtype else value.to(moved.device)
