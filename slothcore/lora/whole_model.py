"""Adapters of the text part of a model that reads pictures, under the names that the whole model has for it.

PEFT puts an adapter on the model that `base_model_name_or_path` loads. Of Gemma 3 with vision that is the whole one,
where transformers (4.52 and later) has the text part beneath `model.language_model`, and names like q_proj stand for
layers of the vision part, too. So the file names every layer by its whole path; `load_adapter` reads that, the names of
the text part, and those of older versions, which had it beneath `language_model`, its head as well.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from slothcore.lora.config import LoraConfig
from slothcore.lora.module_names import by_new_names
from slothcore.lora.plan import AdapterPlan, lora_layers
from slothcore.models.decoder import Decoder
from slothcore.models.hf_config import read_json
from slothcore.models.hub import CONFIG_FILE

IN_WHOLE, IN_PART = "model.language_model.", "model."
HEAD, BEFORE = "lm_head", "language_model."


def is_text_part(model: Decoder) -> bool:
    """Whether the model is the text part of what its folder holds."""
    config = None if model.folder is None else model.folder / CONFIG_FILE
    return config is not None and config.is_file() and "text_config" in read_json(config)


def name_in_whole(name: str) -> str:
    """What a module or parameter of the text part is called in the whole model; its head has one name in both."""
    return IN_WHOLE + name.removeprefix(IN_PART) if name.startswith(IN_PART) else name


def name_before(name: str) -> str:
    """The same in versions of transformers before 4.52."""
    return BEFORE + name if name.startswith((IN_PART, HEAD)) else name


def name_in_part(name: str) -> str:
    """What a module or parameter of the whole model is called in the text part; a name of the part stays."""
    if name.startswith((BEFORE + IN_PART, BEFORE + HEAD)):
        return name.removeprefix(BEFORE)
    return IN_PART + name.removeprefix(IN_WHOLE) if name.startswith(IN_WHOLE) else name


def config_in_whole(config: LoraConfig, plan: AdapterPlan) -> LoraConfig:
    """The same adapter on the whole model."""
    # A module's name means every path that ends with its letters, and PEFT finds none of the vision part in the file.
    saved = dict.fromkeys(name_in_whole(name.rpartition(".")[0]) for name in plan.saved)
    return _renamed(config, {path: name_in_whole(path) for path in plan.targets}, tuple(saved))


def config_in_part(config: LoraConfig, model: Decoder, names: Iterable[str]) -> LoraConfig:
    """The same adapter on the text part; `config` itself where it is one for that already.

    Args:
        names: of what the adapter's file holds, without PEFT's additions before them.
    Raises: ValueError if it stands for no layer of the model.
    """
    names = list(names)
    if not any(name.startswith((IN_WHOLE, BEFORE)) for name in names):
        return config
    theirs = name_before if any(name.startswith(BEFORE) for name in names) else name_in_whole
    paths = {theirs(path): path for path in lora_layers(model)}
    saved = dict.fromkeys(part for name in config.modules_to_save for part in _modules_in_part(name, model))
    return _renamed(config, {name: paths[name] for name in config.targets(list(paths))}, tuple(saved))


def _modules_in_part(name: str, model: Decoder) -> list[str]:
    """Names in the text part for those of its modules that a name in the whole model stands for."""
    modules = [path for path, _ in model.named_modules() if path]
    name = name_in_part(name)
    if any(path.endswith(name) for path in modules):
        return [name]
    # Such as language_model.norm, whose beginning the text part does not have.
    return [path for path in modules if name_in_whole(path).endswith(name)] or [name]


def _renamed(config: LoraConfig, targets: Mapping[str, str], modules_to_save: tuple[str, ...]) -> LoraConfig:
    """The adapter with these targets, by their old names and now by the new ones, and these modules."""
    return replace(
        config,
        target_modules=tuple(targets.values()),
        modules_to_save=modules_to_save,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=by_new_names(config.rank_pattern, config.r, targets),
        alpha_pattern=by_new_names(config.alpha_pattern, config.lora_alpha, targets),
    )
