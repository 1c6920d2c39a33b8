"""slothcore through its public functions, as a user would call them."""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

import slothcore
from benchmarks.peers import Settings
from slothcore.models.decoder import Decoder
from slothcore.training.decoded import keep_decoded_layers

GRADIENT_CHECKPOINTING: dict[str, Any] = {"no": False, "mlp": "mlp", "offload": "offload", "yes": True}


def load(settings: Settings) -> nn.Module:
    model, _ = slothcore.load(
        settings.folder, bits=settings.bits, device=settings.device, max_seq_length=settings.longest
    )
    model = slothcore.add_lora(model, r=settings.lora_r, lora_alpha=settings.lora_r)
    configure(model, settings)
    return model.train()


def configure(model: nn.Module, settings: Settings) -> None:
    decoder = cast(Decoder, model)
    if settings.device == "cuda":
        # Graphs hold the addresses of what they were captured with.
        decoder.disable_graphs()
    decoder.gradient_checkpointing = GRADIENT_CHECKPOINTING[settings.recompute]
    keep_decoded_layers(decoder, settings.decoded)
    if settings.graphs and settings.device == "cuda":
        decoder.enable_graphs()


def adamw_8bit(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    # Imported here: it needs bitsandbytes, which a comparison on a CPU does not.
    from slothcore.training.adamw_8bit import AdamW8bit

    return AdamW8bit(parameters, lr=lr)


def loss(model: nn.Module, sequences: Iterable[Tensor], settings: Settings, num_items: int | None = None) -> Tensor:
    # End to end, without padding. They stay on the CPU: slothcore reads their layout there without waiting for the GPU.
    documents = list(sequences)
    input_ids = torch.cat(documents)
    cu_seqlens = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    return model(input_ids=input_ids, labels=input_ids, cu_seqlens=cu_seqlens, num_items=num_items).loss
