"""Rotary position embedding: the angles. The rotation itself is `slothcore.autograd.rope`."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

RopeType = Literal["default", "linear", "llama3"]
ROPE_TYPES: tuple[str, ...] = get_args(RopeType)


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """How positions become angles; the names are Hugging Face's.

    "linear" divides every frequency by `factor`. "llama3" divides only those whose wavelength exceeds
    original_max_position_embeddings / low_freq_factor, keeps those below
    original_max_position_embeddings / high_freq_factor, and blends in between.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {self.rope_type!r}")
        for name in ("rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings"):
            if not getattr(self, name) > 0:
                raise ValueError(f"RoPE's {name} must be positive, got {getattr(self, name)!r}")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"RoPE's high_freq_factor must exceed low_freq_factor, "
                f"got {self.high_freq_factor!r} and {self.low_freq_factor!r}"
            )


def inverse_frequencies(parameters: RopeParameters, head_dim: int) -> Tensor:
    """Angle per position of each pair of channels, [head_dim / 2] float32 on the CPU.

    Every operation is in float32 and in the order in which transformers does it, so the values are equal to the bit.
    Source: Su et al. 2021, arXiv:2104.09864; the llama3 scaling is that of Llama 3.1's reference code.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (parameters.rope_theta**exponents)
    if parameters.rope_type == "default":
        return frequencies
    if parameters.rope_type == "linear":
        return frequencies / parameters.factor

    low, high = parameters.low_freq_factor, parameters.high_freq_factor
    original_length = parameters.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    kept_or_divided = torch.where(wavelengths > original_length / low, frequencies / parameters.factor, frequencies)
    smooth = (original_length / wavelengths - low) / (high - low)
    blended = (1 - smooth) * kept_or_divided / parameters.factor + smooth * kept_or_divided
    is_between = (wavelengths >= original_length / high) & (wavelengths <= original_length / low)
    return torch.where(is_between, blended, kept_or_divided)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation at given positions."""

    def __init__(self, parameters: RopeParameters, head_dim: int) -> None:
        super().__init__()
        self.parameters_of_rope = parameters
        # A plain attribute, not a buffer: it must stay float32 when the model is cast, have values when the model is
        # built on the meta device, and never enter a checkpoint.
        self._frequencies = inverse_frequencies(parameters, head_dim)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), both [T, head_dim / 2] float32, for `position_ids` [T]."""
        if self._frequencies.device != position_ids.device:
            self._frequencies = self._frequencies.to(position_ids.device)
        angles = position_ids[:, None].float() * self._frequencies
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        return str(self.parameters_of_rope)
