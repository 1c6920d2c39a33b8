"""Generation from ids: batched rows against solo runs, the cache against full forward passes, ends of rows, seeds."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.models.config import DecoderConfig
from slothcore.models.decoder import Decoder
from slothcore.models.families import decoder_config
from slothcore.models.load import from_config, load_model
from tests.models.test_config import TINY
from tests.models.tiny import saved, tiny_llama, token_ids

NEW = 20


@pytest.fixture
def model() -> Decoder:
    return from_config({**TINY, "num_key_value_heads": 2, "initializer_range": 0.3}, device="cpu")


def greedy_without_cache(model: Decoder, prompt: Tensor, count: int) -> list[int]:
    """The slow way: the whole text again for every token."""
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[-1:].argmax(-1)])
    return ids[len(prompt) :].tolist()


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.cat([torch.full((width - len(p),), 3), p]) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


PROMPTS = [token_ids(9, seed=1), token_ids(2, seed=2), token_ids(5, seed=3), token_ids(1, seed=4)]


def test_cache_equals_no_cache(model: Decoder) -> None:
    for prompt in PROMPTS:
        new = model.generate(prompt, max_new_tokens=NEW)[0, len(prompt) :].tolist()
        assert new == greedy_without_cache(model, prompt, NEW)
        assert len(set(new)) > 2


@pytest.mark.parametrize(
    "switches",
    [
        {"layer_windows": (4, None)},
        {"attention_softcap": 2.0, "logit_softcap": 3.0},
        {"attention_scale": 1.0, "embedding_scale": 3.0, "norm_weight_offset": 1.0},
        {"hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_every_switch_reaches_the_cached_path(switches: dict[str, Any]) -> None:
    """Each switch changes the tokens, or the cached and the packed path could agree by ignoring it."""
    fields = vars(decoder_config({**TINY, "num_key_value_heads": 2}))

    def build(**changes: Any) -> Decoder:
        generator = torch.Generator().manual_seed(11)
        model = Decoder(DecoderConfig(**{**fields, **changes}))
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(0.0, 0.4, generator=generator)
        return model

    model, plain = build(**switches), build()
    prompt = PROMPTS[0]
    new = model.generate(prompt, max_new_tokens=NEW)[0, len(prompt) :].tolist()
    assert new == greedy_without_cache(model, prompt, NEW)
    with torch.no_grad():
        changed = (model(prompt).logits - plain(prompt).logits).abs().max()
    assert changed > 0.01


@pytest.mark.parametrize("bits", [32, 4])
def test_batched_rows_equal_solo_runs(bits: int, tmp_path: Path) -> None:
    model = load_model(saved(tiny_llama(), tmp_path), bits=bits, device="cpu")
    ids, mask = left_padded(PROMPTS)
    together = model.generate(ids, mask, max_new_tokens=NEW)
    assert together.shape == (len(PROMPTS), ids.shape[1] + NEW)
    assert torch.equal(together[:, : ids.shape[1]], ids)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = model.generate(prompt, max_new_tokens=NEW)
        assert row[ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


def test_batch_equals_transformers(tmp_path: Path) -> None:
    reference = tiny_llama()
    model = load_model(saved(reference, tmp_path), bits=32, device="cpu")
    ids, mask = left_padded(PROMPTS)
    expected = reference.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=NEW, pad_token_id=0), expected)


def test_end_tokens_equal_transformers(tmp_path: Path) -> None:
    """Rows end at different steps; what follows an end is padding, and generation stops with the last row."""
    reference = tiny_llama()
    model = load_model(saved(reference, tmp_path), bits=32, device="cpu")
    ids, mask = left_padded(PROMPTS)
    free = model.generate(ids, mask, max_new_tokens=NEW)[:, ids.shape[1] :]
    # One end token for each row, at different steps.
    ends = sorted({int(free[row, 3 * row + 1]) for row in range(len(PROMPTS))})
    expected = reference.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=96
    )
    actual = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=96)
    assert actual.shape[1] < ids.shape[1] + NEW
    assert torch.equal(actual, expected)


def test_repetition_penalty_equals_transformers(tmp_path: Path) -> None:
    reference = tiny_llama()
    model = load_model(saved(reference, tmp_path), bits=32, device="cpu")
    ids = token_ids(2, 6)
    options: dict[str, Any] = {"max_new_tokens": NEW, "repetition_penalty": 1.7, "pad_token_id": 0}
    expected = reference.generate(ids, do_sample=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert not torch.equal(model.generate(ids, max_new_tokens=NEW), expected)


def test_the_models_own_end_and_pad_tokens(model: Decoder) -> None:
    ids, mask = left_padded(PROMPTS[:2])
    free = model.generate(ids, mask, max_new_tokens=NEW)[:, ids.shape[1] :]
    end = int(free[0, 2])
    model.generation_config = {"eos_token_id": end}
    first = model.generate(ids, mask, max_new_tokens=NEW)[0, ids.shape[1] :].tolist()
    stop = first.index(end)
    assert stop <= 2
    assert set(first[stop:]) == {end}, "without a padding token, the end token fills"
    everything = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=())[:, ids.shape[1] :]
    assert torch.equal(everything, free)


def test_a_padding_token_of_the_generation_config_fills(model: Decoder) -> None:
    def should_stop(new: Tensor) -> Tensor:
        return torch.tensor([new.shape[1] >= 2, new.shape[1] >= 5])

    model.generation_config = {"pad_token_id": 96}
    new = model.generate(token_ids(2, 4), max_new_tokens=NEW, should_stop=should_stop)[:, 4:]
    assert new[0, 2:].tolist() == [96, 96, 96]
    assert new.shape == (2, 5)


def test_positions_beyond_the_models_are_warned_of_once() -> None:
    short = from_config({**TINY, "max_position_embeddings": 8}, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert short.generate(token_ids(1, 5), max_new_tokens=4, eos_token_id=()).shape == (1, 9)
    for prompt, new in ((5, 5), (5, 9), (9, 2)):
        with pytest.warns(UserWarning, match=r"beyond the 8 positions .*max_position_embeddings") as caught:
            assert short.generate(token_ids(1, prompt), max_new_tokens=new, eos_token_id=()).shape == (1, prompt + new)
        assert len(caught) == 1
        assert caught[0].filename == __file__


def test_seeds(model: Decoder) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        return model.generate(token_ids(3, 4), max_new_tokens=NEW, temperature=1.0, seed=seed).tolist()

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    torch.manual_seed(0)
    first = draw(None)
    assert draw(None) != first
    torch.manual_seed(0)
    assert draw(None) == first


def test_top_k_1_is_greedy(model: Decoder) -> None:
    greedy = model.generate(token_ids(3, 4), max_new_tokens=NEW)
    assert torch.equal(model.generate(token_ids(3, 4), max_new_tokens=NEW, temperature=1.5, top_k=1, seed=0), greedy)
    assert torch.equal(model.generate(token_ids(3, 4), max_new_tokens=NEW, temperature=1.5, top_p=1e-9, seed=0), greedy)


def test_should_stop_ends_rows(model: Decoder) -> None:
    seen = []

    def should_stop(new: Tensor) -> Tensor:
        seen.append(new.shape)
        return torch.tensor([new.shape[1] >= 2, new.shape[1] >= 5])

    ids = token_ids(2, 4)
    free = model.generate(ids, max_new_tokens=NEW)
    stopped = model.generate(ids, max_new_tokens=NEW, should_stop=should_stop, pad_token_id=96)
    assert stopped.shape == (2, 9)
    assert torch.equal(stopped[1], free[1, :9])
    assert stopped[0].tolist() == [*free[0, :6].tolist(), 96, 96, 96]
    assert seen == [(2, n) for n in range(1, 6)]


def test_modes_are_put_back_however_rows_are_ended(model: Decoder) -> None:
    model.train()
    ids = token_ids(2, 4)
    stopped = model.generate(ids, max_new_tokens=NEW, should_stop=lambda new: torch.ones(len(new), dtype=torch.bool))
    assert stopped.shape == (2, 5)
    assert model.training

    def failing(new: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        model.generate(ids, max_new_tokens=NEW, should_stop=failing)
    assert model.training


def test_generation_neither_trains_nor_drops(model: Decoder) -> None:
    q_proj = model.model.layers[0].self_attn.q_proj
    model.requires_grad_(False)
    q_proj.attach_lora(torch.randn(2, 32), torch.randn(32, 2), scaling=1.0, dropout=0.9)
    model.train()
    first = model.generate(PROMPTS[0], max_new_tokens=NEW)
    assert torch.equal(model.generate(PROMPTS[0], max_new_tokens=NEW), first)
    assert model.training
    assert q_proj.training
    model.eval()
    assert torch.equal(model.generate(PROMPTS[0], max_new_tokens=NEW), first)
    assert not model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 3, "temperature": -1.0}, "temperature must be"),
        ({"max_new_tokens": 3, "eos_token_id": 97}, r"eos_token_id must lie in 0\.\.96"),
        ({"max_new_tokens": 3, "pad_token_id": -2, "eos_token_id": [1, -1]}, "eos_token_id must lie"),
        ({"max_new_tokens": 3, "eos_token_id": ["1"]}, r"eos_token_id must lie in 0\.\.96 .*, got '1'"),
        ({"max_new_tokens": 3, "pad_token_id": 200}, r"pad_token_id must lie in 0\.\.96"),
        ({"max_new_tokens": 3, "attention_mask": torch.zeros(1, 4)}, "attention_mask row 0 has no token"),
    ],
    ids=str,
)
def test_wrong_options(model: Decoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(token_ids(1, 4), **options)


def test_a_row_draws_what_it_would_alone(model: Decoder) -> None:
    ids, mask = left_padded(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "eos_token_id": ()}
    together = model.generate(ids, mask, seed=7, **options)[:, ids.shape[1] :]
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, seed=7 + row, **options)[0, len(prompt) :]
        assert together[row].tolist() == alone.tolist()
    assert len({tuple(row) for row in together.tolist()}) == len(PROMPTS)


def test_penalties_make_repetition_rare(model: Decoder) -> None:
    prompt = token_ids(1, 6)
    free = model.generate(prompt, max_new_tokens=NEW)[0, 6:].tolist()
    assert len(set(free)) < NEW
    for name in ("frequency_penalty", "presence_penalty"):
        new = model.generate(prompt, max_new_tokens=NEW, **{name: 1e4})[0, 6:].tolist()
        assert len(set(new)) == NEW, "so much that no token comes twice"


def test_rows_that_wait_for_their_turn(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts than rows: rounds are told when all rows have come so far, and results are the same."""

    def generated() -> tuple[Tensor, list[Any]]:
        told = []

        def should_stop(new: Tensor) -> Tensor:
            told.append(new.tolist())
            return torch.tensor([new.shape[1] >= 4 + 3 * row for row in range(len(PROMPTS))])

        ids, mask = left_padded(PROMPTS)
        return model.generate(ids, mask, max_new_tokens=NEW, should_stop=should_stop, pad_token_id=96), told

    expected, told = generated()
    assert [len(new[0]) for new in told] == list(range(1, 14))
    monkeypatch.setattr("slothcore.models.generation.MOST_ROWS", 2)
    actual, told_in_turns = generated()
    assert torch.equal(actual, expected)
    assert told_in_turns == told
