"""Longer texts than a model was trained for: its `config.json` with RoPE scaled.

The result is an ordinary configuration in the spelling of the file, so transformers and servers read an export alike.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from slothcore.layers.rope import RopeParameters
from slothcore.models.families import decoder_config

SCALINGS = ("linear", "dynamic", "yarn", "llama3")  # those that a name and a factor define
READ_HEAD_DIM = ("dynamic", "yarn", "longrope")
"""For these transformers 5 takes head_dim as it stands; Mixtral's files leave it out, and could not be loaded."""


def scaled_config(
    hf_config: Mapping[str, Any],
    max_seq_length: int | None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    *,
    source: str = "config.json",
) -> tuple[dict[str, Any], str | None]:
    """The configuration for documents of `max_seq_length` tokens.

    A model that is long enough stays as it is. One that is not gets linear scaling by the ratio of the lengths, unless
    `rope_scaling` says otherwise. max_position_embeddings becomes the new length, except with the type dynamic, which
    scales from it; what the model was trained for stays in the scaling's original_max_position_embeddings.

    Args:
        hf_config: contents of a `config.json`; not changed.
        max_seq_length: None: as long as `rope_scaling` reaches, or as the model is.
        rope_scaling: "linear", "dynamic", "yarn" or "llama3", which need max_seq_length to tell their factor; or a
            dict as `config.json` has it, whose own `factor` wins and must be enough.
        source: the file, for messages.
    Returns: the configuration, and a sentence that says what was changed or left out; None if nothing was.
    Raises: ValueError if the file is not one that slothcore reads, max_seq_length cannot be reached, the scaling has
        no factor or is unknown, or the model has a scaling of its own.
    """
    config = decoder_config(hf_config, source)
    if max_seq_length is not None and (isinstance(max_seq_length, bool) or max_seq_length < 1):
        raise ValueError(f"max_seq_length must be at least 1, got {max_seq_length!r}")
    reach = config.longest_document
    is_too_long = max_seq_length is not None and max_seq_length > reach
    result = deepcopy(dict(hf_config))
    if rope_scaling is None and not is_too_long:
        return result, None
    scaling = checked_scaling("linear" if rope_scaling is None else rope_scaling)
    if config.rope.rope_type != "default":
        if not is_too_long and _agrees(config.rope, scaling):
            return result, None
        wish = f"max_seq_length {max_seq_length}" if rope_scaling is None else f"rope_scaling {rope_scaling!r}"
        raise ValueError(
            f"{wish} cannot be had: the model scales its RoPE already (type {config.rope.rope_type!r}), for "
            f"{reach} positions; use max_seq_length up to {reach} without rope_scaling"
        )

    rope_type, trained = scaling["rope_type"], scaling.get("original_max_position_embeddings", reach)
    if isinstance(trained, bool) or not isinstance(trained, int) or trained < 1:
        raise ValueError(f"rope_scaling's original_max_position_embeddings must be a positive int, got {trained!r}")
    factor = _factor(scaling, trained, max_seq_length)
    if factor <= 1:
        return result, (
            f"rope_scaling {rope_scaling!r} is left out: max_seq_length {max_seq_length} is within the {trained} "
            "positions that the model was made for"
        )
    positions = max(reach, round(trained * factor))
    if max_seq_length is not None and max_seq_length > positions:
        raise ValueError(
            f"rope_scaling's factor {factor:g} reaches {positions} positions ({trained} * {factor:g}), fewer than "
            f"max_seq_length {max_seq_length}; it needs {max_seq_length / trained:g}"
        )

    scaling["factor"] = factor
    has_trained_length = rope_type in ("yarn", "llama3", "longrope")
    if has_trained_length:
        scaling["original_max_position_embeddings"] = trained
    if rope_type == "llama3":
        scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaling}
    _set_rope(result, scaling, reach if rope_type == "dynamic" else positions, head_dim=config.head_dim)
    try:
        made = decoder_config(result, f"{source} with rope_scaling")
    except ValueError as error:
        if isinstance(rope_scaling, Mapping):
            raise  # the dict is what is wrong
        raise ValueError(
            f"this model cannot be stretched with RoPE type {rope_type!r} ({error}); use max_seq_length up to {reach}"
        ) from None
    if has_trained_length and made.rope.original_max_position_embeddings != trained:
        # One beside the scaling, which Phi-3's files have or mean, wins over the one in it, in transformers too.
        _text_of(result)["original_max_position_embeddings"] = trained
    message = f"RoPE scaling ({rope_type}, factor {factor:g}) takes the model from {trained} positions to {positions}"
    if rope_scaling is None:
        message += f", because max_seq_length is {max_seq_length}; rope_scaling chooses another type"
    return result, message


def checked_scaling(rope_scaling: str | Mapping[str, Any]) -> dict[str, Any]:
    """The scaling with its type under "rope_type". Raises: ValueError for one that no model can have."""
    if isinstance(rope_scaling, str):
        if rope_scaling not in SCALINGS:
            raise ValueError(
                f"rope_scaling must be one of {', '.join(SCALINGS)}, or a dict as config.json has it, "
                f"got {rope_scaling!r}"
            )
        return {"rope_type": rope_scaling}
    if not isinstance(rope_scaling, Mapping):
        raise ValueError(f"rope_scaling must be one of {', '.join(SCALINGS)}, or a dict, got {rope_scaling!r}")
    scaling = deepcopy(dict(rope_scaling))
    oldest = scaling.pop("type", None)  # as older files name it
    rope_type = scaling.pop("rope_type", oldest)
    if rope_type is None:
        raise ValueError(
            f"rope_scaling needs a rope_type beside {', '.join(map(repr, scaling))}: {', '.join(SCALINGS)}"
        )
    if rope_type not in (*SCALINGS, "longrope"):
        raise ValueError(f"rope_scaling's rope_type must be one of {', '.join(SCALINGS)}, longrope, got {rope_type!r}")
    factor = scaling.get("factor")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 1):
        raise ValueError(f"rope_scaling's factor must be a number above 1, got {factor!r}")
    return {"rope_type": rope_type, **scaling}


def _agrees(rope: RopeParameters, scaling: Mapping[str, Any]) -> bool:
    """Whether the model has this scaling already."""
    return all(
        getattr(rope, key, None) == (tuple(value) if isinstance(value, list) else value)
        for key, value in scaling.items()
    )


def _factor(scaling: Mapping[str, Any], trained: int, max_seq_length: int | None) -> float:
    """The scaling's own factor, which exceeds 1, else the ratio of the lengths."""
    factor = scaling.get("factor")
    if factor is None:
        if max_seq_length is None:
            raise ValueError(
                f"rope_scaling {scaling['rope_type']!r} has no factor; give max_seq_length (above {trained}), or a "
                "dict such as {'rope_type': 'yarn', 'factor': 4.0}"
            )
        return max_seq_length / trained
    return float(factor)


def _text_of(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Where the file describes its text model."""
    text = hf_config.get("text_config")
    return text if isinstance(text, dict) else hf_config


def _set_rope(hf_config: dict[str, Any], scaling: dict[str, Any], positions: int, *, head_dim: int) -> None:
    """Put the scaling where the file keeps its RoPE; of Gemma 3, which has two, the one of the global layers."""
    text = _text_of(hf_config)
    text["max_position_embeddings"] = positions
    if scaling["rope_type"] in READ_HEAD_DIM and text.get("head_dim") is None:
        text["head_dim"] = head_dim
    parameters = text.get("rope_parameters")
    if not parameters:
        text["rope_scaling"] = scaling
        return
    text.pop("rope_scaling", None)  # of the type default, if it is there at all
    if "full_attention" in parameters or "sliding_attention" in parameters:
        parameters["full_attention"] = {**(parameters.get("full_attention") or {}), **scaling}
    else:
        parameters.update(scaling)
        parameters.pop("type", None)
