"""A linear layer whose weight is dense or NF4, trainable or frozen, with or without LoRA.

    y = x W^T + bias + lora_scaling * dropout(x) lora_A^T lora_B^T

and with `lora_magnitude_vector` the rows of W + lora_scaling * lora_B lora_A have these lengths: `autograd/dora.py`.

Which code computes it follows from the layer's state alone: `F.linear` for a dense weight without LoRA, the fused
Functions of `autograd.lora` for a frozen weight with LoRA or in NF4, and plain torch for LoRA beside a weight that
trains too.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slothcore.autograd.dora_projection import row_norms
from slothcore.autograd.glu import glu
from slothcore.autograd.lora import Projection, lora_fused, lora_linear, lora_mlp
from slothcore.autograd.rms_norm import Normed, is_decoding
from slothcore.kernels import dense_few, nf4, nf4_eager
from slothcore.kernels.glu import Activation
from slothcore.kernels.nf4_tensor import Nf4Tensor
from slothcore.layers.adapted_weight import NF4_BUFFERS, AdaptedWeight, nf4_parts


class Linear(AdaptedWeight[Nf4Tensor]):
    """y = x W^T + bias, with an optional LoRA term.

    Attributes:
        weight: [out, in] parameter whose `requires_grad` says if it trains; after `set_nf4` a uint8 buffer.
        bias: [out] parameter or None.
        lora_A, lora_B: [r, in] and [out, r] parameters, or None.
        lora_scaling: factor of the LoRA term.
        lora_dropout: probability that the LoRA term does not see an element of x, in training mode.
        lora_magnitude_vector: [out] float32 parameter of DoRA, or None.
        known_norms: [out] float32, the lengths of the rows without it, where somebody vouches that the factors stay as
            they are; None: each pass computes them. See `known_norms.py`.
    """

    nf4_kind = Nf4Tensor
    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """The weight and the bias are uninitialised: a checkpoint or the model's initialisation fills them."""
        super().__init__(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("lora_magnitude_vector", None)
        self.known_norms: Tensor | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The base weight as a dense [out, in] in `dtype`, without LoRA and outside autograd."""
        weight = self.base_weight()
        if isinstance(weight, Tensor):
            return weight.detach().to(dtype)
        if weight.decoded is not None and weight.decoded.dtype == dtype:
            # Not the copy itself: it shares its storage with the other maps of its group.
            return weight.decoded.clone()
        ops = nf4 if self.weight.is_cuda else nf4_eager
        return ops.nf4_dequantize(weight, dtype=dtype)

    def keep_decoded(self, dtype: torch.dtype) -> None:
        """Expand the NF4 weight once and keep it beside the codes, so that products in `dtype` need not.

        The values are those that every product decodes anyway: results do not change. The copy is no part of the state
        dict, never trains, and goes when the weight is replaced, loaded or moved.

        Raises: ValueError if the weight is dense.
        """
        keep_decoded_together([self], dtype)

    def has_decoded(self, dtype: torch.dtype) -> bool:
        """Whether a decoded copy in `dtype` is kept."""
        weight = self.base_weight()
        return isinstance(weight, Nf4Tensor) and weight.decoded is not None and weight.decoded.dtype == dtype

    def drop_decoded(self) -> None:
        """Give the memory of the decoded copy back, once nothing else holds it; without a copy nothing happens."""
        # A new object tells whoever has captured the copy's address; so it is made for a reason only.
        if self._nf4 is not None and self._nf4.decoded is not None:
            self._nf4 = replace(self._nf4, decoded=None)

    def set_nf4(self, weight: Nf4Tensor) -> None:
        """Replace the base weight by a frozen NF4 one, kept as buffers.

        Raises: ValueError if its shape is not (out_features, in_features).
        """
        self._require_shape("NF4 weight", weight.shape, (self.out_features, self.in_features))
        self._clear_weight()
        for name, part in zip(NF4_BUFFERS, nf4_parts(weight), strict=True):
            self.register_buffer(name, part)

    def set_dense(self, weight: Tensor) -> None:
        """Replace the base weight by a dense one; a plain tensor becomes a frozen parameter.

        Raises: ValueError if its shape is not (out_features, in_features).
        """
        self._require_shape("weight", weight.shape, (self.out_features, self.in_features))
        self._clear_weight()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    def attach_lora(self, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float = 0.0) -> None:
        """Add a LoRA term, replacing any earlier one; plain tensors become trainable parameters.

        Args:
            lora_A: [r, in].
            lora_B: [out, r].
            scaling: factor of the term.
            dropout: probability, at least 0 and below 1.
        Raises: ValueError if a shape or the probability does not fit.
        """
        rank = lora_A.shape[0]
        self._require_shape("lora_A", lora_A.shape, (rank, self.in_features))
        self._require_shape("lora_B", lora_B.shape, (self.out_features, rank))
        self._set_lora(lora_A, lora_B, scaling, dropout)
        self.lora_magnitude_vector = None

    def attach_magnitude(self, magnitude: Tensor) -> None:
        """Make the LoRA term DoRA's; a plain tensor becomes a trainable parameter.

        Args:
            magnitude: [out] float32, the lengths that the rows of the weight with its LoRA term are to have; at first
                those of `row_norms`.
        Raises: ValueError if its shape does not fit, or without LoRA.
        """
        self._require_lora()
        self._require_shape("the magnitude", magnitude.shape, (self.out_features,))
        self.lora_magnitude_vector = magnitude if isinstance(magnitude, nn.Parameter) else nn.Parameter(magnitude)

    def detach_lora(self) -> None:
        """Remove the LoRA term; the base weight stays as it is."""
        super().detach_lora()
        self.lora_magnitude_vector = None

    def projection(self) -> Projection:
        """What the fused Functions need of this layer, with the dropout of the current mode."""
        # Parameters are looked up in their dictionary: by attribute, each costs the host a failed lookup first.
        return Projection(
            weight=self.base_weight(),
            lora_A=self._parameters["lora_A"],
            lora_B=self._parameters["lora_B"],
            scaling=self.lora_scaling,
            dropout=self.lora_dropout if self.training else 0.0,
            bias=self.bias,
            magnitude=self._parameters["lora_magnitude_vector"],
            # A stream may lie open while its caller trains.
            norms=None if self.training else self.known_norms,
        )

    def row_norms(self, dtype: torch.dtype | None = None) -> Tensor:
        """Lengths of the rows of the weight with its LoRA term, [out] float32, outside autograd.

        Args:
            dtype: to which the factors are rounded first, as by a pass in this compute dtype; None: they are not.
        Raises: ValueError without LoRA.
        """
        lora_A, lora_B = self._require_lora()
        if lora_A.is_meta:
            return torch.empty(self.out_features, dtype=torch.float32, device="meta")
        return row_norms(self.base_weight(), lora_A, lora_B, scaling=self.lora_scaling, dtype=dtype)

    def delta_weight(self) -> Tensor:
        """What the LoRA term adds to the weight: lora_scaling * lora_B lora_A, [out, in] float32, outside autograd.

        Raises: ValueError without LoRA.
        """
        lora_A, lora_B = self._require_lora()
        return self.lora_scaling * (lora_B.detach().float() @ lora_A.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        if self.is_frozen and (self.is_nf4 or self.lora_A is not None):
            if x.dim() == 2:
                return lora_linear(x, self.projection())
            return lora_linear(x.reshape(-1, self.in_features), self.projection()).view(
                *x.shape[:-1], self.out_features
            )
        # A head that trains may be float32 in a model of 16 bits.
        weight = self.weight.to(x.dtype)
        if x.dim() == 2 and self.bias is None and is_decoding(x) and dense_few.takes(x, weight):
            y = dense_few.linear(x, weight)
        else:
            y = F.linear(x, weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        hidden = F.dropout(x, self.lora_dropout, self.training)
        lora = self.lora_scaling * F.linear(F.linear(hidden, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        if self.lora_magnitude_vector is None:
            return y + lora
        change = (self.lora_magnitude_vector / self.row_norms(x.dtype) - 1.0).to(x.dtype)
        return y + lora + change * (F.linear(hidden, weight) + lora)

    def extra_repr(self) -> str:
        rank = None if self.lora_A is None else self.lora_A.shape[0]
        kind = "nf4" if self.is_nf4 else str(self.weight.dtype).removeprefix("torch.")
        dora = "" if self.lora_magnitude_vector is None else ", dora"
        return f"{self.in_features}, {self.out_features}, {kind}, bias={self.bias is not None}, lora_rank={rank}{dora}"

    def _load_from_state_dict(self, *args: Any) -> None:
        # Loading copies into the buffers, whose identity then says nothing.
        self.drop_decoded()
        super()._load_from_state_dict(*args)

    def _require_lora(self) -> tuple[Tensor, Tensor]:
        if self.lora_A is None or self.lora_B is None:
            raise ValueError("this layer has no LoRA term; call attach_lora first")
        return self.lora_A, self.lora_B

    def _require_shape(self, what: str, actual: Sequence[int], expected: tuple[int, ...]) -> None:
        if tuple(actual) != expected:
            raise ValueError(f"{what} must have shape {expected} in this layer, got {tuple(actual)}")


def keep_decoded_together(linears: Sequence[Linear], dtype: torch.dtype) -> None:
    """Keep the decoded weights of maps over one input, one below the other in one tensor [sum of out, in].

    Each map gets its rows of it, so that `nf4_tensor.decoded_together` finds the group as one matrix. The memory is
    free again when the last of them has dropped its copy.

    Raises: ValueError if a weight is dense, or if their in_features differ.
    """
    weights = [_nf4_weight(linear) for linear in linears]
    ops = nf4 if weights[0].packed.is_cuda else nf4_eager
    copies = ops.nf4_dequantize_group(weights, dtype=dtype).split([weight.shape[0] for weight in weights])
    for linear, weight, copy in zip(linears, weights, copies, strict=True):
        linear._nf4 = replace(weight, decoded=copy)


def _nf4_weight(linear: Linear) -> Nf4Tensor:
    weight = linear.base_weight()
    if not isinstance(weight, Nf4Tensor):
        raise ValueError(f"a dense weight ({weight.dtype}) is decoded already; keep copies of NF4 weights only")
    return weight


def project_together(x: Tensor | Normed, linears: Sequence[Linear]) -> Tensor:
    """Several layers over one input, their outputs side by side; fused where every base weight is frozen.

    Args:
        x: [T, in], or the norm that made it: the fused path then does not keep it.
    Returns: [T, sum of out_features].
    """
    if all(linear.is_frozen for linear in linears):
        return lora_fused(x, [linear.projection() for linear in linears])
    x = x.y if isinstance(x, Normed) else x
    outputs = [linear(x) for linear in linears]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def gated_mlp(
    x: Tensor | Normed,
    gate_up: Sequence[Linear],
    down: Linear,
    *,
    activation: Activation,
    keep_gate_up: bool = True,
) -> Tensor:
    """down(act(gate(x)) * up(x)); one fused Function where every base weight is frozen.

    Args:
        x: [T, H], or the norm that made it: the fused path then does not keep it.
        gate_up: gate and up, or one layer whose outputs are those of both, in this order.
        keep_gate_up: keep their outputs for the backward pass; the fused path can multiply them again there instead.
    Returns: [T, H].
    """
    if down.is_frozen and all(linear.is_frozen for linear in gate_up):
        projections = [linear.projection() for linear in gate_up]
        return lora_mlp(x, projections, down.projection(), activation=activation, keep_gate_up=keep_gate_up)
    return down(glu(project_together(x, gate_up), activation=activation))
