"""The options of sampling against transformers' logits processors."""

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slothcore.models.sampling import (
    Sampling,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    processed,
)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(5, 40) * 3


@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_top_k(scores: torch.Tensor, k: int) -> None:
    scores[0, :4] = scores[0].max() + 1  # ties
    assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(k)(None, scores))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_top_p(scores: torch.Tensor, p: float) -> None:
    kept = keep_top_p(scores, p)
    assert torch.equal(kept, TopPLogitsWarper(p)(None, scores))
    assert kept.isfinite().any(-1).all()


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.02, 0.3, 1.0])
def test_min_p(scores: torch.Tensor, p: float) -> None:
    scores[0, :4] = scores[0].max() + 1  # ties
    kept = keep_min_p(scores, p)
    assert torch.equal(kept, MinPLogitsWarper(p)(None, scores))
    assert kept.isfinite().any(-1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 9},
        {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
    ],
    ids=str,
)
def test_all_together_are_what_transformers_makes_of_the_options(scores: torch.Tensor, options: dict) -> None:
    """Its own list of processors, in its own order."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    reference = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    # What is not given is off, and not the default of 50 for top_k.
    config = GenerationConfig(**{"top_k": 0, "top_p": 1.0, **options}, do_sample=True)
    processors = reference._get_logits_processor(config, input_ids_seq_length=11, device="cpu")
    ids = torch.randint(0, 40, (5, 11))
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter(1, ids, True)
    expected = processors(ids, scores)
    assert torch.equal(processed(scores, Sampling(**options), seen), expected)
    assert len(processors) == sum(name not in ("temperature",) or value != 1.0 for name, value in options.items())


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty(scores: torch.Tensor, penalty: float) -> None:
    ids = torch.randint(0, 40, (5, 11))
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    assert torch.equal(penalize_repetition(scores, seen, penalty), expected)


def test_draws_follow_the_distribution() -> None:
    """20,000 draws at temperature 2 from known probabilities, each frequency within five standard errors."""
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    scores = 2 * probabilities.log().expand(count, 3)
    drawn = choose(scores, Sampling(temperature=2.0), None, generator)
    frequency = drawn.bincount(minlength=3) / count
    standard_error = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequency - probabilities).abs() < 5 * standard_error).all()


def test_greedy_takes_the_highest(scores: torch.Tensor) -> None:
    assert torch.equal(choose(scores, Sampling(), None, None), scores.argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"min_p": -0.1}, "min_p must lie in 0..1"),
        ({"min_p": 1.1}, "min_p must lie in 0..1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
