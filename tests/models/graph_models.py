"""Models and passes for the tests of graphs.

On the CPU a recorder that gives back the function itself stands for CUDA graphs: a replay then runs the same Python on
the same static tensors, and everything around it is the real thing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import slothcore
from slothcore.models.decoder import Decoder
from slothcore.models.graphs import StepGraphs
from tests.models.tiny import SIZES
from tests.models.zoo import ALL_VARIANTS, Variant

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
Batch = tuple[Tensor, Tensor, Tensor]

CHOSEN = {
    "llama-biases",
    "llama-dynamic-rope",
    "mistral-window",
    "qwen2-tied-head",
    "qwen3-head-norms",
    "mixtral-three-of-five",
    "qwen3_moe-normalized-every-second",
    "gemma2-windows-and-caps",
    "gemma3_text-local-and-global",
    "phi3-longrope",
}
VARIANTS = [variant for variant in ALL_VARIANTS if str(variant) in CHOSEN]
LENGTHS = [[5, 1, 90, 2, 33], [40, 41, 7], [150, 20], [130]]
"""Tokens of each document in passes of two buckets; no document but the last two is longer than 128."""


def as_function(function: Callable[[], None]) -> Callable[[], None]:
    """The recorder of this file."""
    return function


def tiny(variant: Variant | None = None, **lora: Any) -> Decoder:
    """A model in float64 with random factors; the same one at every call."""
    config: dict[str, Any] = {**SIZES, "model_type": "llama"}
    if variant is not None:
        config = variant.config_class(**{**SIZES, "pad_token_id": 0, **variant.options}).to_dict()
    torch.manual_seed(0)
    model = slothcore.from_config(config, dtype=torch.float32, device="cpu").double()
    model.dtype = torch.float64
    slothcore.add_lora(model, **{"r": 4, "lora_alpha": 8, "lora_dtype": torch.float64, **lora})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
            elif not parameter.requires_grad and parameter.dim() >= 2:
                parameter.mul_(3)
    return model.train()


def enable(model: Decoder, recorder: Recorder = as_function, max_tokens: int = 512) -> StepGraphs:
    model.graphs = StepGraphs(model.model, model.config, max_tokens=max_tokens, recorder=recorder)
    return model.graphs


def batch(lengths: list[int], seed: int = 0, vocab_size: int = SIZES["vocab_size"]) -> Batch:
    """Ids and labels [T], a part of them ignored, and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    labels = ids.masked_fill(torch.rand(len(ids), generator=generator) < 0.4, -100)
    return ids, labels, torch.tensor([0, *lengths]).cumsum(0).int()


def loss_of(model: Decoder, data: Batch, num_items: float = 57) -> Tensor:
    ids, labels, boundaries = data
    return model(ids, labels=labels, cu_seqlens=boundaries, num_items=num_items).loss


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: Decoder, data: Batch) -> list[Tensor]:
    """The loss of a pass and all gradients, which begin at None."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, data)
    loss.backward()
    return [loss.detach().clone(), *(parameter.grad.clone() for parameter in trained(model))]


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of the same tensor; NaN counts as infinite."""
    shares = [float((a - e).abs().max() / e.abs().max().clamp(min=1e-9)) for a, e in zip(actual, expected, strict=True)]
    return max(share if share == share else float("inf") for share in shares)
