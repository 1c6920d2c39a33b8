"""One GGUF file: the model with its adapter folded in and its tokenizer, for llama.cpp and what is built on it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slothcore.data.tokenizer import Tokenizer
from slothcore.export import gguf_tokenizer
from slothcore.export.export import export_model
from slothcore.export.formats import format_named
from slothcore.export.gguf_architecture import architecture, metadata
from slothcore.export.gguf_file import Entry, Value, read_file, require_library, write_file
from slothcore.export.gguf_quantize import quantize
from slothcore.export.gguf_tensors import FileTensor, Layout, file_tensors, rope_factors
from slothcore.export.gguf_types import Kind, Mixture, kind_of
from slothcore.export.self_check import blockwise_logits, distance, original_logits, sample_ids, sample_logits
from slothcore.lora.merge import Base, head_stays_tied, merged_state, merged_weights, require_base
from slothcore.models.decoder import Decoder

# Size of the rounding error of a weight as a share of its own: what one large number in each block costs the others,
# several times what usual weights lose, and far below what any mistake about names, rows or bytes does. Kinds that are
# not here hold the number of their type that is nearest.
LARGEST_ERROR: dict[Kind, float] = {"Q8_0": 0.03, "Q6_K": 0.08, "Q5_K": 0.15, "Q5_1": 0.2, "Q5_0": 0.2, "Q4_K": 0.2}
# What a number may be off by besides: float16 factors as small as can be, times the integers that they belong to.
SMALLEST_STEP = 2.0**-15
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32}  # llama_ftype
QUANTIZATION_VERSION = 2
# generation_config.json's names of what llama.cpp samples with where a caller says nothing.
SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# By this word in the name llama.cpp knows that special tokens swallow the space behind them, as those of Phi-3 do.
PHI3 = re.compile("phi-?3", re.IGNORECASE)


def export_gguf(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    *,
    quantization: str = "q8_0",
    base: Base = "loaded",
    check: bool = True,
    give_up_model: bool = False,
) -> str:
    """Write a GGUF file into the new folder `path`: `export_model` with the format "gguf".

    Args:
        tokenizer: None: a file without one, to which callers give token ids.
        quantization: "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m" or "q4_k_m".
        base, check, give_up_model: as for `export_model`.
    Returns: what the check found, in a few words.
    Raises: ValueError, before anything is written, for another quantization or a model that llama.cpp computes
        otherwise; for a tokenizer of which that is true. OSError if the disk fails.
    """
    format_named("gguf", quantization, option="quantization")
    options: dict[str, Any] = {"base": base, "check": check, "give_up_model": give_up_model}
    return export_model(model, tokenizer, path, format="gguf", dtype=quantization, **options)


def require(model: Decoder, dtype: str | None, *, base: Base = "loaded") -> None:
    """Raises: ValueError if llama.cpp computes no such model, the base is not to be had, or the package gguf is not."""
    require_library()
    require_base(model, base)
    architecture(model.config, tied=head_stays_tied(model))


def size(model: Decoder, dtype: str | None) -> int:
    """Bytes of all tensors."""
    return sum(entry.nbytes for entry in FilePlan(model, dtype).entries)


def write(
    model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: str | None, *, base: Base = "loaded"
) -> None:
    """Fill the folder.

    Raises: ValueError if llama.cpp has no tokenizer that gives the same ids, or a number is not finite in the dtype.
    """
    plan = FilePlan(model, dtype)
    found = plan.layout.architecture
    values: dict[str, Value] = {
        "general.type": "model",
        "general.name": model_name(model, tokenizer),
        "general.file_type": FILE_TYPES[mixture_of(dtype)],
        "general.quantization_version": QUANTIZATION_VERSION,
        **sampling_parameters(model.generation_config, SAMPLING),
        **metadata(model.config, found),
        **gguf_tokenizer.metadata(tokenizer, model.config.vocab_size, other_ends=model.eos_token_ids),
    }
    write_file(folder / file_name(dtype), found.name, values, plan.entries, plan.packed(base))


def check(model: Decoder, folder: Path, dtype: str | None, *, give_up: bool, base: Base = "loaded") -> str:
    """Read the file a weight at a time, and compare each with the model's own and the logits of all.

    Raises: ValueError if a weight is further from the model's than its kind rounds, or the logits are not finite.
    """
    plan = FilePlan(model, dtype)
    expected = sample_logits(model) if base == "loaded" else original_logits(model, dtype=model.dtype)
    weights = plan.read_back(folder / file_name(dtype), base)
    logits = blockwise_logits(model.config, weights, sample_ids(model), dtype=torch.float32, device=model.device)
    if not logits.isfinite().all():
        raise ValueError(
            f"the logits of the GGUF file are not finite in {dtype}, so it was not kept; export it with --dtype bf16"
        )
    found = distance(logits.cpu(), expected.cpu())
    return f"read back: the same weights; rounding to {dtype} moved the logits by {found:.1%} of their spread"


def file_name(dtype: str | None) -> str:
    """What the file is called, in the way of files on the Hub."""
    return f"model-{mixture_of(dtype)}.gguf"


def mixture_of(dtype: str | None) -> Mixture:
    """GGUF's name of a dtype of the table of formats."""
    assert dtype is not None
    return cast(Mixture, dtype.upper())


def model_name(model: Decoder, tokenizer: Tokenizer | None) -> str:
    """What people call the model: the last part of what it was loaded as."""
    name = PHI3.sub("Phi 3", Path(model.name_or_path or "").name or "model")
    return name if tokenizer is None or not gguf_tokenizer.has_phi3_tokens(tokenizer) else f"Phi-3 {name}"


def sampling_parameters(generation_config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int | float]:
    """What the model's authors sample with, nothing where they do not sample.

    Args:
        names: what it is to be called -> `generation_config.json`'s name.
    """
    given = generation_config if generation_config.get("do_sample") else {}
    found = {name: given.get(theirs) for name, theirs in names.items()}
    return {name: v for name, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class FilePlan:
    """What the file of a model holds.

    Attributes:
        layout: how the weights lie in it.
        entries: its tensors.
    """

    def __init__(self, model: Decoder, dtype: str | None) -> None:
        self._model = model
        tied = head_stays_tied(model)
        self.layout = Layout(model.config, tied=tied)
        self._factors = rope_factors(model.config)
        tensors = file_tensors(self.layout, {weight.name: weight.shape for weight in merged_weights(model)})
        self._place = {source: (t, index) for t in tensors for index, source in enumerate(t.sources)}
        self._kinds: dict[str, Kind] = {
            t.name: kind_of(t.name, mixture_of(dtype), model.config, shape=t.shape, tied=tied) for t in tensors
        }
        self.entries = [Entry(name, "F32", tuple(factor.shape)) for name, factor in self._factors.items()]
        self.entries += [Entry(t.name, self._kinds[t.name], t.shape) for t in tensors]

    def packed(self, base: Base) -> Iterator[tuple[str, int, np.ndarray]]:
        """The bytes of all parts of all tensors."""
        for name, factor in self._factors.items():
            yield name, 0, quantize(factor, "F32")
        for tensor, index, _, weight in self._weights(base):
            try:
                yield tensor.name, index, quantize(weight, self._kinds[tensor.name])
            except ValueError as error:
                raise ValueError(f"{tensor.name} cannot be written: {error}") from error

    def read_back(self, file: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
        """The weights of a file under Hugging Face's names, float32; each is compared with the model's.

        Raises: ValueError if one is not what it should be.
        """
        stored = read_file(file, [entry.name for entry in self.entries])
        for name, factor in self._factors.items():
            require_close(stored[name].numbers(factor.shape), factor, "F32", name)
        for tensor, index, source, weight in self._weights(base):
            part = index if len(tensor.sources) > 1 else None
            found = stored[tensor.name].numbers(weight.shape, part).to(weight.device)
            require_close(found, weight, self._kinds[tensor.name], tensor.name)
            yield source, self.layout.from_file(source, found)

    def _weights(self, base: Base) -> Iterator[tuple[FileTensor, int, str, Tensor]]:
        """Tensor of the file, which part of it, Hugging Face's name, and the weight as the file has it, float32."""
        for source, weight in merged_state(self._model, torch.float32, base):
            tensor, index = self._place[source]
            yield tensor, index, source, self.layout.to_file(source, weight)


def require_close(found: Tensor, expected: Tensor, kind: Kind, name: str) -> None:
    """Raise ValueError if a tensor of a file is further from what it should be than its kind rounds."""
    if kind in FLOATS:
        is_close = torch.equal(found, expected.to(FLOATS[kind]).float())
    else:
        allowed = LARGEST_ERROR[kind] * expected.norm() + SMALLEST_STEP * expected.numel() ** 0.5
        is_close = bool((found - expected).norm() <= allowed)
    if not is_close:
        raise ValueError(
            f"{name} of the GGUF file is not what the model has (as {kind}), so the file was not kept; please report "
            "this"
        )
