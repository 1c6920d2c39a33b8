"""A model on the GPU with the widths of Llama-3.1-8B and two layers, passes for it, and what graphs hold there."""

import gc
from typing import Any

import torch

import slothcore
from benchmarks.shapes import LLAMA_3_1_8B
from slothcore.models.decoder import Decoder
from tests.models.graph_models import Batch, batch

TWO_LAYERS = LLAMA_3_1_8B | {"num_hidden_layers": 2}
PASSES = [[200, 37, 90], [512, 300], [60, 20, 11]]
"""Documents of passes in buckets of 384, 896 and 128 tokens; the last takes the path for few rows."""


def llama(
    bits: int = 4, config: dict[str, Any] = TWO_LAYERS, dtype: torch.dtype = torch.bfloat16, *, use_dora: bool = False
) -> Decoder:
    """A model with random factors; the same one at every call."""
    torch.manual_seed(0)
    model = slothcore.from_config(config, bits=bits, dtype=dtype, device="cuda")
    slothcore.add_lora(model, r=16, lora_alpha=16, use_dora=use_dora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.01)
    return model.train()


def tokens(lengths: list[int], seed: int = 0) -> Batch:
    return batch(lengths, seed, vocab_size=1000)


def without_replays(model: Decoder, max_tokens: int = 2048) -> None:
    """Padded passes that Python runs, and nothing else."""
    model.enable_graphs(max_tokens=max_tokens)
    model.graphs._has_failed = True


def held_by_graphs() -> int:
    """Bytes of all pools of graphs in this process, which the allocator tells apart from the rest."""
    gc.collect()
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))
