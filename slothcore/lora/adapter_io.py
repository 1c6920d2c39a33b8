"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Names: `base_model.model.` + the path of the module + `.lora_A.weight` [r, in] or `.lora_B.weight` [out, r], where each
expert of a stack is a module; a module of `modules_to_save` has its own names; a trained bias is `X.bias`, or
`X.base_layer.bias` where X is a target. DoRA's `.lora_magnitude_vector` [out] has no `.weight`.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from slothcore.lora.attach import (
    LoraDtype,
    attach,
    lora_config_of,
    require_no_adapter,
    resolve_lora_dtype,
)
from slothcore.lora.base_change import initial_factors, take_out
from slothcore.lora.config import LoraConfig
from slothcore.lora.fused_experts import split_fused_adapter
from slothcore.lora.init_factors import Factors
from slothcore.lora.init_names import REPEATABLE
from slothcore.lora.plan import AdapterPlan
from slothcore.lora.recorded import AdapterFile, as_trained, doubled, recorded
from slothcore.models.checkpoint import save_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.hub import model_folder
from slothcore.models.vocabulary import EMBEDDING, TABLES, resize_vocabulary, vocabulary_tables

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# The factor that has a row for each token, too.
HEAD_FACTOR = "lm_head.lora_B.weight"
MAGNITUDE = "lora_magnitude_vector"
# A parameter at first, then a module with a weight; in files it has kept its name.
THEIR_MAGNITUDE = re.compile(rf"\.{MAGNITUDE}(\.default)?(\.weight)?$")
# transformers 5 calls every block of experts `mlp`; PEFT renames the factors that it reads, but no trained router.
OUR_ROUTER, THEIR_ROUTER = ".block_sparse_moe.gate.", ".mlp.gate."


def save_adapter(model: Decoder, path: str | Path) -> None:
    """Write the adapter of the model into the folder `path`, readable by PEFT.

    Both files get their final names once they are complete; an earlier adapter there is replaced. Where the adapter
    began with a part of the base weights, the files hold an ordinary one of twice the rank for the unchanged base, and
    what `load_adapter` makes the changed one from: see `recorded.py`.

    Raises: ValueError if the model has no adapter.
    """
    config = lora_config_of(model)
    if config is None:
        raise ValueError(
            "the model has no LoRA adapter to save; call add_lora first, or save_merged for the whole model"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    plan = AdapterPlan.of(model, config)
    metadata = recorded(config, is_doubled=bool(model.taken_out))
    if any(target.is_stack for target in plan.targets.values()):
        # PEFT fuses gate and up into one adapter of twice the rank and alpha: it keeps alpha / r, not alpha / sqrt(r).
        config = config.without_rslora()
    state = adapter_state(model)
    if model.taken_out:
        config, state = doubled(config, state, _factors_by_name(plan, model.taken_out))
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    partial = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_tensors(state, partial[WEIGHTS_FILE], metadata=metadata)
        partial[CONFIG_FILE].write_text(config.to_json(), encoding="utf-8")
        for name, file in partial.items():
            file.replace(folder / name)
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)


def adapter_state(model: Decoder) -> dict[str, Tensor]:
    """The tensors of the adapter under PEFT's names: the parameters themselves, or windows into those of experts.

    Raises: ValueError if the model has no adapter.
    """
    config = lora_config_of(model)
    if config is None:
        raise ValueError("the model has no LoRA adapter")
    plan = AdapterPlan.of(model, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = _factors_by_name(
        plan, {path: (parameters[f"{path}.lora_A"], parameters[f"{path}.lora_B"]) for path in plan.targets}
    )
    if config.use_dora:
        state.update((f"{PREFIX}{path}.{MAGNITUDE}", parameters[f"{path}.{MAGNITUDE}"]) for path in plan.targets)
    # By the configuration, not by what trains now: an adapter may be frozen when it is saved.
    changed = vocabulary_tables(model) if model.vocabulary_changed else ()
    for name in dict.fromkeys((*plan.biases, *plan.saved, *changed)):
        state[_file_name(name, plan)] = parameters[name]
    return state


def _factors_by_name(plan: AdapterPlan, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The factors of each target under their names in the file; of a stack, each expert's."""
    return {
        f"{PREFIX}{name}.lora_{kind}.weight": tensor
        for path, target in plan.targets.items()
        for kind, factor in zip("AB", factors[path], strict=True)
        for name, tensor in zip(target.names, factor if target.is_stack else [factor], strict=True)
    }


def load_adapter(
    model: Decoder,
    path: str | Path,
    *,
    trainable: bool = True,
    lora_dtype: LoraDtype = "float32",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Decoder:
    """Put an adapter that slothcore or PEFT saved on its base model.

    Everything is checked before the model is touched. An adapter that slothcore began with a part of the base weights
    changes these as it did then; in NF4 they are quantised anew, from what the model's folder holds.

    Args:
        model: the base, without an adapter; changed in place.
        path: the adapter's folder, or its name on the Hugging Face Hub.
        trainable: whether it can be trained on, or is frozen too.
        lora_dtype: of the factors, as in `add_lora`.
        revision, token, cache_dir, local_files_only: of an adapter on the Hub, as in `slothcore.load`.
    Returns: the model.
    Raises: ValueError, in one sentence, if files are missing or damaged, the adapter uses what slothcore does not
        implement, or names or shapes show that it belongs to another base model.
    """
    require_no_adapter(model)
    folder = model_folder(path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config = LoraConfig.from_folder(folder)
    weights = adapter_weights(folder)
    dtype = resolve_lora_dtype(lora_dtype, model)
    config, stored, taken_out = as_trained(AdapterFile.read(weights), config, model)
    if config.target_parameters:
        config, stored = split_fused_adapter(config, stored, model, str(weights))
    plan = AdapterPlan.of(model, config)
    # Of a trained module of a resized base PEFT saves what it was before, too.
    loaded = {_plain_name(name, model): tensor for name, tensor in stored.items() if ".original_module." not in name}
    vocab_size = max((len(loaded[name]) for name in (*TABLES, HEAD_FACTOR) if name in loaded), default=0)
    expected = _expected_shapes(model, plan, loaded, vocab_size)
    _check(expected, loaded, weights, config)
    if vocab_size > model.config.vocab_size:
        resize_vocabulary(model, vocab_size)
    factors = {
        path: (lora_A.to(model.device, dtype, copy=True), lora_B.to(model.device, dtype, copy=True))
        for path, (lora_A, lora_B) in _factors_of(plan, loaded).items()
    }
    if not taken_out and config.init_lora_weights in REPEATABLE:
        # PEFT's, saved unconverted: its own loader decomposes the base again, too.
        take_out(model, plan, initial_factors(model, plan, dtype=torch.float32)[1])
    if taken_out:
        taken = {_plain_name(name, model): tensor.clone() for name, tensor in taken_out.items()}
        _check({name: shape for name, shape in expected.items() if _is_factor(name)}, taken, weights, config)
        take_out(model, plan, _factors_of(plan, taken))
    magnitudes = None
    if config.use_dora:
        stored_as = {path: loaded[f"{path}.{MAGNITUDE}"] for path in plan.targets}
        magnitudes = {path: m.to(model.device, torch.float32, copy=True) for path, m in stored_as.items()}
    attach(model, plan, factors, magnitudes)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in (name for name in dict.fromkeys((*plan.saved, *plan.biases, *TABLES)) if name in loaded):
            value = loaded[name].to(parameters[name])
            if name in TABLES and name not in plan.saved and not torch.equal(value, parameters[name]):
                model.vocabulary_changed = True
            parameters[name].copy_(value)
    if not trainable:
        model.requires_grad_(False)
    return model


def _factors_of(plan: AdapterPlan, loaded: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Path of each target -> A and B, of a stack for all experts, from their plain names."""
    factors = {}
    for path, target in plan.targets.items():
        tensors = [[loaded[f"{name}.lora_{kind}.weight"] for name in target.names] for kind in "AB"]
        lora_A, lora_B = (torch.stack(each) if target.is_stack else each[0] for each in tensors)
        factors[path] = lora_A, lora_B
    return factors


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter's weights. Raises: ValueError if the folder has none, or only pickled ones."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = (
            "; adapter_model.bin is pickled, which slothcore does not open: save it anew with PEFT" if pickled else ""
        )
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    return weights


def _file_name(name: str, plan: AdapterPlan) -> str:
    """A parameter's name in the file; PEFT finds the bias of a target under the layer that it wraps."""
    path, _, attribute = name.rpartition(".")
    if path in plan.targets:
        return f"{PREFIX}{path}.base_layer.{attribute}"
    return f"{PREFIX}{name.replace(OUR_ROUTER, THEIR_ROUTER)}"


def _plain_name(name: str, model: Decoder) -> str:
    """The name in the file without what PEFT's wrappers add to it.

    PEFT itself leaves out the adapter's name, "default", which state dicts gathered by other programs still have.
    """
    name = THEIR_MAGNITUDE.sub(f".{MAGNITUDE}", name)
    for inserted in (".base_layer.", ".modules_to_save.", ".default."):
        name = name.replace(inserted, ".")
    if model.config.moe is not None and model.config.moe.block_name == "block_sparse_moe":
        name = name.replace(THEIR_ROUTER, OUR_ROUTER)
    return name.removeprefix(PREFIX)


def _expected_shapes(
    model: Decoder, plan: AdapterPlan, found: Collection[str], vocab_size: int
) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of every tensor that the file must hold, and of what it need not but does.

    PEFT adds the embedding and the head to an adapter of the head; and, as slothcore, to one of a model with more
    tokens than its base has, which `vocab_size` counts.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for target in plan.targets.values():
        for name in target.names:
            expected[f"{name}.lora_A.weight"] = target.shape_A[-2:]
            expected[f"{name}.lora_B.weight"] = target.shape_B[-2:]
            if plan.config.use_dora:
                expected[f"{name}.{MAGNITUDE}"] = target.shape_B[-2:-1]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    optional = [name for name in TABLES if name in found]
    expected.update((name, tuple(parameters[name].shape)) for name in (*plan.biases, *plan.saved, *optional))
    if vocab_size > model.config.vocab_size:
        # Where the head stays the embedding, one table has all rows.
        stays_tied = model.has_tied_head and set(TABLES).isdisjoint(plan.saved)
        for name in {*optional, *((EMBEDDING,) if stays_tied else TABLES)}:
            expected[name] = vocab_size, model.config.hidden_size
        for name in (HEAD_FACTOR, f"lm_head.{MAGNITUDE}"):
            if name in expected:
                expected[name] = vocab_size, *expected[name][1:]
    return expected


def _check(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor],
    file: Path,
    config: LoraConfig,
) -> None:
    """Raise ValueError unless the names and shapes in the file are those expected."""
    base = f"; it was made for {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} tensors that this model needs, the first {missing[0]}{base}")
    unexpected = sorted(found.keys() - expected.keys())
    if unexpected:
        raise ValueError(
            f"{file} holds {len(unexpected)} tensors that this model has no place for, the first {unexpected[0]}{base}"
        )
    for name, shape in expected.items():
        actual = tuple(found[name].shape)
        if actual != shape:
            raise ValueError(f"{file}: {name} has the shape {actual}, but this model needs {shape}{base}")
