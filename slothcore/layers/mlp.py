"""The gated feed-forward block."""

from typing import Any

import torch
from torch import Tensor, nn

from slothcore.autograd.rms_norm import Normed
from slothcore.kernels.glu import Activation
from slothcore.layers.linear import Linear, gated_mlp


class GatedMlp(nn.Module):
    """y = down(act(gate(x)) * up(x)).

    With `fused` one layer `gate_up_proj` holds the rows of gate and then those of up, as Phi-3's checkpoints do.
    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool = False,
        fused: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self._names = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        width = 2 * intermediate_size // len(self._names)
        for name in self._names:
            self.add_module(name, Linear(hidden_size, width, bias=bias, dtype=dtype, device=device))
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device)

    @property
    def read_together(self) -> list[Linear]:
        """The layers that read the input."""
        layers: list[Any] = [self._modules[name] for name in self._names]
        return layers

    def forward(self, x: Tensor | Normed, *, keep_gate_up: bool = True) -> Tensor:
        """[T, H] to [T, H].

        Args:
            x: the input, or the norm that made it.
            keep_gate_up: keep the outputs of gate and up for the backward pass, or multiply them again there, where all
                base weights are frozen; they are kept where one trains.
        """
        return gated_mlp(x, self.read_together, self.down_proj, activation=self.activation, keep_gate_up=keep_gate_up)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
