"""Which trained parameters share a learning rate and a weight decay."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from slothcore.models.flat_factors import factors_apart, is_factor_b
from slothcore.training.config import TrainConfig
from slothcore.training.progress import say

EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The groups of an optimizer: `params`, `lr`, `weight_decay`, and `initial_lr`, which a schedule multiplies.

    With `loraplus_lr_ratio`, factors B learn at that multiple of the learning rate, and so does every vector: biases,
    norms, magnitudes of DoRA. These are the groups of PEFT's `create_loraplus_optimizer`. With
    `embedding_learning_rate`, so do `embed_tokens` and `lm_head` where they are trained in full, at that rate.

    Vectors do not decay: decay pulls a norm or a magnitude towards 0, which is no neutral value for it. (PEFT and
    transformers exempt biases and norms by their names, and let magnitudes decay.)

    Parameters come in the order in which graphs of the model have them laid end to end.

    Raises: ValueError if nothing is trainable, or nothing that an option is about.
    Source: Hayou et al. 2024, arXiv:2402.12354.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise ValueError("the model has no trainable parameter; call add_lora, or set full_finetuning")
    if config.loraplus_lr_ratio is not None and not any(is_factor_b(name) for name in named):
        raise ValueError("loraplus_lr_ratio is set, but no LoRA factor is trained; drop it")
    if config.embedding_learning_rate is not None and not any(name.endswith(EMBEDDINGS) for name in named):
        raise ValueError(
            "embedding_learning_rate is set, but neither embed_tokens nor lm_head is trained in full; "
            "add them to modules_to_save, or drop it"
        )
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in factors_apart(named.items()):
        is_vector = parameter.dim() < 2
        rate = _learning_rate(name, config, is_vector=is_vector)
        decay = 0.0 if is_vector else config.weight_decay
        empty = {"params": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        groups.setdefault((rate, is_vector), empty)["params"].append(parameter)
    _say_rates(named, config)
    return [*groups.values()]


def _learning_rate(name: str, config: TrainConfig, *, is_vector: bool) -> float:
    if config.embedding_learning_rate is not None and name.endswith(EMBEDDINGS):
        return config.embedding_learning_rate
    if config.loraplus_lr_ratio is not None and (is_vector or is_factor_b(name)):
        return config.learning_rate * config.loraplus_lr_ratio
    return config.learning_rate


def _say_rates(names: Iterable[str], config: TrainConfig) -> None:
    """Tell the user about learning rates that are not the base one."""
    others = []
    if config.loraplus_lr_ratio is not None:
        others.append(f"{config.learning_rate * config.loraplus_lr_ratio:g} for factors B and vectors")
    if config.embedding_learning_rate is not None:
        embeddings = [name.split(".")[-2] for name in names if name.endswith(EMBEDDINGS)]
        others.append(f"{config.embedding_learning_rate:g} for {' and '.join(embeddings)}")
    if others:
        say(f"learning rates: {config.learning_rate:g}, {', '.join(others)}; one schedule for all")
