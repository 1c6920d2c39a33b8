"""Choosing the next token from scores. Order and meaning of the options are those of transformers' generate."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token; otherwise scores are divided by it before drawing.
        top_k: draw among this many of the most probable tokens; None: all.
        top_p: draw among the fewest most probable tokens whose probabilities reach this sum; None: all.
        min_p: draw among the tokens that are at least this share as probable as the most probable one; None: all.
        repetition_penalty: scores of tokens already in the row are divided by it if positive, multiplied if negative.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; None turns it off")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}; None turns it off")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in 0..1, got {self.min_p}; None turns it off")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}; 1 turns it off")


def choose(scores: Tensor, sampling: Sampling, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Next token of each row, [rows] int64.

    Args:
        scores: [rows, V] logits.
        seen: [rows, V] bool, which tokens a row already holds; read if there is a repetition penalty.
        generator: source of random numbers on the device of `scores`; None: torch's default.
    """
    scores = processed(scores, sampling, seen)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)


def processed(scores: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """The scores [rows, V] float32 whose softmax is drawn from, or whose highest is taken if temperature is 0."""
    scores = scores.float()
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        scores = penalize_repetition(scores, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores
    scores = scores / sampling.temperature
    if sampling.top_k is not None:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p is not None:
        scores = keep_top_p(scores, sampling.top_p)
    if sampling.min_p is not None:
        scores = keep_min_p(scores, sampling.min_p)
    return scores


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that are `seen` less likely (penalty above 1). Source: Keskar et al. 2019, arXiv:1909.05858."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Leave the k highest scores of each row (and ties with the last of them), the rest become -inf."""
    lowest_kept = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < lowest_kept, float("-inf"))


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Leave the fewest highest scores of each row whose probabilities sum to at least p, the rest become -inf.

    Source: Holtzman et al. 2019, arXiv:1904.09751.
    """
    ascending, order = scores.sort(descending=False)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[..., -1] = False  # rounding must not drop the most probable token
    return scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Leave the scores of each row whose probability is at least p times the highest one, the rest become -inf.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))
