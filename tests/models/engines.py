"""Prompts and engines for the tests of continuous batching.

On the CPU the recorder of `graph_models` stands for CUDA graphs: what a graph would replay runs as Python on the same
static tensors.
"""

from collections.abc import Sequence
from typing import Any

from slothcore.models.decoder import Decoder
from slothcore.models.engine import Engine
from slothcore.models.requests import Event, Request
from tests.models.graph_models import as_function
from tests.models.zoo import token_ids

SIXTEEN = [
    token_ids(length, seed=length).tolist() for length in (1, 40, 2, 3, 90, 5, 7, 6, 31, 32, 33, 11, 1, 64, 13, 20)
]
"""Prompts of unequal length, some of them far above every window of the tiny models."""

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ahead": {"ahead": True},
    "recorded": {"recorder": as_function},
    "recorded, ahead, in turns": {"recorder": as_function, "ahead": True, "max_rows": 5, "prefill_tokens": 48},
    "recorded, ahead, few pages": {"recorder": as_function, "ahead": True, "capacity": 192, "cache_tokens": 6 * 64},
}
"""Options of an engine, none of which changes a token."""


def requests_of(prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[Request]:
    return [Request(prompt_ids=prompt, max_new_tokens=max_new_tokens, **options) for prompt in prompts]


def run(engine: Engine, requests: Sequence[Request]) -> list[list[Event]]:
    """The events of each request, when all have ended."""
    numbers = [engine.add(request) for request in requests]
    events: dict[int, list[Event]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            events[event.id].append(event)
    assert all(event.finished is None for own in events.values() for event in own[:-1])
    assert all(own[-1].finished is not None for own in events.values())
    return list(events.values())


def tokens_of(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    return [[event.token for event in own] for own in run(engine, requests)]


def alone(model: Decoder, request: Request) -> list[int]:
    """What an engine with nothing else to do and one row gives."""
    return tokens_of(Engine(model, max_rows=1, capacity=256), [request])[0]
