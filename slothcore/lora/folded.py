"""Which adapters a merged model has in its weights already, so that none of them is put on it once more.

Its `config.json` lists them, each by a hash of its factors. They are rounded to bfloat16 for that: in which dtype an
adapter is kept, on disk or in memory, then makes no difference.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from slothcore.lora.attach import lora_config_of
from slothcore.lora.init_factors import Factors
from slothcore.lora.plan import lora_layers
from slothcore.models.decoder import Decoder

KEY = "slothcore_merged"


def folded_in(model: Decoder) -> list[str]:
    """Hashes of the adapters that the merged model will hold: those that are in its base already, and its own."""
    listed = _listed(model)
    if lora_config_of(model) is None:
        return listed
    layers = lora_layers(model).items()
    factors = {p: (x.lora_A, x.lora_B) for p, x in layers if x.lora_A is not None and x.lora_B is not None}
    # One that trains no factors, but biases or tables, replaces what was there and does not add to it.
    return [*listed, _hash(factors)] if factors else listed


def require_not_folded_in(model: Decoder, factors: Callable[[], Mapping[str, Factors]], folder: Path) -> None:
    """Raise ValueError if the adapter in `folder`, which has these factors, is in the weights of the model already."""
    listed = _listed(model)
    if not listed:
        return
    found = factors()
    # One of twice the rank, for everyone's base, begins with what was trained; see `recorded.py`.
    halves = {path: _first_half(*pair) for path, pair in found.items()}
    if {_hash(found), _hash(halves)}.intersection(listed):
        raise ValueError(
            f"the adapter {folder} is merged into the weights of {model.folder} already, and would count twice; leave "
            "it out, or put it on the base that it was trained on"
        )


def _listed(model: Decoder) -> list[str]:
    listed = model.hf_config.get(KEY)
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _first_half(lora_A: Tensor, lora_B: Tensor) -> Factors:
    """The first half of the rank."""
    return lora_A.tensor_split(2, dim=-2)[0], lora_B.tensor_split(2, dim=-1)[0]


def _hash(factors: Mapping[str, Factors]) -> str:
    digest = hashlib.sha256()
    for path, pair in sorted(factors.items()):
        digest.update(path.encode())
        for factor in pair:
            rounded = factor.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.uint8).numpy().data)
    return digest.hexdigest()
