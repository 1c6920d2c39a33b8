"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Names: `base_model.model.` + the path of the module + `.lora_A.weight` [r, in] or `.lora_B.weight` [out, r], where each
expert of a stack is a module; a module of `modules_to_save` has its own names; a trained bias is `X.bias`, or
`X.base_layer.bias` where X is a target.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slothcore.lora.attach import (
    AdapterPlan,
    LoraDtype,
    attach,
    lora_config_of,
    require_no_adapter,
    resolve_lora_dtype,
)
from slothcore.lora.config import LoraConfig
from slothcore.lora.fused_experts import split_fused_adapter
from slothcore.models.checkpoint import save_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.hub import model_folder

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# transformers 5 calls every block of experts `mlp`; PEFT renames the factors that it reads, but no trained router.
OUR_ROUTER, THEIR_ROUTER = ".block_sparse_moe.gate.", ".mlp.gate."
# PEFT adds these to an adapter of the head, or of a model whose vocabulary was changed.
OPTIONAL = ("model.embed_tokens.weight", "lm_head.weight")


def save_adapter(model: Decoder, path: str | Path) -> None:
    """Write the adapter of the model into the folder `path`, readable by PEFT.

    Both files get their final names once they are complete; an earlier adapter there is replaced.

    Raises: ValueError if the model has no adapter.
    """
    config = lora_config_of(model)
    if config is None:
        raise ValueError(
            "the model has no LoRA adapter to save; call add_lora first, or save_merged for the whole model"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(target.is_stack for target in AdapterPlan.of(model, config).targets.values()):
        # PEFT fuses gate and up into one adapter of twice the rank and alpha: it keeps alpha / r, not alpha / sqrt(r).
        config = config.without_rslora()
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in adapter_state(model).items()}
    partial = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_tensors(state, partial[WEIGHTS_FILE])
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
    state: dict[str, Tensor] = {}
    for path, target in plan.targets.items():
        for factor in ("lora_A", "lora_B"):
            parameter = parameters[f"{path}.{factor}"]
            for name, tensor in zip(target.names, parameter if target.is_stack else [parameter], strict=True):
                state[f"{PREFIX}{name}.{factor}.weight"] = tensor
    # By the configuration, not by what trains now: an adapter may be frozen when it is saved.
    for name in dict.fromkeys((*plan.biases, *plan.saved)):
        state[_file_name(name, plan)] = parameters[name]
    return state


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

    Everything is checked before the model is touched.

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
    try:
        with safe_open(weights, framework="pt") as file:
            # Mapped from the file, and read where they are used.
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is truncated or damaged ({error}); copy it again") from error
    if config.target_parameters:
        config, stored = split_fused_adapter(config, stored, model, str(weights))
    plan = AdapterPlan.of(model, config)
    loaded = {_plain_name(name, model): tensor for name, tensor in stored.items()}
    _check(_expected_shapes(model, plan, loaded), loaded, weights, config)
    factors = {}
    for path, target in plan.targets.items():
        pair = []
        for kind in "AB":
            tensors = [loaded[f"{name}.lora_{kind}.weight"] for name in target.names]
            tensor = torch.stack(tensors) if target.is_stack else tensors[0]
            pair.append(tensor.to(model.device, dtype, copy=True))
        factors[path] = pair[0], pair[1]
    attach(model, plan, factors)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in dict.fromkeys((*plan.saved, *plan.biases, *OPTIONAL)):
            if name in loaded:
                parameters[name].copy_(loaded[name])
    if not trainable:
        model.requires_grad_(False)
    return model


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
    for inserted in (".base_layer.", ".modules_to_save.", ".default."):
        name = name.replace(inserted, ".")
    if model.config.moe is not None and model.config.moe.block_name == "block_sparse_moe":
        name = name.replace(THEIR_ROUTER, OUR_ROUTER)
    return name.removeprefix(PREFIX)


def _expected_shapes(model: Decoder, plan: AdapterPlan, found: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of every tensor that the file must hold, and of what it need not but does."""
    expected: dict[str, tuple[int, ...]] = {}
    for target in plan.targets.values():
        for name in target.names:
            expected[f"{name}.lora_A.weight"] = target.shape_A[-2:]
            expected[f"{name}.lora_B.weight"] = target.shape_B[-2:]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    optional = [name for name in OPTIONAL if name in found]
    expected.update((name, tuple(parameters[name].shape)) for name in (*plan.biases, *plan.saved, *optional))
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
