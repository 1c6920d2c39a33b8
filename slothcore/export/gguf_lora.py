"""The adapter alone as a GGUF file, which llama.cpp puts on the GGUF file of its base (`--lora`).

llama.cpp adds alpha / r * B A x, with one alpha for the whole file. Where the layers of an adapter have other factors
than that, their B is multiplied by what is missing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from slothcore.data.tokenizer import Tokenizer
from slothcore.export.gguf import mixture_of, model_name, require_close
from slothcore.export.gguf_file import Entry, Value, read_file, require_library, write_file
from slothcore.export.gguf_quantize import quantize
from slothcore.export.gguf_tensors import Layout
from slothcore.export.gguf_types import Kind
from slothcore.export.model_card import warn_of_scaled_rope
from slothcore.export.self_check import distance, sample_logits
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.attach import lora_config_of
from slothcore.lora.plan import AdapterPlan
from slothcore.models.decoder import Decoder

# The same numbers on the same base, but for their rounding.
LARGEST_DISTANCE = {"f32": 1e-3, "f16": 0.02, "bf16": 0.1}


def require(model: Decoder, dtype: str | None) -> None:
    """Raises: ValueError if the model has no adapter, or one that is more than products of two factors."""
    require_library()
    config = lora_config_of(model)
    if config is None:
        raise ValueError("the model has no LoRA adapter; export it with the format gguf, as a whole model")
    plan = AdapterPlan.of(model, config)
    more = {
        "DoRA": config.use_dora,
        "trained biases": bool(plan.biases),
        "modules_to_save": bool(plan.saved),
        "new tokens": model.vocabulary_changed,
        "a LoRA term of a head that is the embedding": model.has_tied_head and "lm_head" in plan.targets,
    }
    found = [what for what, is_there in more.items() if is_there]
    if found:
        raise ValueError(
            f"a GGUF adapter holds LoRA factors alone, and this one has {', '.join(found)}; export it with the format "
            "gguf, as a whole model"
        )
    _layout(model)


def size(model: Decoder, dtype: str | None) -> int:
    """Bytes of all factors."""
    return sum(entry.nbytes for entry in _entries(_factors(model), dtype))


def write(model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: str | None) -> None:
    """Fill the folder. Warns if the base needs its RoPE scaled."""
    warn_of_scaled_rope(model)
    factors, found = _factors(model), _layout(model).architecture
    values: dict[str, Value] = {
        "general.type": "adapter",
        "general.name": f"{model_name(model, None)} adapter",
        "general.base_model.count": 1,
        "general.base_model.0.name": model_name(model, None),
        "adapter.type": "lora",
        "adapter.lora.alpha": _alpha(model),
    }
    parts = ((name, 0, quantize(factor, _kind(dtype))) for name, factor in factors.items())
    write_file(folder / file_name(dtype), found.name, values, _entries(factors, dtype), parts)


def check(model: Decoder, folder: Path, dtype: str | None, *, give_up: bool) -> str:
    """Compare the factors of the file with the model's, and put them in their place for a moment.

    Raises: ValueError if they, or the logits, are others.
    """
    assert dtype is not None
    expected, factors = sample_logits(model).cpu(), _factors(model)
    stored = read_file(folder / file_name(dtype), factors)
    tensors = {name: stored[name].numbers(factor.shape) for name, factor in factors.items()}
    for name, factor in factors.items():
        require_close(tensors[name], factor.cpu(), _kind(dtype), name)
    with _factors_of_file(model, tensors):
        found = distance(sample_logits(model).cpu(), expected)
    if not found <= LARGEST_DISTANCE[dtype]:
        raise ValueError(
            f"the GGUF adapter that was written gives other logits than the model (distance {found:.3g}), so it was "
            "not kept; please report this"
        )
    return "read back in the place of the model's own: the same logits" + (f" (distance {found:.1g})" if found else "")


def file_name(dtype: str | None) -> str:
    """What the file is called."""
    return f"adapter-{_kind(dtype)}.gguf"


def _kind(dtype: str | None) -> Kind:
    return cast(Kind, mixture_of(dtype))


def _entries(factors: Mapping[str, Tensor], dtype: str | None) -> list[Entry]:
    return [Entry(name, _kind(dtype), tuple(factor.shape)) for name, factor in factors.items()]


def _layout(model: Decoder) -> Layout:
    return Layout(model.config, tied=model.has_tied_head)


def _targets(model: Decoder) -> Iterator[tuple[str, Linear | ExpertLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, Linear | ExpertLinear) and module.lora_A is not None:
            yield path, module


def _alpha(model: Decoder) -> float:
    """The one number for all layers: what the first has."""
    path, module = next(_targets(model))
    return module.lora_scaling * _rank(model, path, module)


def _rank(model: Decoder, path: str, module: Linear | ExpertLinear) -> int:
    assert module.lora_A is not None
    return module.lora_A.shape[-2] * (2 if path in model.taken_out else 1)


def _missing_factor(model: Decoder, path: str, module: Linear | ExpertLinear) -> float:
    """What llama.cpp's alpha / r lacks to the scaling of a layer; 1 as a rule."""
    return module.lora_scaling * _rank(model, path, module) / _alpha(model)


def _factors(model: Decoder) -> dict[str, Tensor]:
    """A and B of every layer as the file has them, float32; of experts, all in one."""
    layout = _layout(model)
    tensors: dict[str, Tensor] = {}
    for path, module in _targets(model):
        assert module.lora_A is not None
        assert module.lora_B is not None
        lora_A, lora_B = module.lora_A.detach().float(), module.lora_B.detach().float()
        if path in model.taken_out:  # for the base as it was: see slothcore/lora/recorded.py
            taken_A, taken_B = (factor.to(lora_A) for factor in model.taken_out[path])
            lora_A, lora_B = torch.cat((lora_A, taken_A), -2), torch.cat((lora_B, -taken_B), -1)
        lora_B = layout.to_file(f"{path}.lora_B", lora_B) * _missing_factor(model, path, module)
        name = f"{layout.name(path)}.weight"
        tensors |= {f"{name}.lora_a": lora_A, f"{name}.lora_b": lora_B}
    return tensors


@contextmanager
@torch.no_grad()
def _factors_of_file(model: Decoder, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The model with the factors of a file, until the block ends."""
    layout = _layout(model)
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for path, module in _targets(model):
            assert module.lora_A is not None
            assert module.lora_B is not None
            name, rank = f"{layout.name(path)}.weight", module.lora_A.shape[-2]
            lora_B = tensors[f"{name}.lora_b"].to(model.device) / _missing_factor(model, path, module)
            found_A = tensors[f"{name}.lora_a"][..., :rank, :]
            found_B = layout.from_file(f"{path}.lora_B", lora_B)[..., :rank]
            for parameter, found in ((module.lora_A, found_A), (module.lora_B, found_B)):
                own.append((parameter, parameter.detach().clone()))
                parameter.copy_(found)
        yield
    finally:
        for changed, kept in own:
            changed.copy_(kept)
