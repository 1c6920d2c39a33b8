"""Choosing the next token from scores. Order and meaning of the options are those of transformers' generate.

Rows may differ in every option, and yet one sequence of tensor operations serves them all, so that it can be recorded.
What is drawn in a row depends on its seed and on how many tokens it has drawn before, not on the rows beside it.

    R  rows    V  vocab_size
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MASK_64 = 2**64 - 1
# Steele et al. 2014, "Fast splittable pseudorandom number generators": the increment and the mixing of splitmix64.
INCREMENT = 0x9E3779B97F4A7C15
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
# Bits of a random number; with fewer than those of a float64, no product with one rounds up to its factor.
RANDOM_BITS = 48
# Scores that are divided by less may be beyond float32.
LEAST_TEMPERATURE = 1e-30
NULLABLE = ("top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token; otherwise scores are divided by it before drawing.
        top_k: draw among this many of the most probable tokens; None: all.
        top_p: draw among the fewest most probable tokens whose probabilities reach this sum; None: all.
        min_p: draw among the tokens that are at least this share as probable as the most probable one; None: all.
        repetition_penalty: scores of tokens already in the row are divided by it if positive, multiplied if negative.
        frequency_penalty: taken off a token's score for each time that it was added to the prompt.
        presence_penalty: taken off once if it was added at all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if isinstance(value, str) or not (hasattr(value, "__float__") or (value is None and name in NULLABLE)):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not hasattr(self.top_k, "__index__")):
            raise ValueError(f"top_k must be a whole number, got {self.top_k!r}; None turns it off")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, by which scores can be divided, got "
                f"{self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; None turns it off")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}; None turns it off")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in 0..1, got {self.min_p}; None turns it off")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}; 1 turns it off")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -float("inf") < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}; 0 turns it off")

    @property
    def draws(self) -> bool:
        """Whether chance plays a part."""
        return self.temperature > 0

    @property
    def cuts(self) -> bool:
        """Whether tokens are left out before drawing."""
        return self.draws and (self.top_k, self.top_p, self.min_p) != (None, None, None)

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens a row holds."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class RowOptions:
    """The options of rows, [R, 1] each; a greedy row has temperature 0, and what is turned off leaves all as it is.

    Attributes:
        top_k: int64, at most V. The others are float32.
        outside_p: 1 - top_p; a token goes if it and all that are less probable reach no more than this together.
    """

    temperature: Tensor
    top_k: Tensor
    outside_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling], vocab_size: int) -> "RowOptions":
        """Options on the CPU, one row each."""
        rows = zip(*(_numbers(sampling, vocab_size) for sampling in samplings), strict=True)
        columns = [torch.tensor(row, device="cpu")[:, None] for row in rows]
        return cls(*(column if column.dtype == torch.int64 else column.float() for column in columns))

    def of_rows(self, rows: Tensor) -> "RowOptions":
        """Those of the rows with these numbers."""
        return RowOptions(*(getattr(self, field.name).index_select(0, rows) for field in fields(self)))


def _numbers(sampling: Sampling, vocab_size: int) -> tuple[float | int, ...]:
    """A row of `RowOptions`, in the order of its attributes."""
    return (
        float(sampling.temperature),
        vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size),
        -1.0 if sampling.top_p is None or sampling.top_p == 1 else 1 - sampling.top_p,
        0.0 if sampling.min_p is None else float(sampling.min_p),
        float(sampling.repetition_penalty),
        float(sampling.frequency_penalty),
        float(sampling.presence_penalty),
    )


def draw(scores: Tensor, temperature: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
    """A token of each row, [R] int64: drawn by its scores, or, where the temperature is 0, the highest.

    Args:
        scores: [R, V] float32, divided by the temperature already.
        temperature: [R, 1].
        keys: [R] int64, of `random_key`.
        counts: [R] int64, how many tokens each row has drawn before.
    """
    # The sums in float64: among 100,000 of them, float32 would favour some tokens visibly.
    sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Of equal sums the first belongs to the token that has the probability.
    drawn = torch.searchsorted(sums, random_numbers(keys, counts)[:, None] * sums[:, -1:], right=True)[:, 0]
    # Scores that are no numbers must not name a token that there is not, which would end the process on a GPU.
    drawn = drawn.clamp(max=scores.shape[-1] - 1)
    return torch.where(temperature[:, 0] == 0, scores.argmax(-1), drawn)


def random_key(seed: int) -> int:
    """What stands for a seed, as a signed number of 64 bits; those of neighbouring seeds have nothing in common."""
    state = seed & MASK_64
    for shift, factor in MIXING:
        state = ((state ^ (state >> shift)) * factor) & MASK_64
    return _signed(state ^ (state >> LAST_SHIFT))


def random_numbers(keys: Tensor, counts: Tensor) -> Tensor:
    """Numbers of [0, 1) in float64, the count-th of each key's sequence; both [R] int64."""
    state = keys + (counts + 1) * _signed(INCREMENT)
    for shift, factor in MIXING:
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    state = state ^ _shifted(state, LAST_SHIFT)
    return _shifted(state, 64 - RANDOM_BITS).double() * 2.0**-RANDOM_BITS


def processed(
    scores: Tensor,
    options: RowOptions,
    *,
    draws: bool = True,
    cuts: bool = True,
    in_prompt: Tensor | None = None,
    generated: Tensor | None = None,
) -> Tensor:
    """The scores [R, V] float32 whose softmax is drawn from; a greedy row takes the highest.

    Args:
        scores: [R, V] logits.
        draws, cuts: whether any row does; see `Sampling`.
        in_prompt: [R, V] bool, which tokens the prompts hold; None if no row has a penalty.
        generated: [R, V], how often each was added; None if no row has a penalty.
    """
    scores = scores.float()
    if in_prompt is not None and generated is not None:
        scores = penalize_repetition(scores, in_prompt | (generated > 0), options.repetition_penalty)
        scores = scores - options.frequency_penalty * generated
        scores = scores - options.presence_penalty * (generated > 0)
    if not draws:
        return scores
    scores = scores / torch.where(options.temperature == 0, 1.0, options.temperature)
    if not cuts:
        return scores
    scores = keep_top(scores, options.top_k, options.outside_p)
    return keep_min_p(scores, options.min_p)


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the tokens that are `seen` less likely (penalty above 1). Source: Keskar et al. 2019, arXiv:1909.05858."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top(scores: Tensor, k: Tensor, outside_p: Tensor) -> Tensor:
    """Top-k, then top-p: the rest of each row becomes -inf.

    Kept are the k highest scores and ties with the last of them; of those the fewest highest whose probabilities sum
    to at least 1 - outside_p. Source: Holtzman et al. 2019, arXiv:1904.09751.
    """
    ascending, order = scores.sort(descending=False)
    lowest_kept = ascending.gather(-1, ascending.shape[-1] - k)
    ascending = ascending.masked_fill(ascending < lowest_kept, float("-inf"))
    outside = ascending.softmax(-1).cumsum(-1) <= outside_p
    outside = outside | (ascending == float("-inf"))
    outside[..., -1] = False  # rounding must not drop the most probable token
    return scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Leave the scores of each row whose probability is at least p times the highest one, the rest become -inf.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))


def _signed(number: int) -> int:
    """The 64 bits of a number as torch's int64 has them."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(state: Tensor, count: int) -> Tensor:
    """Bits moved to the right, zeros from the left; torch would bring copies of the sign."""
    return (state >> count) & (2 ** (64 - count) - 1)
