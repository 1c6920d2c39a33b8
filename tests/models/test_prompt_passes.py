"""Passes over prompts in padded sizes: what the texts give as they are, whoever runs them, and where nothing moves."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.layers.kv_cache import KvCache
from slothcore.models import prompt_passes
from slothcore.models.cache_room import cache_options
from slothcore.models.decoder import Decoder
from slothcore.models.engine import Engine
from slothcore.models.generation_mode import GenerationMode
from slothcore.models.prompt_passes import SIZES as PASS_SIZES
from slothcore.models.prompt_passes import PromptPasses
from slothcore.models.requests import Request
from slothcore.models.streaming import TextCache
from tests.models.engines import SIXTEEN, alone, requests_of, tokens_of
from tests.models.graph_models import VARIANTS, as_function, tiny
from tests.models.tiny import token_ids
from tests.models.zoo import Variant

Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def passes_of(model: Decoder, recorder: Recorder | None = None, **options: Any) -> PromptPasses:
    cache = KvCache(**{**cache_options(model), "rows": 4, "capacity": 256, **options})
    for stack in (*cache.keys, *cache.values):
        stack.fill_(float("nan"))
    return PromptPasses(model, cache, recorder=recorder)


def texts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [token_ids(length, seed=seed + i).tolist() for i, length in enumerate(lengths)]


def held(passes: PromptPasses, row: int) -> list[Tensor]:
    """Keys and values of a row in every layer, in its order."""
    cache, found = passes._cache, []
    for index in range(len(cache.keys)):
        table = cache.layer(index).block_tables[row]
        kept = min(cache.lengths_on_host[row], len(table) * cache.page_size)
        at = torch.arange(cache.lengths_on_host[row] - kept, cache.lengths_on_host[row])
        places = table[at // cache.page_size % len(table)].long(), at % cache.page_size
        found += [cache.keys[index][places], cache.values[index][places]]
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padding_changes_nothing(variant: Variant) -> None:
    """Texts of two sizes, then more tokens of one, in float64: the states and all that the cache holds."""
    model = tiny(variant).eval()
    plain, padded = passes_of(model), passes_of(model, as_function)
    # Texts beyond every window; one that fills its size; as many as a size has documents, without padding.
    for lengths in ((90, 3, 20), (90, 3, 20), (100, 28), (5,), (16,), (1, 15)):
        texts = texts_of(*lengths)
        rows = [3, 0, 2][: len(texts)]
        expected, actual = plain.read(rows, texts), padded.read(rows, texts)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for row in rows:
            torch.testing.assert_close(held(padded, row), held(plain, row), rtol=1e-10, atol=1e-10)
    assert (plain.replays, plain.eager) == (0, 6)
    assert (padded.replays, padded.eager) == (4, 2)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_goes_on_may_be_padded_too(variant: Variant) -> None:
    """The padding stands behind the text, and the next tokens in its place."""
    model = tiny(variant).eval()
    windows = [None] * model.config.num_hidden_layers
    plain, padded = (passes_of(model, recorder, rows=1, windows=windows) for recorder in (None, as_function))
    for passes in (plain, padded):
        passes.read([0], texts_of(20))
    for seed, count in enumerate((1, 7, 16, 17, 40, 3)):
        (tokens,) = texts_of(count, seed=seed)
        torch.testing.assert_close(padded.read_on(0, tokens), plain.read_on(0, tokens), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(held(padded, 0), held(plain, 0), rtol=1e-10, atol=1e-10)
    # Sizes 32, 16, 16, 16, 32, 64, 16.
    assert (padded.replays, padded.eager) == (3, 4)


def test_at_the_end_of_the_cache_nothing_is_padded() -> None:
    model = tiny().eval()
    padded = passes_of(model, as_function, rows=1, capacity=40)
    padded.read([0], texts_of(20))
    lengths: list[int] = []
    model.model.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    for count in (3, 3, 3, 11):
        padded.read_on(0, token_ids(count).tolist())
    assert lengths == [16, 16, 3, 11]
    with pytest.raises(ValueError, match="holds at most 40 tokens, got 41"):
        padded.read_on(0, [1])


def test_nothing_that_a_pass_reads_moves() -> None:
    """Across texts, and other passes in between: the tensors that a graph would read are the same ones each time."""
    model = tiny().eval()
    passes, seen = passes_of(model, as_function), []

    def note(module: Any, args: Any) -> None:
        ids, positions, documents, cache = args
        current = cache.layer(0).current
        tensors = ids, positions, documents.cu_seqlens, current.rows, current.positions, current.lengths
        seen.append([(t.data_ptr(), t.shape, t.dtype) for t in tensors] + [documents.max_seqlen, cache.is_prompt])

    handle = model.model.register_forward_pre_hook(note)
    for lengths in ((20, 11), (1, 2, 3, 4), (32,), (9, 9), (30,)):
        passes.read(list(range(len(lengths))), texts_of(*lengths, seed=len(lengths)))
        if len(lengths) == 1:
            passes.read_on(0, token_ids(20).tolist())
    handle.remove()
    of_texts, going_on, small = (seen[i] for i in (0, 3, 1))
    assert seen == [of_texts, small, of_texts, going_on, of_texts, of_texts, going_on]
    assert (passes.replays, passes.eager) == (4, 3)


def test_a_replay_has_the_bits_of_the_pass_that_python_runs() -> None:
    """In float32, where another order of sums would show."""
    model = tiny().eval().float()
    model.dtype = torch.float32
    passes, texts = passes_of(model, as_function), texts_of(50, 13, 20)
    states = [passes.read([0, 1, 2], texts).clone() for _ in range(3)]
    assert (passes.replays, passes.eager) == (2, 1)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_sizes() -> None:
    passes = passes_of(tiny(), as_function)

    def size(tokens: int, documents: int = 1) -> tuple[int, int] | None:
        shape = passes._size_for(tokens, documents, goes_on=False)
        return None if shape is None else (shape.bucket.tokens, shape.bucket.documents)

    assert [size(n) for n in (1, 16, 17, 128, 129, 1025, 2048)] == [
        *((16, 16), (16, 16), (32, 16), (128, 16), (256, 16), (1280, 40), (2048, 64))
    ]
    assert size(2049) is None
    # The padding needs a slot of its own.
    assert [size(16, 16), size(15, 15), size(30, 16), size(128, 128)] == [(16, 16), (16, 16), (32, 32), (128, 128)]
    assert passes_of(tiny())._size_for(16, 1, goes_on=False) is None
    assert all(size <= 2 * below for below, size in pairwise(PASS_SIZES))


def test_passes_beyond_the_largest_size_and_the_last_graph_are_run_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_passes, "SIZES", (16, 32))
    monkeypatch.setattr(prompt_passes, "MOST_GRAPHS", 1)
    passes = passes_of(tiny().eval(), as_function)
    lengths: list[int] = []
    passes._model.model.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    for count in (3, 33, 3, 20, 20, 33, 3):
        passes.read([0], texts_of(count))
    assert lengths == [16, 33, 16, 32, 32, 33, 16]
    assert (passes.replays, passes.eager) == (2, 5)


def test_the_engine_pads_records_and_forgets() -> None:
    """Each request gets what it gets alone from an engine that pads nothing."""
    model = tiny().eval()
    requests = requests_of(SIXTEEN, 4)
    expected = [alone(model, request) for request in requests]
    engine = Engine(model, capacity=256, recorder=as_function, prefill_tokens=100)
    for _ in range(3):
        assert tokens_of(engine, requests) == expected
    assert engine.prompts.replays > 2 * engine.prompts.eager
    before = engine.prompts.eager
    layer = model.model.layers[0].mlp.down_proj
    layer.lora_B = torch.nn.Parameter(-layer.lora_B.detach())
    changed = [alone(model, request) for request in requests]
    assert changed != expected
    for _ in range(3):
        assert tokens_of(engine, requests) == changed
    assert engine.prompts.eager == 2 * before


def test_a_pass_that_cannot_be_recorded_is_run_by_python() -> None:
    """As it is, without padding; decode steps are recorded nevertheless."""
    model, lengths = tiny().eval(), []

    def refusing(function: Any) -> Any:
        if "PromptPasses" in function.__qualname__:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return function

    engine = Engine(model, recorder=refusing, capacity=64)
    request = Request(prompt_ids=token_ids(9).tolist(), max_new_tokens=5)
    expected = alone(model, request)
    handle = model.model.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    assert tokens_of(engine, [request]) == [expected]
    with pytest.warns(UserWarning, match=r"16 tokens of prompts cannot be captured .* \(operation not permitted"):
        assert tokens_of(engine, [request]) == [expected]
    assert tokens_of(engine, [request]) == [expected]
    handle.remove()
    # The pass that a recording tried is not run by a double that refuses before it has begun.
    assert [length for length in lengths if length > 1] == [16, 16, 9]
    assert (engine.prompts.replays, engine.steps.eager) == (0, 1)


def test_a_later_turn_of_a_chat_is_replayed() -> None:
    model = tiny().eval()
    cache, text = TextCache(model, recorder=as_function), token_ids(9).tolist()
    for turn in range(5):
        answer = list(model.stream(text, max_new_tokens=6, eos_token_id=(), cache=cache))
        assert answer == model.generate(torch.tensor(text), max_new_tokens=6, eos_token_id=())[0, len(text) :].tolist()
        text += [*answer, *token_ids(7 + turn, seed=turn).tolist()]
    assert cache._prompts is not None
    assert (cache._prompts.replays, cache._prompts.eager) == (3, 2)


def test_factors_are_joined_again_by_what_was_recorded() -> None:
    """Once the same pairs have been joined anew at the same places; a factor that moves is joined by Python again."""
    model, recorded = tiny().eval(), []

    def recorder(function: Any) -> Any:
        if function.__name__ == "join_again":
            recorded.append(0)
            number = len(recorded) - 1

            def replay() -> None:
                recorded[number] += 1
                function()

            return replay
        return function

    engine = Engine(model, capacity=64, recorder=recorder)
    request = Request(prompt_ids=token_ids(9).tolist(), max_new_tokens=3)

    def check(*replays: int) -> None:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.lora_B.neg_()
        assert tokens_of(engine, [request]) == [alone(model, request)]
        assert recorded == list(replays)

    check()  # nothing was joined before
    check()
    check(1)
    check(2)
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.lora_B = torch.nn.Parameter(q_proj.lora_B.detach().clone())
    check(3)  # before anybody has looked for the change
    check(3)
    check(3, 1)


def test_a_recorder_that_refuses_factors_is_not_asked_again() -> None:
    model, asked = tiny().eval(), []

    def recorder(function: Any) -> Any:
        if function.__name__ == "join_again":
            asked.append(1)
            raise RuntimeError("no")
        return function

    engine = Engine(model, capacity=64, recorder=recorder)
    request = Request(prompt_ids=token_ids(9).tolist(), max_new_tokens=3)
    expected = [alone(model, request)]
    for _ in range(5):
        assert tokens_of(engine, [request]) == expected
    assert len(asked) == 1


def as_a_graph(recorded: list[int]) -> Recorder:
    """Records the joining of factors with what is kept at that moment, as a graph would."""

    def recorder(function: Any) -> Any:
        kept = list(function.__self__._kept.values())
        recorded.append(len(kept))

        def replay() -> None:
            for each in kept:
                for place, values in zip(each.joined, each.join(), strict=True):
                    place.copy_(values)

        return replay

    return recorder


def test_other_pairs_where_older_ones_lay_are_joined_anew() -> None:
    """With another scaling, in the memory that the pair before gave back, as torch's allocator on a GPU does it."""
    recorded: list[int] = []
    mode = GenerationMode(tiny(), recorder=as_a_graph(recorded))
    lora_A, lora_B = torch.randn(8, 4), torch.randn(6, 8)
    room = torch.empty(8, 4), torch.empty(6, 8)

    def put_into_room(scaling: float) -> None:
        made: list[tuple[Tensor, Tensor]] = []

        def join() -> tuple[Tensor, Tensor]:
            made.append((lora_A.clone(), scaling * lora_B))
            if len(made) > 1:
                return made[-1]
            for place, values in zip(room, made[0], strict=True):
                place.copy_(values)
            return room

        mode.factors.joined([lora_A], [lora_B], (torch.float32, (scaling,)), join)

    for scaling in (2.0, 3.0):
        put_into_room(scaling)
        for _ in range(3):
            mode.refresh_factors()
        assert torch.equal(room[1], scaling * lora_B)
        mode.factors.forget()
    assert recorded == [1, 1]


def test_factors_that_need_no_joining_are_not_recorded() -> None:
    """As with several adapters of a model whose projections are fused: torch warns of a graph of nothing."""
    recorded: list[int] = []
    mode = GenerationMode(tiny(), recorder=as_a_graph(recorded))
    pair = torch.randn(8, 4), torch.randn(6, 8)
    mode.factors.joined([pair[0]], [pair[1]], (torch.float32, (1.0,)), lambda: pair)
    for _ in range(4):
        mode.refresh_factors()
    assert recorded == []


def test_the_default_device_is_ignored() -> None:
    model = tiny().eval()
    passes, texts = passes_of(model, as_function), texts_of(5, 4)
    expected = passes.read([0, 1], texts).clone()
    with torch.device("meta"):
        assert torch.equal(passes.read([0, 1], texts), expected)
        passes.read_on(1, texts[0])


def test_adapters_put_in_place_between_passes_are_seen() -> None:
    """By a replayed pass, whose joined factors lie where they lay."""
    model = tiny().eval()
    engine = Engine(model, capacity=64, recorder=as_function)
    request = Request(prompt_ids=token_ids(9).tolist(), max_new_tokens=2)
    answers = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        expected = alone(model, request)
        answers.add(tuple(expected))
        assert tokens_of(engine, [request]) == [expected]
    assert engine.prompts.replays == 5
    assert len(answers) > 2
