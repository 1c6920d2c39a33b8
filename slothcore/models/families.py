"""The model families that slothcore reads; the table in the README is generated from here."""

import difflib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from slothcore.models import llama
from slothcore.models.config import DecoderConfig, HfConfig


@dataclass(frozen=True)
class Family:
    """One `model_type` and who publishes models of it."""

    model_type: str
    name: str
    checkpoints: tuple[str, ...]
    config_from_hf: Callable[[HfConfig], DecoderConfig]


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "Llama",
            ("Llama 1", "Llama 2", "Llama 3", "Llama 3.1", "Llama 3.2", "TinyLlama", "CodeLlama", "Yi"),
            llama.config_from_hf,
        ),
    )
}


def decoder_config(values: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Turn the contents of a `config.json` into a `DecoderConfig`.

    Raises: ValueError, naming the key, for an unknown model type, an unknown key, or a value not implemented.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"{source}: model_type {model_type!r} is not supported{hint}; supported are {', '.join(FAMILIES)}"
        )
    hf = HfConfig(deepcopy(dict(values)), source)
    try:
        config = FAMILIES[model_type].config_from_hf(hf)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(source) else f"{source}: {message}") from None
    hf.finish()
    return config


def supported_families_table() -> str:
    """The supported families as a Markdown table."""
    rows = [f"| {f.name} | `{f.model_type}` | {', '.join(f.checkpoints)} |" for f in FAMILIES.values()]
    return "\n".join(["| Family | `model_type` | Published models |", "| --- | --- | --- |", *rows])
