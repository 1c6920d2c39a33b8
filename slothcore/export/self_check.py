"""Whether what was written is what was meant: logits of a few tokens, from the files and from the model."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from slothcore.layers.packed import Documents
from slothcore.models.checkpoint import check_against, names_in_model, stored_tensors
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder import Decoder
from slothcore.models.load import place_weight, read_config
from slothcore.models.reading import read_tensors

SAMPLE_TOKENS = 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


def distance(logits: Tensor, expected: Tensor) -> float:
    """Size of the difference, as a share of how far the expected logits spread; infinite if any is not finite."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    found = ((logits - expected).norm() / spread).item()
    return found if found == found else float("inf")


def folder_logits(folder: Path, ids: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the model in a folder says to `ids`, see `blockwise_logits`.

    Raises: ValueError if the folder does not hold exactly the weights that its configuration asks for.
    """
    family, _, config, _ = read_config(folder)
    stored, _ = names_in_model(stored_tensors(folder), family)
    empty = Decoder(config, device="meta").state_dict()
    check_against(stored, {name: tuple(weight.shape) for name, weight in empty.items()}, folder)

    def in_order() -> Iterator[tuple[str, Tensor]]:
        for _, block in groupby(empty, key=block_of):
            yield from read_tensors(stored, list(block), device=device, progress=False)

    return blockwise_logits(config, in_order(), ids, dtype=dtype, device=device)


@torch.no_grad()
def blockwise_logits(
    config: DecoderConfig,
    weights: Iterable[tuple[str, Tensor]],
    ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Logits of one text with these dense weights, one block of the model at a time in memory, [T, V] float32.

    Args:
        weights: names and weights in the order embedding, layers, norm, head; a tied head is left out.
        dtype: in which it computes.
    """
    bits = 32 if dtype == torch.float32 else 16
    model = Decoder(config, dtype=dtype, device="meta", bits=bits).eval()
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

    def empty(module: nn.Module, inputs: object, output: object) -> None:
        module.to("meta")

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
    hidden = model.model(ids, torch.arange(len(ids), device=device), documents)
    return model.logits(hidden).float()


def block_of(name: str) -> str:
    """Which block of a model a weight belongs to: its embedding, a layer, the last norm or the head."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else name.rpartition(".")[0]
