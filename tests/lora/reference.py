"""transformers + PEFT beside slothcore: the same weights, the same factors, the same batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slothcore.lora.adapter_io import adapter_state
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large weights, so that every term of the gradient is far from rounding.
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def write_tiny_llama(folder: Path, **options: Any) -> Path:
    """A random Llama as transformers saves it, with random biases and norms too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.1)
    model.save_pretrained(folder)
    return folder


def load_pair(folder: Path, *, bits: int = 32) -> tuple[Decoder, Any]:
    """(ours, transformers') from one folder, float32; with 4 bits the reference has bitsandbytes' decoded weights."""
    from transformers import LlamaForCausalLM

    ours = load_model(folder, bits=bits, dtype=torch.float32, device="cpu")
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if bits == 4:
        for module in reference.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = through_bitsandbytes(module.weight.data)
    return ours, reference.eval()


def through_bitsandbytes(weight: Tensor) -> Tensor:
    """NF4 with double quantisation and back."""
    from bitsandbytes import functional

    # Flat: blocks run over the flattened weight, but bitsandbytes' CPU decoder restarts them at each row of a matrix.
    packed, state = functional.quantize_4bit(weight.flatten(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(packed, state).view_as(weight)


def copy_adapter(ours: Decoder, peft_model: nn.Module) -> None:
    """Give PEFT's adapter the values of ours."""
    theirs = peft_parameters(peft_model)
    state = adapter_state(ours)
    assert state.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(state[name])


def peft_parameters(peft_model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in a PEFT model, under the names that it has in a file."""
    return {
        name.replace(".default", "")
        .replace(".modules_to_save", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): parameter
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }


@dataclass(frozen=True)
class Batch:
    """Two rows [2, S], the second padded on the right; some labels are ignored."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def make_batch(vocab_size: int, *, length: int = 19) -> Batch:
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(1, vocab_size, (2, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, length - 6 :] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, 3:7] = -100
    return Batch(input_ids.masked_fill(attention_mask == 0, 0), attention_mask, labels)


def randomise_zero_factors(model: Decoder) -> None:
    """Make B random: with B = 0 the gradient of A is zero, and nothing would be compared. And no scale of DoRA 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("lora_magnitude_vector"):
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))


def logits_of(model: Decoder, batch: Batch) -> Tensor:
    """Logits at real tokens, [tokens, V]."""
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits is not None
    return logits[batch.attention_mask == 1]


def reference_logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[batch.attention_mask == 1]
