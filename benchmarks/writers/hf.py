"""transformers' generate over bitsandbytes' NF4, with the adapter of PEFT in the compute dtype."""

from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.checkpoint import SPECIAL_TOKENS
from benchmarks.peers import Settings
from benchmarks.peers.hf import load_base, lora_config

PADDING = SPECIAL_TOKENS.index("<pad>")


def load(settings: Settings) -> nn.Module:
    model = load_base(settings)
    model.requires_grad_(False)
    # In the compute dtype: PEFT's float32 would cost two conversions a layer.
    return get_peft_model(model, lora_config(settings), autocast_adapter_dtype=False)


def prepare(model: nn.Module, settings: Settings, *, rows: int, tokens: int) -> nn.Module:
    return model.eval()


@torch.inference_mode()
def write(ready: Any, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
    """One padded batch, which goes on until the longest continuation is complete; the others are cut."""
    width, count = max(map(len, prompts)), max(new_tokens)
    ids = torch.tensor([[PADDING] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(ready.parameters()).device
    written = ready.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        pad_token_id=PADDING,
    )
    rows = written[:, width:].tolist()
    return [row[:wanted] for row, wanted in zip(rows, new_tokens, strict=True)]
