"""Whether what was written is what was meant: logits of a few tokens, from the files and from the model."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slothcore.layers.linear import Linear
from slothcore.layers.packed import Documents
from slothcore.lora.merge import block_of, original_state
from slothcore.lora.plan import lora_layers
from slothcore.models.checkpoint import check_against, names_in_model, stored_tensors
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder import Decoder
from slothcore.models.load import place_weight, read_config
from slothcore.models.prequantized import as_if_dense, dequantized, quantized_weights
from slothcore.models.reading import read_tensors
from slothcore.models.vocabulary import EMBEDDING, HEAD

SAMPLE_TOKENS = 16


def sample_ids(model: Decoder) -> Tensor:
    """Tokens drawn from the vocabulary, [SAMPLE_TOKENS] int64; always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (SAMPLE_TOKENS,), generator=generator)


@torch.no_grad()
def sample_logits(model: Decoder) -> Tensor:
    """What the model says to the sample, [SAMPLE_TOKENS, V] float32; dropout is off meanwhile."""
    was_training = model.training
    model.eval()
    try:
        logits = model(sample_ids(model)).logits
    finally:
        model.train(was_training)
    assert logits is not None
    return logits.float()


def require_finite(model: Decoder) -> None:
    """Raises: ValueError if the model says nothing finite to the sample, so that nothing written of it could."""
    if not sample_logits(model).isfinite().all():
        raise ValueError(
            "the model's own logits are not finite, as after a training that diverged, so it was not exported; take an "
            "earlier checkpoint, and train again with a lower learning rate"
        )


def distance(logits: Tensor, expected: Tensor) -> float:
    """Size of the difference, as a share of how far the expected logits spread; infinite if any is not finite."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    found = ((logits - expected).norm() / spread).item()
    return found if found == found else float("inf")


def folder_logits(folder: Path, ids: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the model in a folder says to `ids`, see `blockwise_logits`; weights in NF4 are decoded.

    Raises: ValueError if the folder does not hold exactly the weights that its configuration asks for.
    """
    family, _, config, _ = read_config(folder)
    stored, _ = names_in_model(stored_tensors(folder), family)
    quantized = quantized_weights(stored)
    empty = Decoder(config, device="meta").state_dict()
    check_against(as_if_dense(stored, quantized), {name: tuple(weight.shape) for name, weight in empty.items()}, folder)

    def in_order() -> Iterator[tuple[str, Tensor]]:
        for _, block in groupby(empty, key=block_of):
            names = set(block)
            yield from read_tensors(stored, names - quantized.keys(), device=device, progress=False)
            for name in names & quantized.keys():
                parts = quantized[name].parts
                read = dict(read_tensors(stored, parts.values(), device=device, progress=False))
                weight = quantized[name].assemble({role: read[part].to(device) for role, part in parts.items()})
                yield name, dequantized(weight, dtype)

    return blockwise_logits(config, in_order(), ids, dtype=dtype, device=device)


def original_logits(model: Decoder, *, dtype: torch.dtype) -> Tensor:
    """What the adapter says to the sample on the base weights as the model's folder holds them, not merged.

    Args:
        dtype: in which it computes.
    Raises: ValueError if those weights are not to be had.
    """
    layers = lora_layers(model)

    def adapt(built: Decoder, block: str) -> None:
        for path, layer in lora_layers(built).items():
            if block_of(f"{path}.weight") == block and (adapted := layers[path]).lora_A is not None:
                assert adapted.lora_B is not None
                factors = adapted.lora_A.detach(), adapted.lora_B.detach()
                layer.attach_lora(*factors, scaling=adapted.lora_scaling)
                if isinstance(adapted, Linear) and isinstance(layer, Linear):
                    magnitude = adapted.lora_magnitude_vector
                    if magnitude is not None:
                        layer.attach_magnitude(magnitude.detach())

    return blockwise_logits(
        model.config, original_state(model, dtype), sample_ids(model), dtype=dtype, device=model.device, adapt=adapt
    )


@torch.no_grad()
def blockwise_logits(
    config: DecoderConfig,
    weights: Iterable[tuple[str, Tensor]],
    ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapt: Callable[[Decoder, str], None] | None = None,
) -> Tensor:
    """Logits of one text with these dense weights, one block of the model at a time in memory, [T, V] float32.

    Args:
        weights: names and weights, block by block in the order embedding, layers, norm, head; a tied head is left out.
        dtype: in which it computes.
        adapt: called with the model and the path of a block once its weights are there.
    """
    bits = 32 if dtype == torch.float32 else 16
    model = Decoder(config, dtype=dtype, device="meta", bits=bits).eval().requires_grad_(False)
    blocks = groupby(weights, key=lambda pair: block_of(pair[0]))
    ids = ids.to(device)
    tied: Tensor | None = None

    def fill(expected: str) -> None:
        nonlocal tied
        name, block = next(blocks, (None, iter(())))
        if name is None and expected == "lm_head" and tied is not None:
            place_weight(model, HEAD, tied)
            return
        if name != expected:
            raise ValueError(f"the weights of {expected} are missing, or out of their order: {name} is there")
        for weight_name, weight in block:
            weight = weight.to(device, dtype)
            tied = weight if weight_name == EMBEDDING else tied
            place_weight(model, weight_name, weight)
        if adapt is not None:
            model.requires_grad_(False)
            adapt(model, expected)

    def empty(module: nn.Module, inputs: object, output: object) -> None:
        module.to("meta")
        bar.update()

    blocks_of_model = {
        "model.embed_tokens": model.model.embed_tokens,
        **{f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)},
        "model.norm": model.model.norm,
        "lm_head": model.lm_head,
    }
    for path, module in blocks_of_model.items():
        module.register_forward_pre_hook(lambda module, inputs, path=path: fill(path))
        module.register_forward_hook(empty)
    documents = Documents(torch.tensor([0, len(ids)], dtype=torch.int32, device=device), len(ids))
    with tqdm(total=len(blocks_of_model), desc="checking", unit=" blocks", disable=None) as bar:
        hidden = model.model(ids, torch.arange(len(ids), device=device), documents)
        return model.logits(hidden).float()
