"""Rotary position embedding: the angles. The rotation itself is `slothcore.autograd.rope`.

T  tokens, packed    P  rotated channels of a head
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_TYPES: tuple[str, ...] = get_args(RopeType)


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """How positions become angles; the names are Hugging Face's, and each type reads only its own.

    default   Pair i turns by rope_theta ** (-2i / rotary_dim) a position (Su et al. 2021, arXiv:2104.09864).
    linear    Every frequency is divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    dynamic   In a document longer than max_position_embeddings, rope_theta grows with its length ("NTK-aware").
    llama3    Frequencies whose wavelength exceeds original_max_position_embeddings / low_freq_factor are divided by
              `factor`, those below original_max_position_embeddings / high_freq_factor stay, a blend in between
              (Llama 3.1's reference code).
    yarn      Pairs that turn fewer than beta_slow times in original_max_position_embeddings are divided by `factor`,
              those that turn more than beta_fast times stay, a ramp in between, whose ends are whole pairs if
              `truncate`; cosines and sines grow by attention_factor (Peng et al. 2023, arXiv:2309.00071).
    longrope  Each frequency is divided by its entry of `short_factor`, or, in a document longer than
              original_max_position_embeddings, of `long_factor`; cosines and sines grow by attention_factor
              (Ding et al. 2024, arXiv:2402.13753).

    Attributes:
        attention_factor: None: worked out from `factor` (and mscale, mscale_all_dim), see `attention_scaling`.
        partial_rotary_factor: the share of a head's channels, from its first on, that turn.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {self.rope_type!r}")
        positive = ("rope_theta", "factor", "max_position_embeddings", "low_freq_factor", "beta_slow")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"RoPE's {name} must be positive, got {getattr(self, name)!r}")
        for name in ("rope_theta", "original_max_position_embeddings"):
            if not getattr(self, name) > 1:
                raise ValueError(f"RoPE's {name} must exceed 1, got {getattr(self, name)!r}")
        if self.rope_type == "dynamic" and self.factor < 1:
            raise ValueError(f"RoPE's factor must be at least 1 for the type dynamic, got {self.factor!r}")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"RoPE's attention_factor must be positive, got {self.attention_factor!r}")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"RoPE's partial_rotary_factor must lie in (0, 1], got {self.partial_rotary_factor!r}")
        for high, low in (("high_freq_factor", "low_freq_factor"), ("beta_fast", "beta_slow")):
            if not getattr(self, high) > getattr(self, low):
                raise ValueError(
                    f"RoPE's {high} must exceed {low}, got {getattr(self, high)!r} and {getattr(self, low)!r}"
                )
        for name in ("short_factor", "long_factor"):
            if not all(value > 0 for value in getattr(self, name)):
                raise ValueError(f"RoPE's {name} must hold positive numbers only")

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles of a token change with the length of its document."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def attention_scaling(self) -> float:
        """Factor of the cosines and sines."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        growth = math.log(self.factor)
        if self.rope_type == "longrope":
            return math.sqrt(1 + growth / math.log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * growth + 1.0) / (0.1 * self.mscale_all_dim * growth + 1.0)
        return 0.1 * growth + 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """How many channels of a head turn. Raises: ValueError if they, or the factors of longrope, do not fit."""
        channels = int(head_dim * self.partial_rotary_factor)
        if channels % 2 or channels < 2:
            share = (
                "" if self.partial_rotary_factor == 1 else f" * partial_rotary_factor {self.partial_rotary_factor:g}"
            )
            raise ValueError(
                f"RoPE turns pairs of channels: head_dim{share} must be even, got {channels} (head_dim {head_dim})"
            )
        if self.rope_type == "dynamic" and channels == 2:
            raise ValueError("RoPE of the type dynamic needs more than 2 rotated channels")
        if self.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != channels // 2:
                    raise ValueError(
                        f"RoPE's {name} must have {channels // 2} entries, one for each pair of the {channels} rotated "
                        f"channels, got {len(getattr(self, name))}"
                    )
        return channels


def inverse_frequencies(parameters: RopeParameters, head_dim: int, *, is_long: bool = False) -> Tensor:
    """Angle per position of each rotated pair of channels, [P / 2] float32 on the CPU.

    Every operation is in float32 and in the order in which transformers does it, so the values are equal to the bit.
    is_long chooses the long factors of longrope. What dynamic adds for a long document is `_grown_frequencies`.
    Raises: ValueError if the parameters do not fit head_dim.
    """
    channels = parameters.rotary_dim(head_dim)
    exponents = _exponents(channels)
    theta_powers = parameters.rope_theta**exponents
    if parameters.rope_type == "longrope":
        factors = parameters.long_factor if is_long else parameters.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * theta_powers)
    if parameters.rope_type == "yarn":
        return _yarn_frequencies(parameters, theta_powers)
    frequencies = 1.0 / theta_powers
    if parameters.rope_type == "linear":
        return frequencies / parameters.factor
    if parameters.rope_type == "llama3":
        return _llama3_frequencies(parameters, frequencies)
    return frequencies


def _exponents(channels: int) -> Tensor:
    return torch.arange(0, channels, 2, dtype=torch.float32, device="cpu") / channels


def _llama3_frequencies(parameters: RopeParameters, frequencies: Tensor) -> Tensor:
    low, high = parameters.low_freq_factor, parameters.high_freq_factor
    original_length = parameters.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    kept_or_divided = torch.where(wavelengths > original_length / low, frequencies / parameters.factor, frequencies)
    smooth = (original_length / wavelengths - low) / (high - low)
    blended = (1 - smooth) * kept_or_divided / parameters.factor + smooth * kept_or_divided
    is_between = (wavelengths >= original_length / high) & (wavelengths <= original_length / low)
    return torch.where(is_between, blended, kept_or_divided)


def _yarn_frequencies(parameters: RopeParameters, theta_powers: Tensor) -> Tensor:
    pairs = len(theta_powers)
    channels = 2 * pairs

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that turns this often in the original length."""
        wavelength = parameters.original_max_position_embeddings / (times * 2 * math.pi)
        return channels * math.log(wavelength) / (2 * math.log(parameters.rope_theta))

    first, last = pair_that_turns(parameters.beta_fast), pair_that_turns(parameters.beta_slow)
    if parameters.truncate:
        first, last = math.floor(first), math.ceil(last)
    # transformers bounds the pairs by the channels; the values depend on it.
    first, last = max(first, 0), min(last, channels - 1)
    if first == last:
        last += 0.001
    kept = 1 - ((torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    return 1.0 / (parameters.factor * theta_powers) * (1 - kept) + 1.0 / theta_powers * kept


def _grown_frequencies(parameters: RopeParameters, exponents: Tensor, lengths: Tensor) -> Tensor:
    """Frequencies [T, P / 2] of the type dynamic for tokens of documents that are `lengths` [T] long."""
    factor, trained = parameters.factor, parameters.max_position_embeddings
    channels = 2 * len(exponents)
    growth = factor * lengths.clamp(min=trained) / trained - (factor - 1)
    # The power in float64: torch's float32 power differs in the last bit between one number and a vector of them.
    theta = parameters.rope_theta * (growth.double() ** (channels / (channels - 2))).float()
    return 1.0 / theta[:, None] ** exponents


def _document_lengths(position_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Length of each token's document, [T]: one more than its largest position; all work stays on the device."""
    if cu_seqlens is None:
        return position_ids + 1
    tokens = torch.arange(len(position_ids), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.bucketize(tokens, cu_seqlens[1:], right=True)
    last = position_ids.new_zeros(len(cu_seqlens) - 1).scatter_reduce_(0, document, position_ids, "amax")
    return last[document] + 1


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation at given positions."""

    def __init__(self, parameters: RopeParameters, head_dim: int) -> None:
        super().__init__()
        self.rope = parameters
        # No buffers: they must stay float32 when the model is cast, have values when the model is built on the meta
        # device, and never enter a checkpoint.
        frequencies = for_long = inverse_frequencies(parameters, head_dim)
        # What long documents need: their own frequencies (longrope), or the exponents of theta (dynamic).
        if parameters.rope_type == "longrope":
            for_long = inverse_frequencies(parameters, head_dim, is_long=True)
        elif parameters.rope_type == "dynamic":
            for_long = _exponents(parameters.rotary_dim(head_dim))
        # On each device that was asked for they stay: a captured graph goes on reading them when the model has been
        # elsewhere meanwhile.
        self._on_host = frequencies, for_long
        self._on_device = {frequencies.device: self._on_host}

    def forward(self, position_ids: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), both [T, P / 2] float32, for `position_ids` [T].

        Args:
            cu_seqlens: [documents + 1] boundaries. Where angles depend on the length, a document of a packed stream
                gets those that it would get alone; None: each token is the last of a document of its own, as in
                decoding with a cache.
        """
        device = position_ids.device
        if device not in self._on_device:
            frequencies, for_long = self._on_host
            self._on_device[device] = frequencies.to(device), for_long.to(device)
        frequencies, for_long = self._on_device[device]
        if self.rope.depends_on_length:
            lengths = _document_lengths(position_ids, cu_seqlens)
            frequencies = self._frequencies_by_length(lengths, frequencies, for_long)
        angles = position_ids[:, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        scaling = self.rope.attention_scaling
        return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)

    def _frequencies_by_length(self, lengths: Tensor, frequencies: Tensor, for_long: Tensor) -> Tensor:
        """[T, P / 2] for tokens of documents that are `lengths` [T] long."""
        parameters = self.rope
        if parameters.rope_type == "longrope":
            is_long = lengths > parameters.original_max_position_embeddings
            return torch.where(is_long[:, None], for_long, frequencies)
        is_long = lengths > parameters.max_position_embeddings
        grown = _grown_frequencies(parameters, for_long, lengths)
        return torch.where(is_long[:, None], grown, frequencies)

    def extra_repr(self) -> str:
        return str(self.rope)
