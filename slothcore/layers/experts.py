"""One linear map for each expert, stacked: dense or NF4, trainable or frozen, with or without LoRA.

    E  experts    r  rank of LoRA

In memory all experts of one projection are one tensor [E, out, in], which the grouped products read. On disk each has a
name of its own, and so it has in `state_dict`: the stack at `...experts.gate_proj` holds the weight that is written as
`...experts.3.gate_proj.weight`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slothcore.autograd.experts import ExpertProjection
from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_experts import Nf4Experts
from slothcore.kernels.nf4_tensor import Nf4Tensor
from slothcore.layers.adapted_weight import NF4_BUFFERS, AdaptedWeight, nf4_parts


class ExpertLinear(AdaptedWeight[Nf4Experts]):
    """y_e = x_e W_e^T + lora_scaling * dropout(x_e) lora_A_e^T lora_B_e^T, for the rows x_e of each expert e.

    Attributes:
        weight: [E, out, in] parameter whose `requires_grad` says if it trains; or a uint8 buffer of NF4 codes, each
            expert quantised alone.
        lora_A, lora_B: [E, r, in] and [E, out, r] parameters, or None.
        lora_scaling: factor of the LoRA terms.
        lora_dropout: probability that a LoRA term does not see an element of its input, in training mode.
    """

    nf4_kind = Nf4Experts

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """The weight is uninitialised: a checkpoint or the model's initialisation fills it."""
        super().__init__(torch.empty(num_experts, out_features, in_features, dtype=dtype, device=device))
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features

    def dequantized_expert(self, index: int, dtype: torch.dtype) -> Tensor:
        """The base weight of one expert as a dense [out, in] in `dtype`, without LoRA and outside autograd."""
        weight = self.base_weight()
        if isinstance(weight, Tensor):
            return weight[index].detach().to(dtype)
        ops = nf4 if self.weight.is_cuda else nf4_eager
        return ops.nf4_dequantize(weight.expert(index), dtype=dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The base weights of all experts as a dense [E, out, in] in `dtype`."""
        return torch.stack([self.dequantized_expert(index, dtype) for index in range(self.num_experts)])

    def place_expert(self, index: int, weight: Tensor | Nf4Tensor, *, requires_grad: bool = False) -> None:
        """Put the weight of one expert into the stack, which the first one allocates, dense or NF4 as it is.

        Args:
            weight: [out, in] on the final device. All experts must be of one kind and dtype.
            requires_grad: whether the stack of a dense weight trains.
        Raises: ValueError if the shape does not fit, or the experts that are there already are stored otherwise.
        """
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise ValueError(f"an expert's weight must have shape {expected} in this layer, got {tuple(weight.shape)}")
        if isinstance(weight, Tensor):
            if self.is_nf4 or (self.weight.is_meta and not weight.is_meta):
                stack = torch.empty(self.num_experts, *expected, dtype=weight.dtype, device=weight.device)
                self._clear_weight()
                self.weight = nn.Parameter(stack, requires_grad=requires_grad)
            self.weight.requires_grad_(requires_grad)
            self.weight.data[index].copy_(weight)
            return
        parts = dict(zip(NF4_BUFFERS, nf4_parts(weight), strict=True))
        if not self.is_nf4:
            self._clear_weight()
            for name, part in parts.items():
                self.register_buffer(name, None if part is None else part.new_empty(self.num_experts, *part.shape))
        if not all(_fits(part, self._buffers[name]) for name, part in parts.items()):
            raise ValueError(
                f"expert {index} is quantised in another way than the experts before it; quantise all of them alike"
            )
        for name, part in parts.items():
            place = self._buffers[name]
            if part is not None and place is not None:
                place[index].copy_(part)

    def attach_lora(self, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float = 0.0) -> None:
        """Add a LoRA term to every expert, replacing any earlier one; plain tensors become trainable parameters.

        Args:
            lora_A: [E, r, in].
            lora_B: [E, out, r].
            scaling: factor of the terms.
            dropout: probability, at least 0 and below 1.
        Raises: ValueError if a shape or the probability does not fit.
        """
        shape_A, shape_B = self.factor_shapes(lora_A.shape[1] if lora_A.dim() == 3 else 0)
        if tuple(lora_A.shape) != shape_A or tuple(lora_B.shape) != shape_B:
            raise ValueError(
                f"lora_A and lora_B must have shapes {shape_A} and {shape_B} in this layer, "
                f"got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            )
        self._set_lora(lora_A, lora_B, scaling, dropout)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B of all experts."""
        return (self.num_experts, rank, self.in_features), (self.num_experts, self.out_features, rank)

    def delta_expert(self, index: int) -> Tensor:
        """What LoRA adds to one expert's weight: lora_scaling * lora_B lora_A, [out, in] float32, outside autograd.

        Raises: ValueError without LoRA.
        """
        if self.lora_A is None or self.lora_B is None:
            raise ValueError("these experts have no LoRA term; call attach_lora first")
        return self.lora_scaling * (self.lora_B[index].detach().float() @ self.lora_A[index].detach().float())

    def delta_weight(self) -> Tensor:
        """What LoRA adds to the weights of all experts, [E, out, in] float32. Raises: ValueError without LoRA."""
        return torch.stack([self.delta_expert(index) for index in range(self.num_experts)])

    def projection(self) -> ExpertProjection:
        """What the fused Function needs of this layer, with the dropout of the current mode."""
        return ExpertProjection(
            weight=self.base_weight(),
            lora_A=self._parameters["lora_A"],
            lora_B=self._parameters["lora_B"],
            scaling=self.lora_scaling,
            dropout=self.lora_dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        rank = None if self.lora_A is None else self.lora_A.shape[1]
        kind = "nf4" if self.is_nf4 else str(self.weight.dtype).removeprefix("torch.")
        return f"{self.num_experts} x ({self.in_features}, {self.out_features}), {kind}, lora_rank={rank}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, index, tensor in self._entries(keep_vars=keep_vars):
            destination[f"{prefix}{index}.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = set()
        for name, index, tensor in self._entries():
            key, name_on_disk = f"{prefix}{index}.{name}", f"{expert_path(prefix[:-1], index)}.{name}"
            wanted.add(key)
            if key not in state_dict:
                missing_keys.append(name_on_disk)
            elif state_dict[key].shape != tensor.shape:
                error_msgs.append(
                    f"{name_on_disk} has the shape {tuple(state_dict[key].shape)}, "
                    f"but this model needs {tuple(tensor.shape)}"
                )
            else:
                tensor.copy_(state_dict[key])
        for key in state_dict.keys() - wanted if strict else ():
            if key.startswith(prefix):
                number, _, name = key.removeprefix(prefix).partition(".")
                unexpected_keys.append(f"{expert_path(prefix[:-1], number)}.{name}")

    def _entries(self, *, keep_vars: bool = False) -> Iterator[tuple[str, int, Tensor]]:
        """Name, expert and tensor of everything that this layer holds; the tensors are windows into the stacks."""
        for index in range(self.num_experts):
            for name, stack in (*self._parameters.items(), *self._buffers.items()):
                if stack is not None:
                    tensor = stack if keep_vars else stack.detach()
                    yield name, index, tensor[index]


def expert_path(stack: str, index: int | str) -> str:
    """Where one expert of a stack lies on disk: `experts.gate_proj` and 3 give `experts.3.gate_proj`."""
    head, _, name = stack.rpartition(".")
    return ".".join(part for part in (head, str(index), name) if part)


def stack_path(path: str) -> tuple[str, int] | None:
    """The reverse: `experts.3.gate_proj` gives `experts.gate_proj` and 3; None if the path is not one expert's."""
    head, dot, name = path.rpartition(".")
    parent, _, index = head.rpartition(".")
    if not dot or not index.isdecimal() or parent.rpartition(".")[2] != "experts":
        return None
    return f"{parent}.{name}", int(index)


def _fits(part: Tensor | None, stack: Tensor | None) -> bool:
    """Whether one expert's part of an NF4 weight can go into the stack."""
    if part is None or stack is None:
        return part is stack
    return part.dtype == stack.dtype and part.shape == stack.shape[1:]
