"""Continuous batching on a GPU: replayed steps against the CPU, and against steps that Python runs."""

import gc
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import slothcore
from slothcore.models.engine import Engine
from slothcore.models.load import from_config, load_model
from slothcore.models.requests import Request
from slothcore.models.streaming import TextCache
from tests.models.engines import SIXTEEN, requests_of, run, tokens_of
from tests.models.graph_models import VARIANTS, as_function
from tests.models.test_decoder_gpu import SIZES
from tests.models.test_engine import mixed_requests
from tests.models.tiny import saved, tiny_llama
from tests.models.zoo import Variant, tiny_model
from tests.models.zoo import saved as saved_variant

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:generation goes beyond")]
NEW = 40
vars_of = attrgetter("id", "token", "logprob", "top_logprobs", "finished")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_family_gives_the_tokens_of_the_cpu(variant: Variant, tmp_path: Path) -> None:
    saved_variant(tiny_model(variant), tmp_path)
    requests = requests_of(SIXTEEN, NEW)
    expected = tokens_of(Engine(load_model(tmp_path, bits=32, device="cpu"), capacity=256), requests)
    engine = Engine(load_model(tmp_path, bits=32, device="cuda"), capacity=256, max_rows=12)
    assert tokens_of(engine, requests) == expected
    assert engine.steps.replays > engine.steps.eager
    few_pages = Engine(load_model(tmp_path, bits=32, device="cuda"), capacity=192, cache_tokens=6 * 64)
    assert tokens_of(few_pages, requests) == expected


@pytest.mark.parametrize("bits", [32, 4])
def test_nf4_and_an_adapter_give_the_tokens_of_the_cpu(bits: int, tmp_path: Path) -> None:
    saved(tiny_llama(**SIZES), tmp_path)
    model = load_model(tmp_path, bits=bits, dtype=torch.float32, device="cuda")
    slothcore.add_lora(model, r=4, lora_alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    requests = requests_of(SIXTEEN, NEW)
    actual = tokens_of(Engine(model, capacity=256), requests)
    assert actual == tokens_of(Engine(model.cpu(), capacity=256), requests)


CONFIG = {**SIZES, "model_type": "llama", "vocab_size": 97, "num_hidden_layers": 2, "initializer_range": 0.2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graphs_change_no_bit(dtype: torch.dtype) -> None:
    """Sixteen rows all the time, of every kind of sampling, with log-probabilities; nor does running ahead."""
    torch.manual_seed(0)
    model = from_config(CONFIG, dtype=dtype, device="cuda")
    requests = [
        Request(prompt_ids=request.prompt_ids, max_new_tokens=NEW, sampling=request.sampling, seed=1, logprobs=5)
        for request in mixed_requests()
    ]
    # Padded to the same sizes, and run by Python.
    expected = run(Engine(model, capacity=256, recorder=as_function, ahead=False), requests)
    engine = Engine(model, capacity=256)
    for _ in range(3):
        assert [[event[1:] for event in map(vars_of, own)] for own in run(engine, requests)] == [
            [event[1:] for event in map(vars_of, own)] for own in expected
        ]
    assert (engine.steps.eager, engine.prompts.eager, engine.prompts.replays) == (1, 1, 2)


def test_rows_that_come_and_go_get_what_they_get_alone() -> None:
    torch.manual_seed(0)
    model = from_config(CONFIG, dtype=torch.float32, device="cuda")
    requests = mixed_requests()
    expected = tokens_of(Engine(model, capacity=256, max_rows=1, graphs=False, ahead=False), requests)
    for options in ({}, {"max_rows": 5, "prefill_tokens": 64}, {"max_rows": 3}):
        assert tokens_of(Engine(model, capacity=256, **options), requests) == expected


def test_streams_are_replayed_too(tmp_path: Path) -> None:
    """Across the growth of their cache, which moves to new addresses."""
    saved(tiny_llama(**SIZES), tmp_path)
    model = load_model(tmp_path, bits=4, dtype=torch.float32, device="cuda")
    cache = TextCache(model)
    prompt = SIXTEEN[1]
    written = list(model.stream(prompt, max_new_tokens=600, eos_token_id=(), cache=cache))
    expected = model.generate(torch.tensor(prompt), max_new_tokens=600, eos_token_id=())
    assert written == expected[0, len(prompt) :].tolist()
    again = list(model.stream(prompt, max_new_tokens=600, eos_token_id=(), cache=cache))
    assert again == written


def test_the_host_waits_for_nothing_but_tokens(tmp_path: Path) -> None:
    """Once all sizes are recorded; also where prompts come while others are decoded."""
    model = load_model(saved(tiny_llama(**SIZES), tmp_path), bits=4, device="cuda")
    engine = Engine(model, capacity=256)

    def write() -> None:
        for step in range(10):
            if step == 3:
                for request in requests_of(SIXTEEN[4:8], 30):
                    engine.add(request)
            engine.step()

    for mode in ("default", "default", "error"):
        for request in requests_of(SIXTEEN[:4], 30):
            engine.add(request)
        engine.step()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            write()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert engine.has_work
        engine.close()
    assert (engine.prompts.eager, engine.prompts.replays) == (2, 4)


def test_memory_is_given_back(tmp_path: Path) -> None:
    model = load_model(saved(tiny_llama(**SIZES), tmp_path), bits=4, device="cuda")
    run(Engine(model, capacity=256), requests_of(SIXTEEN, 8))
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run(Engine(model, capacity=256), requests_of(SIXTEEN, 8))
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_a_cache_takes_what_memory_allows(tmp_path: Path, monkeypatch) -> None:
    model = load_model(saved(tiny_llama(**SIZES, max_position_embeddings=2**20), tmp_path), bits=4, device="cuda")
    free, total = 2**31, 2**32  # of a small GPU: other tests want memory, too
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *unused: (free, total))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = Engine(model, max_rows=512)
    taken = torch.cuda.memory_allocated() - before
    assert 0.6 * free < taken < 0.97 * free
    request = Request(prompt_ids=SIXTEEN[2], max_new_tokens=8)
    assert tokens_of(engine, [request]) == tokens_of(Engine(model, cache_tokens=1024), [request])
