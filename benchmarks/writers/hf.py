"""transformers' generate over bitsandbytes' NF4, with the adapter of PEFT in the compute dtype."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.checkpoint import SPECIAL_TOKENS
from benchmarks.peers import Settings
from benchmarks.shapes import LORA_TARGETS

PADDING = SPECIAL_TOKENS.index("<pad>")


def load(settings: Settings) -> nn.Module:
    options: dict[str, Any] = {}
    if settings.bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if settings.device == "cuda":
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(
        settings.folder, dtype=settings.dtype, attn_implementation="sdpa", **options
    )
    model.requires_grad_(False)
    rank = settings.lora_r
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, bias="none", task_type="CAUSAL_LM")
    # In the compute dtype: PEFT's float32 would cost two conversions a layer.
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


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
