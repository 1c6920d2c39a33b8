"""transformers + PEFT + bitsandbytes, set up as their documentation says."""

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.checkpoint import SPECIAL_TOKENS
from benchmarks.peers import Settings
from benchmarks.shapes import LORA_TARGETS


def load_base(settings: Settings) -> nn.Module:
    """The model without an adapter."""
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
    return AutoModelForCausalLM.from_pretrained(
        settings.folder, dtype=settings.dtype, attn_implementation="sdpa", **options
    )


def lora_config(settings: Settings) -> LoraConfig:
    rank = settings.lora_r
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, bias="none", task_type="CAUSAL_LM")


def load(settings: Settings) -> nn.Module:
    model = load_base(settings)
    if settings.bits == 4:
        # Recomputation is for `configure`, which does the same as this function would.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # As transformers' Trainer does; the model would otherwise copy every key and value into a cache.
    model.config.use_cache = False
    model = get_peft_model(model, lora_config(settings)).train()
    configure(model, settings)
    return model


def configure(model: nn.Module, settings: Settings) -> None:
    if settings.recompute == "no":
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def adamw_8bit(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    # Imported here: a comparison on a CPU does without it.
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr)


def loss(model: nn.Module, sequences: Iterable[Tensor], settings: Settings, num_items: int | None = None) -> Tensor:
    return loss_of(model, padded(list(sequences)), settings, num_items)


def loss_of(model: nn.Module, batch: dict[str, Tensor], settings: Settings, num_items: int | None) -> Tensor:
    """The loss of a batch on the CPU, however its sequences are laid out."""
    if num_items is not None:
        # As transformers' Trainer does: the losses of the micro-batches then add up to the mean over the whole step.
        batch["num_items_in_batch"] = torch.tensor(num_items)
    batch = {name: value.to(settings.device, non_blocking=True) for name, value in batch.items()}
    with torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == torch.bfloat16):
        return model(**batch).loss


def padded(sequences: list[Tensor]) -> dict[str, Tensor]:
    """Rows [B, S] padded on the right to the longest, as transformers' collators do; no mask where nothing is."""
    ids = pad_sequence(sequences, batch_first=True, padding_value=SPECIAL_TOKENS.index("<pad>"))
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
    if mask.all():
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, -100), "attention_mask": mask.long()}


def end_to_end(sequences: list[Tensor]) -> dict[str, Tensor]:
    """One row [1, T] without padding, as TRL's collators make it: positions restart, and no first token is a target."""
    position_ids = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    ids = torch.cat(sequences)[None]
    return {"input_ids": ids, "labels": ids.masked_fill(position_ids == 0, -100), "position_ids": position_ids}
