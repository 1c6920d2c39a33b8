"""A server that has warmed up answers as one that has not, and nothing of it is left but what it was for."""

from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from slothcore.inference.engine import Engine, Request, Sampling
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.several import SeveralAdapters
from slothcore.serve.warm_up import NEW_TOKENS, warm_up
from tests.guides import serving
from tests.lora.reference import randomise_zero_factors
from tests.models.engines import tokens_of
from tests.models.graph_models import as_function
from tests.serve.running import ADAPTERS, BASE, served, tiny_model
from tests.training.tiny import write_model

NAMES: tuple[str | None, ...] = (None, *ADAPTERS)
DRAWN = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2)


@pytest.fixture
def engine_of(tmp_path: Path) -> Any:
    class Vocabulary:
        vocab_size = 90

    for name, options in ADAPTERS.items():
        adapted = tiny_model(Vocabulary)  # type: ignore[arg-type]
        add_lora(adapted, **options)
        randomise_zero_factors(adapted)
        save_adapter(adapted, tmp_path / name)

    def engine_of(**options: Any) -> Engine:
        model = tiny_model(Vocabulary)  # type: ignore[arg-type]
        several = SeveralAdapters(model, {name: tmp_path / name for name in ADAPTERS})
        return Engine(model, adapters=several, **options)

    return engine_of


@pytest.mark.parametrize(
    "options", [{}, {"recorder": as_function, "ahead": True, "capacity": 128}], ids=["plain", "recorded"]
)
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_nothing_is_left_behind(engine_of, options: dict[str, Any], sampling: Sampling) -> None:
    warm, cold = engine_of(**options), engine_of(**options)
    free, training = warm._cache.free_tokens, warm._model.training
    drawn = torch.get_rng_state()
    warm_up(warm, NAMES, sampling)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (warm.has_work, warm._cache.free_tokens, warm._model.training) == (False, free, training)
    assert sum(warm._cache.lengths_on_host) == len(warm._tasks) == len(warm._flying) == 0
    assert sorted(warm._free_rows) == sorted(cold._free_rows)
    if options:
        assert warm.steps.replays, "the step that decodes is recorded"
    requests = [
        Request(prompt_ids=[5 + i, 9, 30], max_new_tokens=20, sampling=each, seed=i, adapter=name)
        for i, (name, each) in enumerate((name, each) for name in NAMES for each in (Sampling(), DRAWN))
    ]
    answers = tokens_of(warm, requests)
    assert answers == tokens_of(cold, requests)
    assert len({tuple(answer) for answer in answers}) > 3


def test_every_set_of_factors_makes_some_tokens(engine_of, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, used = engine_of(), []
    use = engine._adapters.use
    monkeypatch.setattr(engine._adapters, "use", lambda name: (used.append(name), use(name)))
    steps = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.append(step()) or steps[-1])
    warm_up(engine, NAMES, Sampling())
    assert set(used) == set(NAMES)
    assert sum(map(len, steps)) == NEW_TOKENS * len(NAMES)


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 19])
def test_little_room_is_enough(engine_of, capacity: int) -> None:
    engine = engine_of(capacity=capacity)
    warm_up(engine, NAMES, Sampling())
    assert not engine.has_work


def test_a_server_answers_alike(tmp_path: Path) -> None:
    def answers(*, warm: bool) -> list[str]:
        with served(tmp_path / str(warm), warm=warm) as server:
            assert not server.is_busy
            asked: dict[str, Any] = {"model": BASE, "prompt": "the cat", "max_tokens": 20, "seed": 3}
            return [server.client().completions.create(**asked).choices[0].text for _ in range(2)]

    assert answers(warm=True) == answers(warm=False)


def test_the_command_warms_up_where_it_is_asked_to(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", max_position_embeddings=128)
    command = f"slothcore serve --model {model} --bits 32 --device cpu --chat-template alpaca"
    for option, said in (("--warm-up", True), ("--no-warm-up", False), ("", False)):
        with serving(f"{command} {option}") as shown:
            line = "slothcore: warming up with a short answer, so that no client waits for kernels; --no-warm-up leaves"
            assert (line in shown) == said, option
            client = openai.OpenAI(base_url=shown.split(" at ")[1].split(";")[0], api_key="none", max_retries=0)
            assert client.completions.create(model=str(model), prompt="the", max_tokens=2).choices[0].finish_reason
