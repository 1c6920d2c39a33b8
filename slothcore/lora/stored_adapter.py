"""An adapter's files, read and checked against a model that stays as it is."""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slothcore.lora.config import LoraConfig
from slothcore.lora.folded import require_not_folded_in
from slothcore.lora.fused_experts import split_fused_adapter
from slothcore.lora.init_factors import Factors
from slothcore.lora.plan import AdapterPlan
from slothcore.lora.recorded import AdapterFile, as_trained
from slothcore.lora.whole_model import config_in_part, name_in_part
from slothcore.models.decoder import Decoder
from slothcore.models.vocabulary import EMBEDDING, TABLES

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The factor that has a row for each token, too.
HEAD_FACTOR = "lm_head.lora_B.weight"
MAGNITUDE = "lora_magnitude_vector"
# A parameter at first, then a module with a weight; in files it has kept its name.
THEIR_MAGNITUDE = re.compile(rf"\.{MAGNITUDE}(\.default)?(\.weight)?$")
# transformers 5 calls every block of experts `mlp`; PEFT renames the factors that it reads, but no trained router.
OUR_ROUTER, THEIR_ROUTER = ".block_sparse_moe.gate.", ".mlp.gate."


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter's folder holds, its names and shapes those that the model needs.

    Attributes:
        plan: its places in the model, with its configuration.
        tensors: under the names that they would have in the model, without PEFT's additions; on the host.
        taken_out: what was taken out of the base weights, under the names of the factors; empty if nothing was.
        vocab_size: rows of its embedding, its head or the factors of that; 0 if it has none of them.
    """

    plan: AdapterPlan
    tensors: dict[str, Tensor]
    taken_out: dict[str, Tensor]
    vocab_size: int

    @classmethod
    def read(cls, model: Decoder, folder: Path, *, keep_base: bool = False) -> "StoredAdapter":
        """Read the adapter in `folder` for this model.

        Args:
            keep_base: read what began with a part of the base weights as the ordinary adapter of twice the rank that
                its file tells everyone, which needs no other base; see `recorded.py`.
        Raises: ValueError, in one sentence, if files are missing or damaged, the adapter uses what slothcore does not
            implement, or names or shapes show that it belongs to another base model.
        """
        config = told = LoraConfig.from_folder(folder)
        weights = adapter_weights(folder)
        file = AdapterFile.read(weights)
        if keep_base and file.is_doubled:
            stored, taken_out = file.tensors, dict[str, Tensor]()
            if model.bits == 4:
                warnings.warn(
                    f"the adapter in {folder} was begun with a part of its base weights and stands beside others on "
                    "the unchanged ones; on a base in NF4 it differs from what was trained by what quantising loses",
                    stacklevel=3,
                )
        else:
            config, stored, taken_out = as_trained(file, config, model)
        if config is told:
            config = config_in_part(config, model, (name.removeprefix(PREFIX) for name in stored))
        if config.target_parameters:
            config, stored = split_fused_adapter(config, stored, model, str(weights))
        plan = AdapterPlan.of(model, config)
        # Of a trained module of a resized base PEFT saves what it was before, too.
        loaded = {
            _plain_name(name, model): tensor for name, tensor in stored.items() if ".original_module." not in name
        }
        vocab_size = max((len(loaded[name]) for name in (*TABLES, HEAD_FACTOR) if name in loaded), default=0)
        expected = _expected_shapes(model, plan, loaded, vocab_size)
        _check(expected, loaded, weights, config)
        taken = {_plain_name(name, model): tensor.clone() for name, tensor in taken_out.items()}
        if taken:
            _check({name: shape for name, shape in expected.items() if _is_factor(name)}, taken, weights, config)
        adapter = cls(plan, loaded, taken, vocab_size)
        require_not_folded_in(model, adapter.factors, folder)
        return adapter

    def factors(self) -> dict[str, Factors]:
        """Path of each target -> A and B, of a stack for all experts."""
        return _factors_of(self.plan, self.tensors)

    def factors_taken_out(self) -> dict[str, Factors]:
        """The same of what was taken out of the base weights; empty if nothing was."""
        return _factors_of(self.plan, self.taken_out) if self.taken_out else {}

    def magnitudes(self) -> dict[str, Tensor]:
        """Path of each target -> the lengths [out] that DoRA has learned; empty without DoRA."""
        if not self.plan.config.use_dora:
            return {}
        return {path: self.tensors[f"{path}.{MAGNITUDE}"] for path in self.plan.targets}

    def whole_parameters(self) -> dict[str, Tensor]:
        """Path -> value of every parameter that the adapter replaces: biases, trained modules, tables of tokens."""
        names = dict.fromkeys((*self.plan.saved, *self.plan.biases, *TABLES))
        return {name: self.tensors[name] for name in names if name in self.tensors}


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


def _plain_name(name: str, model: Decoder) -> str:
    """The name in the file without what PEFT's wrappers add to it.

    PEFT itself leaves out the adapter's name, "default", which state dicts gathered by other programs still have.
    """
    name = THEIR_MAGNITUDE.sub(f".{MAGNITUDE}", name)
    for inserted in (".base_layer.", ".modules_to_save.", ".default."):
        name = name.replace(inserted, ".")
    if model.config.moe is not None and model.config.moe.block_name == "block_sparse_moe":
        name = name.replace(THEIR_ROUTER, OUR_ROUTER)
    return name_in_part(name.removeprefix(PREFIX))


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
    """Raise ValueError unless the names and shapes in the file are those expected, and numbers are what it holds."""
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
        if not found[name].is_floating_point():
            stored_as = str(found[name].dtype).removeprefix("torch.")
            raise ValueError(
                f"{file}: {name} is stored as {stored_as}, codes of a quantisation that PEFT does not have; save the "
                "adapter in 16 or 32 bits"
            )
