"""The model families that slothcore reads; the table in the README is generated from here."""

import difflib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from slothcore.models import gemma, gemma3, llama, mistral, mixtral, phi3, qwen, qwen3_moe
from slothcore.models.config import DecoderConfig
from slothcore.models.hf_config import HfConfig


@dataclass(frozen=True)
class Family:
    """One `model_type` and who publishes models of it.

    Attributes:
        model_type: as `config.json` says it.
        name, checkpoints: for people.
        config_from_hf: reads the config.json of a text model.
        text_values: finds that config.json inside the one of a multimodal model; None for a text model.
        weight_prefixes: pairs (prefix on disk, prefix in the model), of which the first that fits counts; a weight that
            begins with none of them has its name in the model.
        ignored_weights: prefixes of weights on disk that belong to no text model.
    """

    model_type: str
    name: str
    checkpoints: tuple[str, ...]
    config_from_hf: Callable[[HfConfig], DecoderConfig]
    text_values: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None
    weight_prefixes: tuple[tuple[str, str], ...] = ()
    ignored_weights: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "Llama",
            (
                *("Llama 1", "Llama 2", "Llama 3", "Llama 3.1", "Llama 3.2"),
                *("TinyLlama", "CodeLlama", "Yi", "SmolLM2"),
            ),
            llama.config_from_hf,
        ),
        Family(
            "mistral",
            "Mistral",
            ("Mistral 7B", "Mistral Nemo 12B", "Mistral Small 22B", "Zephyr"),
            mistral.config_from_hf,
        ),
        Family("mixtral", "Mixtral", ("Mixtral 8x7B", "Mixtral 8x22B"), mixtral.config_from_hf),
        Family("qwen2", "Qwen2", ("Qwen1.5", "Qwen2", "Qwen2.5"), qwen.qwen2_config_from_hf),
        Family("qwen3", "Qwen3", ("Qwen3 0.6B to 32B",), qwen.qwen3_config_from_hf),
        Family("qwen3_moe", "Qwen3-MoE", ("Qwen3 30B-A3B", "Qwen3 235B-A22B"), qwen3_moe.config_from_hf),
        Family("gemma", "Gemma", ("Gemma 2B", "Gemma 7B", "CodeGemma"), gemma.gemma_config_from_hf),
        Family("gemma2", "Gemma 2", ("Gemma 2 2B", "Gemma 2 9B", "Gemma 2 27B"), gemma.gemma2_config_from_hf),
        Family("gemma3_text", "Gemma 3", ("Gemma 3 270M", "Gemma 3 1B"), gemma3.config_from_hf),
        Family(
            "gemma3",
            "Gemma 3 (text part)",
            ("Gemma 3 4B", "Gemma 3 12B", "Gemma 3 27B"),
            gemma3.config_from_hf,
            gemma3.text_values,
            gemma3.WEIGHT_PREFIXES,
            gemma3.VISION_PREFIXES,
        ),
        Family(
            "phi3",
            "Phi-3",
            ("Phi-3 mini", "Phi-3 medium", "Phi-3.5-mini", "Phi-4", "Phi-4-mini"),
            phi3.config_from_hf,
        ),
    )
}


def family_of(values: Mapping[str, Any], source: str = "config.json") -> Family:
    """The family of the contents of a `config.json`. Raises: ValueError if slothcore has no such family."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.85)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"{source}: model_type {model_type!r} is not supported{hint}; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def text_config(values: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The `config.json` of the text model: that of a multimodal file's text part, else a copy of `values` itself.

    Raises: ValueError, naming the key, for an unknown model type, or a multimodal file that is not implemented.
    """
    find = family_of(values, source).text_values
    return deepcopy(dict(values)) if find is None else find(deepcopy(dict(values)), source)


def decoder_config(values: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Turn the contents of a `config.json` into a `DecoderConfig`.

    Raises: ValueError, naming the key, for an unknown model type, an unknown key, or a value not implemented.
    """
    family = family_of(values, source)
    hf = HfConfig(text_config(values, source), source)
    try:
        config = family.config_from_hf(hf)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(source) else f"{source}: {message}") from None
    hf.finish()
    return config


def supported_families_table() -> str:
    """The supported families as a Markdown table."""
    rows = [f"| {f.name} | `{f.model_type}` | {', '.join(f.checkpoints)} |" for f in FAMILIES.values()]
    return "\n".join(["| Family | `model_type` | Published models |", "| --- | --- | --- |", *rows])
