"""The gated feed-forward block."""

import torch
from torch import Tensor, nn

from slothcore.kernels.glu import Activation
from slothcore.layers.linear import Linear, gated_mlp


class GatedMlp(nn.Module):
    """y = down(act(gate(x)) * up(x)).

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, device=device)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, device=device)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
