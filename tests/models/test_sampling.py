"""The options of sampling against transformers' logits processors, rows of different options together; the draws."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from slothcore.models.sampling import (
    RowOptions,
    Sampling,
    draw,
    keep_min_p,
    keep_top,
    processed,
    random_key,
    random_numbers,
)

VOCABULARY = 40
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 9},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
]


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(len(OPTIONS), VOCABULARY) * 3


def by_transformers(scores: Tensor, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """Its own list of processors, in its own order."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    reference = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    # What is not given is off, and not the default of 50 for top_k.
    config = GenerationConfig(**{"top_k": 0, "top_p": 1.0, **options}, do_sample=True)
    processors = reference._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu")
    assert len(processors) == sum(name != "temperature" or value != 1.0 for name, value in options.items())
    return processors(ids, scores)


def test_rows_of_different_options_are_what_transformers_makes_of_each(scores: Tensor) -> None:
    ids = torch.randint(0, VOCABULARY, (len(OPTIONS), 11))
    in_prompt = torch.zeros(len(OPTIONS), VOCABULARY, dtype=torch.bool).scatter(1, ids[:, :6], True)
    generated = torch.zeros(len(OPTIONS), VOCABULARY, dtype=torch.int32)
    generated.scatter_add_(1, ids[:, 6:], torch.ones(len(OPTIONS), 5, dtype=torch.int32))
    options = RowOptions.of([Sampling(**given) for given in OPTIONS], VOCABULARY)
    actual = processed(scores, options, in_prompt=in_prompt, generated=generated)
    for row, given in enumerate(OPTIONS):
        expected = by_transformers(scores[row : row + 1], ids[row : row + 1], given)
        assert torch.equal(actual[row : row + 1], expected), given
        assert expected.isfinite().any()


def test_rows_do_not_know_of_each_other(scores: Tensor) -> None:
    samplings = [Sampling(**given) for given in OPTIONS]
    together = processed(scores, RowOptions.of(samplings, VOCABULARY))
    for row, sampling in enumerate(samplings):
        alone = processed(scores[row : row + 1], RowOptions.of([sampling], VOCABULARY), cuts=sampling.cuts)
        assert torch.equal(together[row : row + 1], alone)


def test_ties_with_the_last_of_the_top_k_are_kept(scores: Tensor) -> None:
    scores[0, :4] = scores[0].max() + 1
    kept = keep_top(scores, torch.full((len(scores), 1), 2), torch.full((len(scores), 1), -1.0))
    assert kept.isfinite().sum(-1).tolist() == [4, *[2] * (len(scores) - 1)]


def test_ties_with_the_most_probable_survive_min_p(scores: Tensor) -> None:
    scores[0, :4] = scores[0].max() + 1
    kept = keep_min_p(scores, torch.ones(len(scores), 1))
    assert kept.isfinite().sum(-1).tolist() == [4, *[1] * (len(scores) - 1)]


def test_penalties_of_what_was_added() -> None:
    """As OpenAI defines them: score - count * frequency - (count > 0) * presence; prompts do not count."""
    scores = torch.tensor([[1.0, -2.0, 3.0, 0.5]] * 2)
    in_prompt = torch.tensor([[True, False, False, True]] * 2)
    generated = torch.tensor([[0, 2, 1, 0]] * 2, dtype=torch.int32)
    options = RowOptions.of([Sampling(frequency_penalty=0.25, presence_penalty=0.5), Sampling()], 4)
    actual = processed(scores, options, draws=False, in_prompt=in_prompt, generated=generated)
    assert actual.tolist() == [[1.0, -3.0, 2.25, 0.5], [1.0, -2.0, 3.0, 0.5]]


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of one row, and of as many rows; each frequency within five standard errors."""
    probabilities = torch.tensor([0.7, 0.0, 0.2, 0.1])
    count = 20_000
    scores = probabilities.log().expand(count, 4)
    temperature = torch.ones(count, 1)
    one_row = torch.full((count,), random_key(7)), torch.arange(count)
    many_rows = torch.tensor([random_key(seed) for seed in range(count)]), torch.zeros(count, dtype=torch.int64)
    for keys, counts in (one_row, many_rows):
        frequency = draw(scores, temperature, keys, counts).bincount(minlength=4) / count
        standard_error = (probabilities * (1 - probabilities) / count).sqrt()
        assert ((frequency - probabilities).abs() <= 5 * standard_error).all()


def test_a_greedy_row_among_others_takes_the_highest(scores: Tensor) -> None:
    samplings = [Sampling() if row % 2 else Sampling(temperature=5.0) for row in range(len(scores))]
    options = RowOptions.of(samplings, VOCABULARY)
    keys = torch.arange(len(scores))
    chosen = draw(processed(scores, options, cuts=False), options.temperature, keys, keys)
    assert torch.equal(chosen[1::2], scores[1::2].argmax(-1))
    assert not torch.equal(chosen[::2], scores[::2].argmax(-1))


def test_scores_that_are_no_numbers_still_give_a_token_of_the_vocabulary() -> None:
    scores = torch.full((2, 5), float("nan"))
    chosen = draw(scores, torch.tensor([[1.0], [0.0]]), torch.arange(2), torch.arange(2))
    assert ((chosen >= 0) & (chosen < 5)).all()


def test_random_numbers_are_those_of_splitmix64() -> None:
    """The reference, in whole numbers of any size; a sequence of the seed 0 is published with the algorithm."""

    def reference(seed: int, count: int) -> int:
        state = (seed + (count + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert reference(0, 0) == 0xE220A8397B1DCDAF
    keys = [0, 1, -5, 2**63 - 1, -(2**63), random_key(3)]
    counts = [0, 1, 2, 1000, 2**40, 7]
    actual = random_numbers(torch.tensor(keys), torch.tensor(counts)).tolist()
    assert actual == [(reference(k % 2**64, c) >> 16) / 2**48 for k, c in zip(keys, counts, strict=True)]
    assert len({random_key(seed) for seed in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1e-31}, "temperature must be 0 .greedy. or at least 1e-30"),
        ({"temperature": "0.7"}, "temperature must be a number, got '0.7'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": "1"}, "top_p must be a number, got '1'"),
        ({"top_k": 50.0}, "top_k must be a whole number, got 50.0; None turns it off"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"min_p": -0.1}, "min_p must lie in 0..1"),
        ({"min_p": 1.1}, "min_p must lie in 0..1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite number"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be a finite number"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
