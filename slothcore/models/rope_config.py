"""Rotary positions as a Hugging Face `config.json` describes them.

Older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters` that holds both; Phi-3 keeps
`original_max_position_embeddings` and `partial_rotary_factor` beside them.
"""

from typing import Any, NamedTuple

from slothcore.layers.rope import ROPE_TYPES, RopeParameters
from slothcore.models.hf_config import HfConfig


def take_rope(
    hf: HfConfig, max_position_embeddings: int, head_dim: int, *, partial_rotary: bool = False
) -> RopeParameters:
    """Read the one RoPE of a model, in either spelling.

    Args:
        hf: the keys are taken out of it.
        max_position_embeddings: from which some types measure.
        head_dim: channels of a head, which lists of factors must fit.
        partial_rotary: whether this architecture can turn a part of each head only.
    Raises: ValueError, naming the key, for what is unknown, missing, of the wrong length or out of range.
    """
    theta = hf.take("rope_theta", float, 1e4)
    outer = {
        key: hf.take(key, kind, None)
        for key, kind in (("original_max_position_embeddings", int), ("partial_rotary_factor", float))
    }
    values = _one_spelling(hf.source, hf.take("rope_parameters", dict, {}), hf.take("rope_scaling", dict, {}))
    # As transformers has it: the length beside the dict wins over the one in it, the share of channels does not.
    if outer["original_max_position_embeddings"] is not None:
        values["original_max_position_embeddings"] = outer["original_max_position_embeddings"]
    if outer["partial_rotary_factor"] is not None:
        values.setdefault("partial_rotary_factor", outer["partial_rotary_factor"])
    return _read(values, hf.source, theta, max_position_embeddings, head_dim, partial_rotary=partial_rotary)


def take_layer_ropes(
    hf: HfConfig, max_position_embeddings: int, head_dim: int
) -> tuple[RopeParameters, RopeParameters]:
    """Read the two RoPEs of Gemma 3: that of its global layers, and that of its layers with a window.

    Older files have `rope_local_base_freq` for the second; in newer ones `rope_parameters` holds a dict for each,
    "full_attention" and "sliding_attention". `rope_scaling` is for the global layers.
    Raises: ValueError as `take_rope` does.
    """
    theta, local_theta = hf.take("rope_theta", float, 1e6), hf.take("rope_local_base_freq", float, 1e4)
    both = HfConfig(dict(hf.take("rope_parameters", dict, {})), f"{hf.source}, rope_parameters")
    full, sliding = both.take("full_attention", dict, {}), both.take("sliding_attention", dict, {})
    both.finish()
    full = _one_spelling(hf.source, full, hf.take("rope_scaling", dict, {}))
    ropes = (
        _read(full, hf.source, theta, max_position_embeddings, head_dim),
        _read(dict(sliding), hf.source, local_theta, max_position_embeddings, head_dim),
    )
    if not all(rope.truncate for rope in ropes):
        raise ValueError(
            f"{hf.source}, RoPE: truncate = false is not supported in a model with two RoPEs, of which transformers "
            "does not read it; leave it out"
        )
    return ropes


def _one_spelling(source: str, parameters: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """The contents of the newer dict or of the older one; both may be there if they do not disagree."""
    if parameters and any(parameters.get(key) != value for key, value in scaling.items()):
        raise ValueError(
            f"{source}: rope_parameters and rope_scaling contradict each other; move what you want of the "
            "latter into rope_parameters, and drop rope_scaling"
        )
    return dict(parameters or scaling)


class _Lengths(NamedTuple):
    """How many positions a model has, and how many its file says that it was trained on, if it does."""

    longest: int
    original: int | None

    @property
    def trained(self) -> int:
        """From which types that say nothing else measure."""
        return self.longest if self.original is None else self.original


def _read(
    values: dict[str, Any],
    source: str,
    theta: float,
    max_position_embeddings: int,
    head_dim: int,
    *,
    partial_rotary: bool = False,
) -> RopeParameters:
    """`theta` is for `values` without rope_theta."""
    hf = HfConfig(values, f"{source}, RoPE")
    has_short_factor = "short_factor" in values
    oldest = hf.take("type", str, "default")
    rope_type = hf.take("rope_type", str, oldest)
    # Phi-3 had two other names for it before "longrope".
    if rope_type == "su" or (rope_type == "yarn" and has_short_factor):
        rope_type = "longrope"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{source}: RoPE type {rope_type!r} is not supported; known are {', '.join(ROPE_TYPES)}")
    fields: dict[str, Any] = {"rope_type": rope_type, "rope_theta": float(hf.take("rope_theta", float, theta))}
    if partial_rotary:
        fields["partial_rotary_factor"] = float(hf.take("partial_rotary_factor", float, 1.0))
    else:
        hf.require("partial_rotary_factor", 1.0)
    lengths = _Lengths(max_position_embeddings, hf.take("original_max_position_embeddings", int, None))
    if rope_type in OWN_FIELDS:
        fields |= OWN_FIELDS[rope_type](hf, lengths)
    hf.finish()
    parameters = RopeParameters(**fields)
    parameters.rotary_dim(head_dim)
    return parameters


def _of_linear(hf: HfConfig, lengths: _Lengths) -> dict[str, Any]:
    return {"factor": float(hf.take("factor", float))}


def _of_dynamic(hf: HfConfig, lengths: _Lengths) -> dict[str, Any]:
    fields = {"factor": float(hf.take("factor", float)), "max_position_embeddings": lengths.longest}
    if lengths.original not in (None, lengths.longest):
        raise ValueError(
            f"{hf.source}: the type dynamic scales from max_position_embeddings, {lengths.longest}, and "
            f"original_max_position_embeddings says {lengths.original}; transformers ignores the latter: make them "
            "equal"
        )
    return fields


def _of_llama3(hf: HfConfig, lengths: _Lengths) -> dict[str, Any]:
    numbers = {key: float(hf.take(key, float)) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return {**numbers, "original_max_position_embeddings": lengths.trained}


def _of_yarn(hf: HfConfig, lengths: _Lengths) -> dict[str, Any]:
    fields = _take_stretch(hf, lengths)
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        value = hf.take(key, float, None)
        if value:  # zero counts as absent, as in transformers
            fields[key] = float(value)
    fields["truncate"] = hf.take("truncate", bool, True)
    hf.take("finetuned", bool, None)  # of the first files with yarn; only their "dynamic-yarn" went by it
    # The authors' own factor on top, by which DeepSeek-R1-0528-Qwen3-8B undoes the growth of cosines and sines.
    # vLLM multiplies by it, transformers passes it over.
    own_factor = hf.take("attn_factor", float, None)
    if own_factor:
        fields["attention_factor"] = own_factor * RopeParameters(rope_type="yarn", **fields).attention_scaling
    return fields


def _of_longrope(hf: HfConfig, lengths: _Lengths) -> dict[str, Any]:
    fields = _take_stretch(hf, lengths)
    for key in ("short_factor", "long_factor"):
        fields[key] = _numbers(hf.source, key, hf.take(key, list))
    return fields


OWN_FIELDS = {
    "linear": _of_linear,
    "dynamic": _of_dynamic,
    "llama3": _of_llama3,
    "yarn": _of_yarn,
    "longrope": _of_longrope,
}
"""What reads the fields of `RopeParameters` that only one type has; the type "default" has none."""


def _take_stretch(hf: HfConfig, lengths: _Lengths) -> dict[str, Any]:
    """What yarn and longrope share. Without `factor` it is the ratio of the two lengths."""
    factor = hf.take("factor", float, None)
    if factor is None:
        if lengths.original is None:
            raise ValueError(f"{hf.source} lacks the key 'factor', or 'original_max_position_embeddings' to derive it")
        factor = lengths.longest / max(lengths.original, 1)
    attention_factor = hf.take("attention_factor", float, None)
    return {
        "factor": float(factor),
        "attention_factor": None if attention_factor is None else float(attention_factor),
        "original_max_position_embeddings": lengths.trained,
    }


def _numbers(source: str, key: str, values: list[Any]) -> tuple[float, ...]:
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{source}: {key} must be a list of numbers, got {value!r} in it")
    return tuple(map(float, values))
