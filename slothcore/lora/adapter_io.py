"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Names: `base_model.model.` + the path of the module + `.lora_A.weight` [r, in] or `.lora_B.weight` [out, r], where each
expert of a stack is a module; a module of `modules_to_save` has its own names; a trained bias is `X.bias`, or
`X.base_layer.bias` where X is a target. DoRA's `.lora_magnitude_vector` [out] has no `.weight`.
"""

import os
import warnings
from collections.abc import Mapping
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
from slothcore.lora.dense_beside_experts import as_parameters
from slothcore.lora.init_factors import Factors
from slothcore.lora.init_names import REPEATABLE
from slothcore.lora.peft_ranks import with_ranks_for_peft
from slothcore.lora.plan import AdapterPlan
from slothcore.lora.recorded import doubled, recorded
from slothcore.lora.stored_adapter import MAGNITUDE, OUR_ROUTER, PREFIX, THEIR_ROUTER, WEIGHTS_FILE, StoredAdapter
from slothcore.lora.whole_model import config_in_whole, is_text_part, name_in_whole
from slothcore.models.checkpoint import save_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.hub import model_folder
from slothcore.models.vocabulary import HEAD, TABLES, resize_vocabulary, vocabulary_tables

CONFIG_FILE = "adapter_config.json"


def save_adapter(model: Decoder, path: str | Path) -> None:
    """Write the adapter of the model into the folder `path`, readable by PEFT.

    Both files get their final names once they are complete; an earlier adapter there is replaced. Where the adapter
    began with a part of the base weights, the files hold an ordinary one of twice the rank for the unchanged base, and
    what `load_adapter` makes the changed one from: see `recorded.py`. Beside experts PEFT is told of dense layers as of
    parameters, and of no dropout: see `dense_beside_experts.py`; of ranks and alphas under the names for which it asks:
    see `peft_ranks.py`; and elsewhere of nothing in words that its older versions lack. The text part of a model that
    reads pictures has the names that it has there: see `whole_model.py`.

    Raises: ValueError if the model has no adapter, or `path` is a file.
    """
    config = lora_config_of(model)
    if config is None:
        raise ValueError(
            "the model has no LoRA adapter to save; call add_lora first, or save_merged for the whole model"
        )
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write the adapter into")
    folder.mkdir(parents=True, exist_ok=True)
    plan = AdapterPlan.of(model, config)
    trained = config
    state = adapter_state(model)
    if model.taken_out:
        config, state = doubled(config, state, _factors_by_name(plan, model.taken_out))
    told = with_ranks_for_peft(as_parameters(config, plan, model), config, plan, model)
    paths = [name for target in plan.targets.values() for name in target.names]
    told = told.with_paths(paths)
    if not told.target_parameters and not any(target.is_stack for target in plan.targets.values()):
        told = told.for_older_readers(paths)
    if told.target_parameters and told.use_dora:
        warnings.warn(
            f"PEFT has no DoRA for {told.target_parameters[0]}, which it can only take as a parameter beside experts, "
            "and refuses this adapter; slothcore reads it, and for other programs export the format merged",
            stacklevel=2,
        )
    if is_text_part(model):
        told = config_in_whole(told, plan)
        state = {PREFIX + name_in_whole(name.removeprefix(PREFIX)): tensor for name, tensor in state.items()}
    metadata = recorded(trained, is_doubled=bool(model.taken_out), told_otherwise=told != config)
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    partial = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_tensors(state, partial[WEIGHTS_FILE], metadata=metadata)
        partial[CONFIG_FILE].write_text(told.to_json(), encoding="utf-8")
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
    dtype = resolve_lora_dtype(lora_dtype, model)
    stored = StoredAdapter.read(model, folder)
    plan = stored.plan
    # PEFT's, saved unconverted: its own loader decomposes the base again, too.
    decomposes = not stored.taken_out and plan.config.init_lora_weights in REPEATABLE
    if decomposes and model.has_tied_head and HEAD.removesuffix(".weight") in plan.targets:
        raise ValueError(
            f"the adapter in {folder} was begun by {plan.config.init_lora_weights} with a part of a head that is the "
            "embedding as well, from which PEFT takes it, too; train it anew without lm_head in target_modules"
        )
    if stored.vocab_size > model.config.vocab_size:
        resize_vocabulary(model, stored.vocab_size)
    factors = {
        path: (lora_A.to(model.device, dtype, copy=True), lora_B.to(model.device, dtype, copy=True))
        for path, (lora_A, lora_B) in stored.factors().items()
    }
    taken_out = stored.factors_taken_out()
    if decomposes:
        taken_out = initial_factors(model, plan, dtype=torch.float32)[1]
    take_out(model, plan, taken_out)
    magnitudes = None
    if plan.config.use_dora:
        magnitudes = {p: m.to(model.device, torch.float32, copy=True) for p, m in stored.magnitudes().items()}
    attach(model, plan, factors, magnitudes)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in stored.whole_parameters().items():
            value = tensor.to(parameters[name])
            if name in TABLES and name not in plan.saved and not torch.equal(value, parameters[name]):
                model.vocabulary_changed = True
            parameters[name].copy_(value)
    if not trainable:
        model.requires_grad_(False)
    return model


def _file_name(name: str, plan: AdapterPlan) -> str:
    """A parameter's name in the file; PEFT finds the bias of a target under the layer that it wraps."""
    path, _, attribute = name.rpartition(".")
    if path in plan.targets:
        return f"{PREFIX}{path}.base_layer.{attribute}"
    return f"{PREFIX}{name.replace(OUR_ROUTER, THEIR_ROUTER)}"
