"""slothcore's engine, as a server or a batch job would use it: one for all that comes."""

from typing import Any, cast

from torch import nn

from benchmarks.peers import Settings
from benchmarks.peers.slothcore_ import load
from slothcore.inference.engine import Engine, Request
from slothcore.layers.page_table import PAGE_SIZE
from slothcore.models.decoder import Decoder

__all__ = ["load", "prepare", "write"]


def prepare(model: nn.Module, settings: Settings, *, rows: int, tokens: int) -> Engine:
    decoder = cast(Decoder, model)
    # Those of training, which writing has no use for.
    decoder.disable_graphs()
    # Every row wastes less than a page of its own.
    room = tokens + rows * PAGE_SIZE
    return Engine(decoder, max_rows=rows, capacity=settings.longest, cache_tokens=room, graphs=settings.graphs)


def write(ready: Any, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
    engine = cast(Engine, ready)
    written: dict[int, list[int]] = {}
    for prompt, count in zip(prompts, new_tokens, strict=True):
        written[engine.add(Request(prompt_ids=prompt, max_new_tokens=count))] = []
    while engine.has_work:
        for event in engine.step():
            written[event.id].append(event.token)
    return list(written.values())
