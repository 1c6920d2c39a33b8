"""Experts as transformers 5 keeps them in memory, and writes them if it is told not to restore the original format.

    on disk, fused                   shape            rows of expert e
    mlp.experts.gate_up_proj         [E, 2 I, H]      gate [I, H], then up [I, H]
    mlp.experts.down_proj            [E, H, I]        down
    mlp.gate.weight                  [E, H]           the router, for every family in a block called `mlp`

The rows of one expert lie together, so each of its weights is a stretch of bytes, and is read like a tensor of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from slothcore.models.config import MoeConfig
from slothcore.models.reading import StoredTensor

FUSED = re.compile(r"(?P<layer>.*\.layers\.\d+)\.mlp\.experts\.(?P<name>gate_up_proj|down_proj)")
ROUTER = re.compile(r"(?P<layer>.*\.layers\.\d+)\.mlp\.gate\.weight")


def split_fused_experts(stored: Mapping[str, StoredTensor], moe: MoeConfig | None) -> dict[str, StoredTensor]:
    """The same weights with each expert under its own name, as the original checkpoints have it.

    Raises: ValueError if a fused weight has not the experts that the configuration names.
    """
    if moe is None or not any(FUSED.fullmatch(name) for name in stored):
        return dict(stored)
    gate, up, down = moe.expert_names
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        fused, router = FUSED.fullmatch(name), ROUTER.fullmatch(name)
        if fused:
            parts = (gate, up) if fused["name"] == "gate_up_proj" else (down,)
            for index, part, weight in _parts(name, tensor, moe.num_experts, parts):
                found[f"{fused['layer']}.{moe.block_name}.experts.{index}.{part}.weight"] = weight
        elif router:
            found[f"{router['layer']}.{moe.block_name}.gate.weight"] = tensor
        else:
            found[name] = tensor
    return found


def _parts(
    name: str, tensor: StoredTensor, num_experts: int, parts: tuple[str, ...]
) -> list[tuple[int, str, StoredTensor]]:
    """Expert, projection and place of each weight in one fused tensor."""
    if len(tensor.shape) != 3 or tensor.shape[0] != num_experts or tensor.shape[1] % len(parts):
        raise ValueError(
            f"{tensor.file}: {name} has shape {list(tensor.shape)}, but config.json asks for {num_experts} experts"
        )
    pieces = num_experts * len(parts)
    shape = (tensor.shape[1] // len(parts), tensor.shape[2])
    nbytes = tensor.nbytes // pieces
    return [
        (
            piece // len(parts),
            parts[piece % len(parts)],
            replace(tensor, shape=shape, offset=tensor.offset + piece * nbytes, nbytes=nbytes),
        )
        for piece in range(pieces)
    ]
