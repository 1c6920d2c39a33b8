"""Weights as the folder of a model holds them, for what needs more than the four bits that are left of them.

Quantising is one way, so whatever is to be computed from the 16-bit weights of an NF4 model reads them once more, one
at a time. The folder is then mostly in the system's page cache.
"""

from collections.abc import Collection, Iterator

from torch import Tensor

from slothcore.models.checkpoint import names_in_model, stored_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.families import family_of
from slothcore.models.fused_experts import split_fused_experts
from slothcore.models.hf_config import read_json
from slothcore.models.prequantized import quantized_weights
from slothcore.models.reading import StoredTensor, read_tensors

REMEDY = "load the model's unquantised 16-bit original with bits=4, or this one with bits=16"


def stored_originals(model: Decoder, names: Collection[str], *, remedy: str = REMEDY) -> dict[str, StoredTensor]:
    """Where the weights of these names lie; nothing is read but headers.

    Args:
        remedy: what to do about weights that are quantised already.
    Raises: ValueError, in one sentence, if the model was not read from a folder, or the folder is not there any more
        or holds them quantised.
    """
    if model.folder is None:
        raise ValueError(
            "the original weights of this model are not to be had, for it was not read from a folder; load it with "
            "slothcore.load, or with bits=16"
        )
    config_file = model.folder / "config.json"
    stored, _ = names_in_model(stored_tensors(model.folder), family_of(read_json(config_file), str(config_file)))
    stored = split_fused_experts(stored, model.config.moe)
    quantized = quantized_weights(stored)
    for name in names:
        if name in quantized:
            raise ValueError(
                f"{model.folder} holds {name} quantised already, so its original values are not to be had; {remedy}"
            )
        if name not in stored:
            raise ValueError(f"{model.folder} has changed since the model was loaded: it lacks {name}; load it again")
    return {name: stored[name] for name in names}


def original_weights(model: Decoder, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Read these weights again, by file and position, in the model's dtype and on its device: what was quantised.

    Raises: ValueError as `stored_originals`, or if a file cannot be read.
    """
    stored = stored_originals(model, names)
    for name, tensor in read_tensors(stored, names, device=model.device):
        yield name, tensor.to(model.device, model.dtype)
