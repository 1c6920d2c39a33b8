"""Tokens one by one: those of `generate`, also behind what a cache kept from the turn before."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slothcore
from slothcore.models.decoder import Decoder
from slothcore.models.engine import Engine
from slothcore.models.load import from_config
from slothcore.models.requests import Request
from slothcore.models.streaming import SMALLEST_CACHE, TextCache
from slothcore.models.vocabulary import start_rows
from tests.models.engines import tokens_of
from tests.models.test_config import TINY
from tests.models.test_generation_rope import DYNAMIC, LONGROPE, ORIGINAL, build
from tests.models.tiny import token_ids
from tests.models.zoo import FAMILIES_TINY, Variant

NEW = 12
# One of each family, with its windows, soft caps, norms of heads and experts.
ZOO = [variants[0] for variants in FAMILIES_TINY.values()]


@pytest.fixture
def model() -> Decoder:
    return from_config({**TINY, "num_key_value_heads": 2, "initializer_range": 0.3}, device="cpu").eval()


def generated(model: Decoder, prompt: list[int], **options: Any) -> list[int]:
    options = {"max_new_tokens": NEW, "eos_token_id": (), **options}
    return model.generate(torch.tensor(prompt), **options)[0, len(prompt) :].tolist()


def streamed(model: Decoder, prompt: list[int], **options: Any) -> list[int]:
    return list(model.stream(prompt, **{"max_new_tokens": NEW, "eos_token_id": (), **options}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"temperature": 1.3, "seed": 3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 7},
    ],
    ids=str,
)
def test_the_tokens_are_those_of_generate(model: Decoder, options: dict[str, Any]) -> None:
    for length in (1, 2, 9):
        prompt = token_ids(length, seed=length).tolist()
        assert streamed(model, prompt, **options) == generated(model, prompt, **options)
    assert len(set(streamed(model, prompt, **options))) > 2


def test_an_end_token_is_the_last(model: Decoder) -> None:
    prompt = token_ids(5).tolist()
    free = generated(model, prompt)
    end = free[4]
    assert streamed(model, prompt, eos_token_id=end) == free[: free.index(end) + 1]
    model.generation_config = {"eos_token_id": [end]}
    assert streamed(model, prompt, eos_token_id=None) == free[: free.index(end) + 1]


def test_a_token_is_computed_when_it_is_asked_for_and_modes_are_put_back(model: Decoder) -> None:
    model.train()
    cache = TextCache(model)
    tokens = model.stream(token_ids(5), max_new_tokens=NEW, eos_token_id=(), cache=cache)
    assert (cache.tokens_read, model.training) == (0, True)
    next(tokens)
    assert (cache.tokens_read, model.training) == (5, False)
    assert torch.is_grad_enabled(), "between the tokens the caller's own work is not changed"
    next(tokens)
    assert cache.tokens_read == 6
    tokens.close()
    assert model.training


def test_streams_may_lie_open_beside_each_other(model: Decoder) -> None:
    slothcore.add_lora(model, r=4, lora_alpha=16, lora_dropout=0.5, init_lora_weights=False)
    prompts = [token_ids(5, seed=seed).tolist() for seed in range(2)]
    expected = generated(model, prompts[1])
    model.train()
    first, second = (model.stream(prompt, max_new_tokens=NEW, eos_token_id=()) for prompt in prompts)
    next(first)
    tokens = [next(second), next(second)]
    first.close()
    assert not model.training
    assert [*tokens, *second] == expected
    assert model.training


@torch.no_grad()
def test_what_other_weights_have_read_is_read_again(model: Decoder) -> None:
    cache, prompt = TextCache(model), token_ids(9).tolist()

    def read() -> int:
        before = cache.tokens_read
        assert streamed(model, prompt, cache=cache) == generated(model, prompt)
        return cache.tokens_read - before

    v_proj = model.model.layers[0].self_attn.v_proj
    everything, newest = 9 + NEW - 1, NEW
    assert [read(), read()] == [everything, newest]
    v_proj.weight.neg_()
    assert [read(), read()] == [everything, newest]
    v_proj.weight = torch.nn.Parameter(v_proj.weight * 2)
    assert [read(), read()] == [everything, newest]
    model.train()  # what writes past torch's own count
    v_proj.weight.data.mul_(-1)
    assert [read(), read()] == [everything, everything]
    model.eval()
    assert [read(), read()] == [everything, newest]
    model.train()
    v_proj.weight.data.mul_(-1)
    model.eval()  # it has learned between two texts
    assert [read(), read()] == [everything, newest]


@torch.no_grad()
def test_a_weight_where_an_older_one_lay_is_another_weight(model: Decoder) -> None:
    """An allocator gives the same address again, and both tensors are at version 0."""
    cache, prompt = TextCache(model), token_ids(9).tolist()
    v_proj = model.model.layers[0].self_attn.v_proj
    room = v_proj.weight.detach().clone()
    for _ in range(2):
        v_proj.weight = torch.nn.Parameter(torch.from_numpy(room.numpy()))
        assert v_proj.weight.data_ptr() == room.data_ptr()
        assert streamed(model, prompt, cache=cache) == generated(model, prompt)
        room.numpy()[:] *= -1


@torch.no_grad()
def test_another_scaling_of_the_factors_is_noticed(model: Decoder) -> None:
    slothcore.add_lora(model, r=4, lora_alpha=16, init_lora_weights=False).eval()
    cache, prompt = TextCache(model), token_ids(9).tolist()
    for scaling in (4.0, -3.0):
        for layer in model.modules():
            if getattr(layer, "lora_A", None) is not None:
                layer.lora_scaling = scaling
        before = cache.tokens_read
        assert streamed(model, prompt, cache=cache) == generated(model, prompt)
        assert cache.tokens_read - before == 9 + NEW - 1


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("recorder", [None, lambda step: step], ids=["eager", "recorded"])
@torch.no_grad()
def test_factors_that_have_learned_between_two_texts(model: Decoder, use_dora: bool, recorder: Any) -> None:
    """Also DoRA's norms are those of the new ones, which are made of what is kept of the factors."""
    torch.manual_seed(5)
    slothcore.add_lora(model, r=4, lora_alpha=16, use_dora=use_dora, init_lora_weights=False).eval()
    cache, prompt = TextCache(model, recorder=recorder), token_ids(9).tolist()
    for turn in range(6):
        options = {"temperature": 1.0, "seed": turn}
        assert streamed(model, prompt, cache=cache, **options) == generated(model, prompt, **options)
        layer = model.model.layers[turn % 2].self_attn.v_proj
        (layer.lora_A if turn % 3 else layer.lora_B).mul_(3)


@pytest.mark.parametrize("recorder", [None, lambda step: step], ids=["eager", "recorded"])
def test_a_vocabulary_may_grow_between_two_texts(model: Decoder, recorder: Any) -> None:
    cache, before = TextCache(model, recorder=recorder), model.config.vocab_size
    prompt = token_ids(9).tolist()
    for _ in range(2):
        streamed(model, prompt, cache=cache)
    start_rows(model, [before, before + 1])
    with torch.no_grad():
        model.lm_head.weight[before] = 100 * model.lm_head.weight[streamed(model, [before], max_new_tokens=1)[0]]
    for options in ({}, {"top_k": before + 1, "temperature": 3.0, "seed": 2}, {"frequency_penalty": 1.5}):
        for ids in ([*prompt, before, before + 1], prompt):
            assert streamed(model, ids, cache=cache, **options) == generated(model, ids, **options)
    assert before in streamed(model, prompt, cache=cache), "the new token can be written as well"


@pytest.mark.parametrize("recorder", [None, lambda step: step], ids=["eager", "recorded"])
@pytest.mark.parametrize("begins_in", [False, True])
def test_inference_mode_may_begin_and_end_between_any_two_texts(model: Decoder, begins_in: bool, recorder: Any) -> None:
    """Its tensors, such as known norms of DoRA, may not be written to outside of it."""
    slothcore.add_lora(model, r=4, lora_alpha=16, use_dora=True, init_lora_weights=False).eval()
    text, options = token_ids(9).tolist(), {"repetition_penalty": 1.3, "temperature": 0.9, "seed": 2}
    with torch.inference_mode(begins_in):
        cache = TextCache(model, recorder=recorder)
        engine = Engine(model, capacity=64, recorder=recorder)
    for turn in range(6):
        with torch.inference_mode((turn % 3 == 0) == begins_in):
            expected = generated(model, text, **(options if turn % 2 else {}))
            request = Request(prompt_ids=text, max_new_tokens=NEW, seed=0)
            if not turn % 2:
                assert tokens_of(engine, [request]) == [expected]
        with torch.inference_mode((turn % 2 == 0) == begins_in):
            assert streamed(model, text, cache=cache, **(options if turn % 2 else {})) == expected
    model.train()
    model(torch.tensor([text]), labels=torch.tensor([text])).loss.backward()


@pytest.mark.gpu
def test_a_model_may_move_between_two_texts(model: Decoder) -> None:
    cache, prompt = TextCache(model), token_ids(9).tolist()
    for device in ("cpu", "cuda", "cpu", "cuda"):
        model.to(device)
        for _ in range(3):
            assert streamed(model, prompt, cache=cache) == generated(model, prompt)


def final_states(model: Decoder, ids: list[int]) -> Tensor:
    """The slow way: the whole text in one pass."""
    inputs = model.pack(torch.tensor(ids))
    with torch.no_grad():
        return model.model(inputs.input_ids, inputs.position_ids, inputs.documents)[-1:]


@pytest.mark.filterwarnings("ignore:.*belong to no text model")
@pytest.mark.parametrize("variant", ZOO, ids=str)
@torch.no_grad()
def test_what_is_kept_gives_what_the_whole_text_gives(variant: Variant, tmp_path: Path) -> None:
    """Texts that grow by chunks, shrink, differ in their middle and begin anew, for each family."""
    _, model = build(variant, tmp_path)
    ids = token_ids(40, seed=3).tolist()
    other = token_ids(40, seed=4).tolist()
    cache, read = TextCache(model), 0
    for text, new in (
        (ids[:7], 7),
        (ids[:20], 13),
        (ids[:21], 1),
        (ids[:30], 9),
        ([*ids[:12], *other[12:25]], 13),
        ([*ids[:12], *other[12:25]], 1),
        (ids[:13], 1),
        (other[:9], 9),
    ):
        actual = cache.read(text)
        read += new
        assert cache.tokens_read == read, "only what is new went through the model"
        torch.testing.assert_close(actual, final_states(model, text), rtol=2e-4, atol=2e-4)
        assert cache.ids == text


def test_a_later_turn_is_what_it_would_be_alone(model: Decoder) -> None:
    cache = TextCache(model)
    first = token_ids(9, seed=1).tolist()
    text = first + streamed(model, first, cache=cache)
    for turn in range(4):
        # Enough turns to outgrow the room that the cache began with.
        text += token_ids(SMALLEST_CACHE // 3, seed=turn).tolist()
        before = cache.tokens_read
        answer = streamed(model, text, cache=cache)
        assert answer == generated(model, text)
        # The last token of the answer before was chosen, but never read; and so is that of this one.
        assert cache.tokens_read - before == SMALLEST_CACHE // 3 + 1 + NEW - 1
        text += answer
    assert len(text) > SMALLEST_CACHE


@pytest.mark.filterwarnings("ignore:generation goes beyond")
@pytest.mark.parametrize("variant", [*LONGROPE, DYNAMIC], ids=str)
def test_angles_that_depend_on_the_length(variant: Variant, tmp_path: Path) -> None:
    """Across the original length, in chunks and token by token, and back."""
    _, model = build(variant, tmp_path)
    ids = token_ids(80, seed=5).tolist()
    cache = TextCache(model)
    for length in (ORIGINAL - 5, ORIGINAL - 1, ORIGINAL + 3, ORIGINAL + 9, 70, ORIGINAL - 2, ORIGINAL):
        with torch.no_grad():
            torch.testing.assert_close(
                cache.read(ids[:length]), final_states(model, ids[:length]), rtol=2e-4, atol=2e-4
            )
    for length in (3, ORIGINAL - 3, ORIGINAL, ORIGINAL + 1):
        assert streamed(model, ids[:length]) == generated(model, ids[:length])


def test_an_interrupted_pass_leaves_a_cache_that_is_right(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TextCache(model)
    first = token_ids(9, seed=1).tolist()
    streamed(model, first, cache=cache)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupted)
    text = first[:6] + token_ids(5, seed=8).tolist()
    with pytest.raises(KeyboardInterrupt):
        next(model.stream(text, max_new_tokens=3, cache=cache))
    handle.remove()
    assert cache.ids == first[:6]
    assert streamed(model, text, cache=cache) == generated(model, text)


def test_a_cache_that_cannot_grow_begins_anew(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the middle of its layers: what is left of it is of no use."""
    cache, cat, calls = TextCache(model), torch.cat, []
    first = token_ids(9, seed=1).tolist()
    streamed(model, first, cache=cache)

    def third_fails(tensors: Any, *rest: Any, **options: Any) -> Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return cat(tensors, *rest, **options)

    long = first + token_ids(SMALLEST_CACHE, seed=2).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", third_fails)
        with pytest.raises(torch.OutOfMemoryError):
            cache._make_room(len(long), len(first))
    assert cache.ids == []
    for text in (first, long):
        assert streamed(model, text, cache=cache) == generated(model, text)


def test_beyond_the_positions_there_is_one_warning(model: Decoder) -> None:
    limit = model.config.longest_document
    prompt = token_ids(limit - 2).tolist()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(model.stream(prompt, max_new_tokens=8, eos_token_id=()))) == 8
    assert [w.filename for w in caught] == [__file__]
    assert f"beyond the {limit} positions" in str(caught[0].message)


def test_wrong_arguments_are_said_at_once(model: Decoder) -> None:
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 1, "min_p": 2.0}, "min_p must lie in 0..1"),
        ({"max_new_tokens": 1, "seed": -1}, "seed must lie in"),
        ({"max_new_tokens": 1, "eos_token_id": 5000}, "eos_token_id must lie in"),
        ({"max_new_tokens": 1, "cache": TextCache(from_config(TINY, device="cpu"))}, "of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            model.stream([1, 2], **options)
    with pytest.raises(ValueError, match=r"one prompt can be streamed, \[S\]; got the shape \(1, 2\)"):
        model.stream(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        model.stream([1, 5000], max_new_tokens=1)
    with pytest.raises(ValueError, match="not empty"):
        model.stream([], max_new_tokens=1)


def test_steps_are_recorded_and_forgotten_when_the_cache_moves(model: Decoder) -> None:
    """What a graph would replay, across a growth of the cache, another conversation, and a change of the weights."""
    recorded: list[str] = []
    cache = TextCache(model, recorder=lambda step: recorded.append(step.__qualname__.partition(".")[0]) or step)
    prompt = token_ids(SMALLEST_CACHE - NEW // 2).tolist()
    sampling: dict[str, Any] = {"temperature": 0.9, "presence_penalty": 0.4, "seed": 5}
    for options in ({}, sampling):
        assert streamed(model, prompt, cache=cache, **options) == generated(model, prompt, **options)
    # Before and behind the growth, and for the other kind of step.
    assert recorded == ["DecodeSteps"] * 3
    assert streamed(model, prompt[:30], cache=cache) == generated(model, prompt[:30])
    # One token more of a text, for the second time.
    assert recorded[3:] == ["PromptPasses"]
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    assert streamed(model, prompt[:30], cache=cache) == generated(model, prompt[:30])
    assert recorded[4:] == ["DecodeSteps"]


def test_drawn_tokens_without_a_seed_follow_torchs_generator(model: Decoder) -> None:
    prompt = token_ids(5).tolist()
    torch.manual_seed(0)
    first = streamed(model, prompt, temperature=1.0)
    assert streamed(model, prompt, temperature=1.0) != first
    torch.manual_seed(0)
    assert streamed(model, prompt, temperature=1.0) == first
