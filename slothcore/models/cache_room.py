"""How large the cache of an engine is."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from slothcore.layers.page_table import PAGE_SIZE, pages_within, table_widths
from slothcore.models.language_model import LanguageModel
from slothcore.models.prompt_passes import LARGEST_SIZE

# Of a device, so that the context, gaps between tensors and the caller's own work have room.
SHARE_LEFT_FREE = 0.08
# Of the host's memory, which a cache on a CPU takes at most.
SHARE_OF_HOST = 0.25
HOST_BYTES_WHERE_UNKNOWN = 8 * 2**30
# Hidden states of a pass that live at the same time, as widths of the residual stream and of gate and up together.
LIVE_HIDDEN, LIVE_GATE_UP = 8, 2
# Of graphs, in passes of their largest: recorded in rising order, each leaves gaps too small for the next.
POOL_OF_A_PASS = 2.0


@dataclass(frozen=True)
class CacheRoom:
    """What a `KvCache` is made with.

    Attributes:
        capacity: most tokens of a row.
        pages: of a layer without a window.
        options: the rest, but for the number of rows.
    """

    capacity: int
    pages: int
    options: dict[str, Any]


def cache_options(model: LanguageModel) -> dict[str, Any]:
    """What a `KvCache` has to know of the model."""
    config = model.config
    return {
        "windows": [config.window(layer) for layer in range(config.num_hidden_layers)],
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "dtype": model.dtype,
        "device": model.device,
    }


def cache_room(
    model: LanguageModel,
    rows: int,
    *,
    capacity: int | None,
    cache_tokens: int | None,
    prefill_tokens: int,
    graphs: bool,
) -> CacheRoom:
    """A cache for rows of at most `capacity` tokens, as `Engine` describes the arguments.

    Args:
        graphs: whether passes over prompts are recorded, whose memory is theirs for good.
    Raises: ValueError if a row of this capacity would not fit.
    """
    options = cache_options(model)
    wanted = model.max_seq_length if capacity is None else capacity
    if wanted < 1:
        raise ValueError(f"capacity must be at least 1, got {wanted}")
    if cache_tokens is None:
        nbytes = spare_bytes(model, prefill_tokens, graphs=graphs)
        of_memory = {name: value for name, value in options.items() if name != "device"}
        pages = pages_within(nbytes, rows=rows, capacity=wanted, **of_memory)
        remedy = f"{nbytes / 2**30:.1f} GiB are left for it; ask for fewer, or make room"
    else:
        pages = min(-(-cache_tokens // PAGE_SIZE), rows * max(table_widths(options["windows"], wanted, PAGE_SIZE, 1)))
        remedy = f"cache_tokens is {cache_tokens}; raise it, or ask for fewer"
    if pages < max(table_widths(options["windows"], wanted, PAGE_SIZE, 1)):
        if capacity is not None or pages < 1:
            raise ValueError(f"the cache has no room for a request of {wanted} tokens: {remedy}")
        wanted = pages * PAGE_SIZE
    return CacheRoom(wanted, pages, options)


def spare_bytes(model: LanguageModel, prefill_tokens: int, *, graphs: bool) -> int:
    """What a cache may take beside the model, its largest pass, and graphs of passes, as memory is now."""
    device = model.device
    if device.type != "cuda":
        known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else HOST_BYTES_WHERE_UNKNOWN
        return int(SHARE_OF_HOST * total)
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds and nothing uses is not free to the GPU, but it is to this process.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    passes = pass_bytes(model, prefill_tokens)
    if graphs:
        passes += int(POOL_OF_A_PASS * pass_bytes(model, min(prefill_tokens, LARGEST_SIZE)))
    return max(0, int(free - SHARE_LEFT_FREE * total - passes))


def pass_bytes(model: LanguageModel, tokens: int) -> int:
    """About what a pass over so many tokens takes beside weights and cache, from above."""
    config = model.config
    inner = config.intermediate_size
    if config.moe is not None:
        inner = max(inner, config.moe.experts_per_token * config.moe.intermediate_size)
    attention = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    width = LIVE_HIDDEN * config.hidden_size + 2 * attention + LIVE_GATE_UP * 2 * inner
    # A weight that is decoded for the pass, and scores in float32 for as many rows as there may be.
    decoded = 2 * inner * config.hidden_size
    return model.dtype.itemsize * (tokens * width + decoded) + 3 * 4 * 128 * config.vocab_size
