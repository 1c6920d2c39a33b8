"""Which adapter a run trains: a new one, one that was saved before, or that of the checkpoint it goes on from."""

from pathlib import Path
from typing import Any

import torch

from slothcore.lora.adapter_io import load_adapter
from slothcore.lora.attach import add_lora, lora_config_of
from slothcore.lora.config import LoraConfig
from slothcore.lora.init_names import uses_weights
from slothcore.lora.module_names import ALL_LINEAR
from slothcore.lora.plan import AdapterPlan
from slothcore.models.decoder import Decoder
from slothcore.training.config import TrainConfig
from slothcore.training.report import say
from slothcore.training.run_folder import options_behind
from slothcore.training.run_state import find_checkpoint

# What an adapter that is trained further has decided already.
ADAPTER_OPTIONS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loftq_iter",
    "lora_dtype",
    "modules_to_save",
)
# Of these an adapter's own configuration says nothing.
UNRECORDED = ("loftq_iter", "lora_dtype")


def adapter_options(config: TrainConfig) -> dict[str, Any]:
    """What the configuration says of a new adapter, as `add_lora` takes it."""
    return {name: getattr(config, name) for name in ADAPTER_OPTIONS}


def put_adapter(model: Decoder, config: TrainConfig) -> None:
    """Put the adapter on the model of a run, unless it came with one, or all weights are to train.

    Raises: ValueError, in one sentence, if that is not the adapter that the options ask for, or it cannot be made.
    """
    if lora_config_of(model) is not None:
        _check_continued(model, config)
    elif config.full_finetuning:
        return
    elif config.resume_from_checkpoint is not None and uses_weights(config.init_lora_weights):
        # Elsewhere a decomposition may round otherwise; the checkpoint says to the bit what the base became.
        checkpoint = find_checkpoint(str(config.resume_from_checkpoint), Path(config.output_dir))
        load_adapter(model, checkpoint, lora_dtype=config.lora_dtype)
        _check_begun(model, config, checkpoint)
    else:
        torch.manual_seed(config.seed)
        if uses_weights(config.init_lora_weights):
            say(f"taking the first factors out of the base weights: {config.init_lora_weights}")
        add_lora(model, **adapter_options(config))
        if model.taken_out:
            say(
                "the base weights have changed by that; the adapter is saved at twice its rank, so that it fits the "
                "original ones as well"
            )


def _check_continued(model: Decoder, config: TrainConfig) -> None:
    """Raise ValueError if the configuration asks for another adapter than the one that the model came with."""
    defaults, source = TrainConfig(), config.adapter or config.model
    for name in ADAPTER_OPTIONS:
        asked, present = getattr(config, name), _present(model, name)
        if asked != getattr(defaults, name) and not _is_same(asked, present):
            raise ValueError(
                f"{source} comes with an adapter, whose {name} is {present!r}, and {name} is set to {asked!r}; "
                "drop the option to train that adapter further, or merge it into its base model first"
            )
    adapter = lora_config_of(model)
    assert adapter is not None
    say(f"training the adapter of {source} further: r {adapter.r}, lora_alpha {adapter.lora_alpha}")
    before = options_behind(source) if source else None
    if before is not None and before.bits != config.bits:
        say(f"note: that adapter was trained beside weights of {before.bits} bits, and bits is {config.bits}")


def _check_begun(model: Decoder, config: TrainConfig, checkpoint: Path) -> None:
    """Raise ValueError if the configuration asks for another adapter than the checkpoint's."""
    for name in ADAPTER_OPTIONS:
        asked, present = getattr(config, name), _present(model, name)
        if name == "target_modules" and asked == ALL_LINEAR:
            # As a name it stands in no file.
            asked = AdapterPlan.of(model, _all_linear(config)).config.target_modules
        if name not in UNRECORDED and not _is_same(asked, present):
            raise ValueError(
                f"{checkpoint} was begun with {name} {present!r}, and {name} is {asked!r}; set it back, or start a "
                "new run"
            )


def _present(model: Decoder, name: str) -> Any:
    """What the adapter on the model has decided; the default where it does not say."""
    present = getattr(lora_config_of(model), name, getattr(TrainConfig(), name))
    return None if present == {} else present


def _all_linear(config: TrainConfig) -> LoraConfig:
    """The adapter that these options ask for, as far as it matters for which layers it is on."""
    return LoraConfig(
        modules_to_save=config.modules_to_save,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
    )


def _is_same(asked: Any, present: Any) -> bool:
    # A name stands for a list of one, as in `add_lora`. And 1 is not True.
    return (asked == present and isinstance(asked, bool) == isinstance(present, bool)) or (asked,) == present
