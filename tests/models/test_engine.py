"""Continuous batching: every request gets what it would get alone, whatever is decoded beside it and in which way."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import slothcore
from slothcore.kernels import lora_factors_eager
from slothcore.models.decode_steps import MOST_GRAPHS, WISHES, lanes_for
from slothcore.models.decoder import Decoder
from slothcore.models.engine import TURN, Engine
from slothcore.models.load import from_config, load_model
from slothcore.models.requests import Request
from slothcore.models.sampling import Sampling
from tests.models.engines import SIXTEEN, WAYS, alone, requests_of, run, tokens_of
from tests.models.graph_models import VARIANTS, as_function
from tests.models.test_config import TINY
from tests.models.tiny import token_ids
from tests.models.zoo import saved as saved_variant
from tests.models.zoo import tiny_model

NEW = 24
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=20),
    Sampling(temperature=1.2, top_p=0.9, min_p=0.01),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=0.9, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.1),
]


@pytest.fixture
def model() -> Decoder:
    return from_config({**TINY, "num_key_value_heads": 2, "initializer_range": 0.3}, device="cpu").eval()


def mixed_requests() -> list[Request]:
    """Sixteen prompts with every kind of sampling, of different lengths."""
    return [
        Request(prompt_ids=prompt, max_new_tokens=NEW - i, sampling=SAMPLINGS[i % len(SAMPLINGS)], seed=i)
        for i, prompt in enumerate(SIXTEEN)
    ]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_mixed_requests_get_what_each_gets_alone(model: Decoder, way: dict[str, Any]) -> None:
    requests = mixed_requests()
    expected = [alone(model, request) for request in requests]
    assert len({tuple(tokens[:8]) for tokens in expected}) > 12, "equal answers would prove little"
    engine = Engine(model, **way)
    for _ in range(2):
        assert tokens_of(engine, requests) == expected
    assert (engine.steps.replays > 0) == ("recorder" in way)


def test_a_request_may_come_at_any_time(model: Decoder) -> None:
    requests = mixed_requests()
    expected = [alone(model, request) for request in requests]
    engine = Engine(model, max_rows=4, ahead=True, recorder=as_function, capacity=128)
    got: dict[int, list[int]] = {}
    waiting = list(requests)
    steps = 0
    while engine.has_work or waiting:
        if waiting and steps % 3 == 0:
            got[engine.add(waiting.pop(0))] = []
        for event in engine.step():
            got[event.id].append(event.token)
        steps += 1
    assert list(got.values()) == expected


def test_what_is_put_back_is_read_again_and_goes_on(model: Decoder) -> None:
    """Three rows that need two pages each in the end, and a pool of four."""
    prompts = [token_ids(50, seed=seed).tolist() for seed in range(3)]
    requests = requests_of(prompts, 40, sampling=Sampling(temperature=1.0, frequency_penalty=0.5), seed=3)
    expected = [alone(model, request) for request in requests]
    for ahead in (False, True):
        engine = Engine(model, max_rows=3, capacity=96, cache_tokens=4 * 64, ahead=ahead)
        lengths: list[int] = []
        handle = model.model.register_forward_pre_hook(lambda module, args, seen=lengths: seen.append(len(args[0])))
        assert tokens_of(engine, requests) == expected
        handle.remove()
        assert lengths[0] == 150
        assert any(length > 50 for length in lengths[1:]), "no text was read again"


def test_prompts_are_read_packed_up_to_a_number_of_tokens(model: Decoder) -> None:
    passes: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    prompts = [token_ids(length, seed=length).tolist() for length in (30, 30, 90, 5, 5)]
    run(Engine(model, prefill_tokens=64), requests_of(prompts, 2))
    handle.remove()
    # A pass of decoding goes between two passes over prompts; what is complete takes no part in the last.
    assert passes == [60, 2, 90, 1, 10, 2]


def test_the_host_is_one_pass_ahead(model: Decoder) -> None:
    """An end that is known a pass late costs a token that nobody sees; a known length costs none."""
    passes: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    prompt = token_ids(9).tolist()
    engine = Engine(model, ahead=True, capacity=64)
    engine.add(Request(prompt_ids=prompt, max_new_tokens=3))
    events = [engine.step() for _ in range(4)]
    assert [len(events_of_step) for events_of_step in events] == [0, 1, 1, 1]
    assert passes == [9, 1, 1]
    tokens = [event[0].token for event in events[1:]]
    assert not engine.has_work
    passes.clear()
    end = Request(prompt_ids=prompt, max_new_tokens=30, eos_ids=frozenset(tokens[1:2]))
    found = [event.token for event in run(engine, [end])[0]]
    handle.remove()
    assert found == tokens[: tokens.index(tokens[1]) + 1]
    assert len(passes) == 1 + len(found)


@pytest.mark.parametrize("ahead", [False, True])
def test_ends(model: Decoder, ahead: bool) -> None:
    prompt = token_ids(5).tolist()
    free = alone(model, Request(prompt_ids=prompt, max_new_tokens=NEW))
    told: list[list[int]] = []

    def should_stop(tokens: list[int]) -> bool:
        told.append(tokens)
        return len(tokens) == 7

    requests = [
        Request(prompt_ids=prompt, max_new_tokens=4),
        Request(prompt_ids=prompt, max_new_tokens=NEW, eos_ids=frozenset([free[5]])),
        Request(prompt_ids=prompt, max_new_tokens=NEW, should_stop=should_stop),
        Request(prompt_ids=prompt, max_new_tokens=7, should_stop=should_stop),
    ]
    found = run(Engine(model, ahead=ahead), requests)
    ends = [4, free.index(free[5]) + 1, 7, 7]
    assert [[event.token for event in events] for events in found] == [free[:end] for end in ends]
    assert [events[-1].finished for events in found] == ["length", "stop", "stop", "stop"]
    assert sorted(told, key=len) == [free[:n] for n in range(1, 8) for _ in range(2)]


@torch.no_grad()
def test_log_probabilities_are_those_of_the_whole_text(model: Decoder) -> None:
    """Of the model's own scores, whatever temperature and penalties did to them; only where they were asked for."""
    sampling = Sampling(temperature=1.5, frequency_penalty=0.5)
    prompts = SIXTEEN[:4]
    wanted = [None, 0, 3, 20]
    requests = [
        Request(prompt_ids=prompt, max_new_tokens=NEW, sampling=sampling, seed=5, logprobs=count)
        for prompt, count in zip(prompts, wanted, strict=True)
    ]
    found = run(Engine(model, recorder=as_function, ahead=True), requests)
    plain = requests_of(prompts, NEW, sampling=sampling, seed=5)
    assert [[event.token for event in events] for events in found] == [alone(model, request) for request in plain]
    assert all(event.logprob is None and event.top_logprobs == () for event in found[0])
    for prompt, count, events in list(zip(prompts, wanted, found, strict=True))[1:]:
        text = torch.tensor([*prompt, *(event.token for event in events)])
        expected = model(text).logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for row, event in zip(expected, events, strict=True):
            assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
            assert [logprob for _, logprob in event.top_logprobs] == pytest.approx(
                row.topk(count or 0).values.tolist(), abs=1e-4
            )
            for token, logprob in event.top_logprobs:
                assert logprob == pytest.approx(float(row[token]), abs=1e-4)


@pytest.mark.parametrize("ahead", [False, True])
def test_cancelled_requests_are_silent_and_others_go_on(model: Decoder, ahead: bool) -> None:
    requests = requests_of(SIXTEEN[:5], NEW)
    expected = [alone(model, request) for request in requests]
    engine = Engine(model, max_rows=3, ahead=ahead)
    numbers = [engine.add(request) for request in requests]
    got: dict[int, list[int]] = {number: [] for number in numbers}
    for step in range(1000):
        if step == 4:
            engine.cancel(numbers[1])  # under way
            engine.cancel(numbers[4])  # waiting
        for event in engine.step():
            assert step < 4 or event.id not in (numbers[1], numbers[4])
            got[event.id].append(event.token)
        if not engine.has_work:
            break
    engine.cancel(numbers[0])
    engine.cancel(999)
    assert [got[numbers[i]] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert 0 < len(got[numbers[1]]) < NEW
    assert got[numbers[4]] == []
    # Every row and page is free again.
    assert tokens_of(engine, requests) == expected


@pytest.mark.parametrize("way", ["outside", "inside"])
def test_the_last_request_may_be_cancelled(model: Decoder, way: str) -> None:
    """Between steps, or by its own `should_stop`: without work all is as before."""
    expected = alone(model, Request(prompt_ids=[1, 2, 3], max_new_tokens=NEW))
    model.train()
    engine = Engine(model, ahead=True, recorder=as_function, capacity=64)
    numbers: list[int] = []

    def cancels(tokens: list[int]) -> bool:
        if way == "inside" and len(tokens) == 3:
            engine.cancel(numbers[0])
        return len(tokens) == 3

    numbers.append(engine.add(Request(prompt_ids=[1, 2, 3], max_new_tokens=NEW, should_stop=cancels)))
    events = [event for _ in range(3) for event in engine.step()]
    assert not model.training
    if way == "outside":
        engine.cancel(numbers[0])
    else:
        events += engine.step()
    assert [event.token for event in events] == expected[:2]
    assert (engine.has_work, model.training) == (False, True)
    assert tokens_of(engine, [Request(prompt_ids=[1, 2, 3], max_new_tokens=NEW)]) == [expected]


def test_two_engines_on_one_model(model: Decoder) -> None:
    """The one that ends first takes neither eval mode nor the norms of DoRA from the other."""
    slothcore.add_lora(model, r=4, lora_alpha=16, lora_dropout=0.5, use_dora=True)
    set_factors(model, 0)
    request = Request(prompt_ids=[1, 2, 3], max_new_tokens=NEW)
    expected = alone(model, request)
    layer = model.model.layers[0].self_attn.q_proj
    model.train()
    long, short = Engine(model, capacity=64), Engine(model, capacity=64)
    number = long.add(request)
    tokens = [event.token for event in long.step()]
    norms = layer.known_norms
    assert tokens_of(short, [Request(prompt_ids=[4, 5], max_new_tokens=2)])
    assert not model.training
    assert layer.known_norms is norms is not None
    while long.has_work:
        tokens += [event.token for event in long.step() if event.id == number]
    assert tokens == expected
    assert model.training
    assert layer.known_norms is None


def test_the_default_device_is_ignored(model: Decoder) -> None:
    requests = mixed_requests()
    expected = tokens_of(Engine(model, capacity=192), requests)
    prompt = torch.tensor(SIXTEEN[1])
    text = model.generate(prompt, max_new_tokens=NEW)
    with torch.device("meta"):
        assert tokens_of(Engine(model, capacity=192), requests) == expected
        assert torch.equal(model.generate(prompt, max_new_tokens=NEW), text)
        assert list(model.stream(SIXTEEN[1], max_new_tokens=NEW)) == text[0, len(prompt) :].tolist()
        model.generate(prompt, max_new_tokens=1, temperature=1.0)  # which takes a seed


def test_a_cache_has_pages_for_rows_that_have_texts(model: Decoder) -> None:
    engine = Engine(model, max_rows=3, capacity=100)
    assert engine._cache.free_tokens == 3 * 128


def with_lora(model: Decoder, seed: int = 0) -> Decoder:
    slothcore.add_lora(model, r=4, lora_alpha=16)
    set_factors(model, seed)
    return model


@torch.no_grad()
def set_factors(model: Decoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def test_factors_are_joined_once_and_again_when_they_change(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with_lora(model)
    joined: list[int] = []
    original = lora_factors_eager.pack_factors
    monkeypatch.setattr(
        lora_factors_eager, "pack_factors", lambda *args, **named: joined.append(1) or original(*args, **named)
    )
    engine = Engine(model, capacity=128, recorder=as_function)
    requests = requests_of(SIXTEEN[:4], NEW)
    first = tokens_of(engine, requests)
    # q, k and v; o; gate and up; down.
    groups = 4 * len(model.model.layers)
    assert len(joined) == groups
    ids = token_ids(1, 9)
    for seed in (1, 2):
        set_factors(model, seed)
        loss = model(ids, labels=ids).loss
        loss.backward()
        joined.clear()
        second = tokens_of(engine, requests)
        assert len(joined) == groups, "once for all passes"
        assert second == tokens_of(Engine(model, capacity=128), requests) != first
        assert torch.equal(model(ids, labels=ids).loss, loss), "what learns joins its own"
    model.model.layers[0].mlp.down_proj.lora_B = torch.nn.Parameter(model.model.layers[0].mlp.down_proj.lora_B * 3)
    assert tokens_of(engine, requests) == tokens_of(Engine(model, capacity=128), requests) != second


def test_real_adapters_take_turns(model: Decoder, tmp_path: Path) -> None:
    """Over one base: each request gets what it gets from a model that has this adapter alone."""
    from slothcore.lora.several import SeveralAdapters

    base = copy.deepcopy(model)
    expected, names = {}, ("a", "b")
    for seed, name in enumerate(names):
        single = with_lora(copy.deepcopy(base), seed)
        slothcore.save_adapter(single, tmp_path / name)
        expected[name] = single.eval()
    adapters = SeveralAdapters(base, {name: tmp_path / name for name in names})
    engine = Engine(base, adapters=adapters, ahead=True, recorder=as_function, capacity=192)
    for order in (("a", "b", None), (None, "b", "a"), ("b", "b", "a")):
        requests = requests_of(SIXTEEN[:3], 2 * TURN)
        wanted = [alone(expected.get(name or "", model), r) for name, r in zip(order, requests, strict=True)]
        named = [
            Request(prompt_ids=r.prompt_ids, max_new_tokens=2 * TURN, adapter=name)
            for name, r in zip(order, requests, strict=True)
        ]
        assert tokens_of(engine, named) == wanted
        adapters.use("a")  # somebody else's choice in between


class Factors:
    """Two sets of factors that change the head's weight; counts how often they take turns."""

    def __init__(self, model: Decoder) -> None:
        self.weight = model.lm_head.weight.detach()
        base = self.weight.clone()
        self.values = {None: base, "a": base.flip(0).contiguous(), "b": -base}
        self.current: str | None = None
        self.changes = 0

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def use(self, name: str | None) -> None:
        self.changes += name != self.current
        self.current = name
        self.weight.copy_(self.values[name])


def test_sets_of_factors_take_turns(model: Decoder) -> None:
    adapters = Factors(model)
    names = [None, "a", "b", "a", None, "b", "a", None]
    requests = [
        Request(prompt_ids=prompt, max_new_tokens=3 * TURN, adapter=name)
        for prompt, name in zip(SIXTEEN, names, strict=False)
    ]
    expected = []
    for request in requests:
        adapters.use(request.adapter)
        expected.append(alone(model, Request(prompt_ids=request.prompt_ids, max_new_tokens=3 * TURN)))
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    adapters.changes = 0
    engine = Engine(model, adapters=adapters, ahead=True, recorder=as_function)
    order: list[int] = []
    numbers = [engine.add(request) for request in requests]
    got: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            got[event.id].append(event.token)
            order.append(event.id)
    assert list(got.values()) == expected
    assert adapters.changes >= 8, "nobody waits until another set has ended"
    assert len(set(order[: 8 * TURN])) == len(names)
    with pytest.raises(ValueError, match="there is no adapter 'c'; load it first"):
        engine.add(Request(prompt_ids=[1], max_new_tokens=1, adapter="c"))
    with pytest.raises(ValueError, match="there is no adapter 'a'"):
        Engine(model).add(Request(prompt_ids=[1], max_new_tokens=1, adapter="a"))


def test_a_set_has_its_turn_while_another_gets_requests_all_the_time(model: Decoder) -> None:
    engine = Engine(model, adapters=Factors(model), capacity=64)
    rare = None
    for step in range(3 * TURN):
        # A pause at the beginning, so that it is after a pass over prompts that the turn of the other one comes.
        if step not in (1, 2):
            engine.add(Request(prompt_ids=[1, 2], max_new_tokens=3, adapter="a"))
        if step == 3:
            rare = engine.add(Request(prompt_ids=[1, 2], max_new_tokens=1, adapter="b"))
        if any(event.id == rare for event in engine.step()):
            return
    pytest.fail("it has waited for ever")


@pytest.mark.parametrize(("pages", "length"), [(4, 20), (5, 20)])
def test_a_request_gets_its_room_while_another_set_wants_it_all_the_time(
    model: Decoder, pages: int, length: int
) -> None:
    """Also where it is put back in between: requests of other sets that came later do not overtake it."""
    engine = Engine(model, adapters=Factors(model), max_rows=8, capacity=190, cache_tokens=pages * 64)

    def add(seed: int, length: int, new: int, adapter: str) -> int:
        prompt = token_ids(length, seed=seed).tolist()
        return engine.add(Request(prompt_ids=prompt, max_new_tokens=new, adapter=adapter))

    under_way = {add(seed, length, 70, "b") for seed in range(2)}
    rare = add(9, 60, 100, "a")
    for step in range(600):
        while len(under_way) < 12:
            under_way.add(add(step, length, 70, "b"))
        for event in engine.step():
            if event.finished and event.id == rare:
                return
            if event.finished:
                under_way.remove(event.id)
    pytest.fail("it has waited for ever")


def test_modes_are_put_back_also_by_an_error(model: Decoder) -> None:
    request = Request(prompt_ids=[1, 2, 3], max_new_tokens=6)
    expected = alone(model, request)
    model.train()
    engine = Engine(model, capacity=64)
    engine.add(request)
    assert model.training
    engine.step()
    assert not model.training

    def failing(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = model.model.layers[1].register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()
    handle.remove()
    assert model.training
    assert not engine.has_work
    assert tokens_of(engine, [request]) == [expected]
    assert model.training
    engine.add(request)
    engine.step()
    engine.close()
    assert (model.training, engine.has_work) == (True, False)


def test_what_was_recorded_is_forgotten_when_the_model_changes(model: Decoder) -> None:
    engine = Engine(model, recorder=as_function, capacity=64)
    request = Request(prompt_ids=[1, 2, 3], max_new_tokens=6)
    first = tokens_of(engine, [request])
    assert (engine.steps.eager, engine.steps.replays) == (1, 4)
    tokens_of(engine, [request])
    assert (engine.steps.eager, engine.steps.replays) == (1, 9)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    assert tokens_of(engine, [request]) != first
    assert (engine.steps.eager, engine.steps.replays) == (2, 13)


def test_a_step_that_cannot_be_recorded_is_run_by_python(model: Decoder) -> None:
    def refusing(function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    request = Request(prompt_ids=[1, 2, 3], max_new_tokens=6)
    engine = Engine(model, recorder=refusing)
    with pytest.warns(UserWarning, match=r"of 1 rows cannot be captured as a CUDA graph \(operation not permitted"):
        assert tokens_of(engine, [request]) == [alone(model, request)]
    assert (engine.steps.eager, engine.steps.replays) == (5, 0)


def test_lanes() -> None:
    assert [lanes_for(n) for n in (1, 2, 3, 5, 16, 17, 32, 33, 48, 49, 65, 97, 128, 129, 200)] == [
        *(1, 2, 4, 8, 16, 32, 32, 48, 48, 64, 96, 128, 128, 192, 256)
    ]
    assert all(n <= lanes_for(n) < 2 * n or n == 1 for n in range(1, 300))
    assert len({lanes_for(n) for n in range(1, 257)}) <= MOST_GRAPHS


def test_few_rows_ride_in_a_larger_recorded_step(model: Decoder) -> None:
    """Recording takes longer than a few steps with idle lanes; what comes often gets a shape of its own."""
    engine = Engine(model, recorder=as_function, capacity=256)
    tokens_of(engine, requests_of(SIXTEEN[:8], 4))
    assert (engine.steps.eager, engine.steps.replays) == (1, 2)
    request = Request(prompt_ids=SIXTEEN[0], max_new_tokens=WISHES + 1)
    assert tokens_of(engine, [request]) == [alone(model, request)]
    assert (engine.steps.eager, engine.steps.replays) == (1, 2 + WISHES)
    assert tokens_of(engine, [request]) == [alone(model, request)]
    assert (engine.steps.eager, engine.steps.replays) == (2, 2 + 2 * WISHES - 1)


def test_wrong_numbers(model: Decoder) -> None:
    for options, message in (
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"prefill_tokens": 0}, "prefill_tokens must be at least 1"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"capacity": 200, "cache_tokens": 64}, "no room for a request of 200 tokens: cache_tokens is 64; raise it"),
        ({"cache_tokens": 0}, "no room for a request"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, **options)
    assert Engine(model, cache_tokens=100).capacity == 128
    engine = Engine(model, capacity=20)
    for options, message in (
        ({"prompt_ids": [1] * 15, "max_new_tokens": 6}, "15 tokens and may get 6 more, but a request may have 20"),
        ({"prompt_ids": [1, 97], "max_new_tokens": 6}, r"prompt_ids must lie in 0\.\.96 .*, got 97"),
        ({"prompt_ids": [-1], "max_new_tokens": 6}, "got -1"),
        ({"prompt_ids": [], "max_new_tokens": 6}, "at least one token"),
        ({"prompt_ids": [1], "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"prompt_ids": [1], "max_new_tokens": 1, "seed": -1}, "seed must lie in"),
        ({"prompt_ids": [1], "max_new_tokens": 1, "logprobs": 21}, r"logprobs must lie in 0\.\.20"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(Request(**options))
    assert not engine.has_work
    assert engine.step() == []


def test_no_row_is_put_back_where_keys_would_be_turned_anew(tmp_path) -> None:
    """With dynamic RoPE a longer text turns keys otherwise, and those in the cache stay as they were."""
    dynamic = next(variant for variant in VARIANTS if "dynamic" in str(variant))
    saved_variant(tiny_model(dynamic), tmp_path)
    requests = requests_of(SIXTEEN, 40)
    expected = tokens_of(Engine(load_model(tmp_path, bits=32, device="cpu"), capacity=256), requests)
    few_pages = Engine(load_model(tmp_path, bits=32, device="cpu"), capacity=192, cache_tokens=6 * 64)
    assert tokens_of(few_pages, requests) == expected
