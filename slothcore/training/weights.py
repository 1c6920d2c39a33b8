"""The weights that a run trains, on disk: an adapter in PEFT's format, or a whole model as a Hugging Face folder."""

from pathlib import Path

import torch
from torch import Tensor

from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.adapter_io import WEIGHTS_FILE, adapter_state, save_adapter
from slothcore.lora.attach import lora_config_of
from slothcore.lora.recorded import AdapterFile
from slothcore.lora.stored_adapter import PREFIX
from slothcore.lora.whole_model import name_in_part
from slothcore.models.checkpoint import save_pretrained, stored_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.reading import read_tensors
from slothcore.training.run_folder import ADAPTER_FOLDER, MODEL_FOLDER
from slothcore.training.run_state import write_folder


def save_result(model: Decoder, tokenizer: Tokenizer | None, output_dir: Path) -> Path:
    """Write what the run came to into `output_dir/adapter`, or `output_dir/model`, and give that path."""
    name = MODEL_FOLDER if lora_config_of(model) is None else ADAPTER_FOLDER
    return write_folder(output_dir / name, lambda folder: save_weights(model, tokenizer, folder))


def save_weights(model: Decoder, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write the adapter, or without one the whole model, with its tokenizer."""
    if lora_config_of(model) is not None:
        save_adapter(model, folder)
    else:
        save_pretrained(
            model.state_dict().items(),
            folder,
            hf_config=model.hf_config,
            generation_config=model.generation_config,
        )
    if tokenizer is not None:
        tokenizer.save(folder)


@torch.no_grad()
def load_weights(model: Decoder, folder: Path) -> None:
    """Copy what `save_weights` wrote into the model's own parameters, which an optimizer may already know.

    Raises: ValueError if a weight is missing, damaged or of another shape.
    """
    if lora_config_of(model) is None:
        own = model.state_dict()
        saved = dict(read_tensors(stored_tensors(folder), own))
    else:
        own = adapter_state(model)
        saved = _as_trained(folder / WEIGHTS_FILE)
    for name, parameter in own.items():
        if name not in saved or saved[name].shape != parameter.shape:
            raise ValueError(f"{folder} does not hold {name} as this model has it; resume from another checkpoint")
        parameter.copy_(saved[name])


def _as_trained(file: Path) -> dict[str, Tensor]:
    """The tensors of an adapter under the names of `adapter_state`, its factors as they were when it was saved.

    Raises: ValueError if it is damaged.
    """
    try:
        tensors = AdapterFile.read(file).trained_tensors()
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; resume from another checkpoint") from error
    return {PREFIX + name_in_part(name.removeprefix(PREFIX)): tensor for name, tensor in tensors.items()}
