"""Adapters in files that everyone reads right, though they belong to changed base weights.

With W the weight of the model that is named as the base, s the scaling, (A, B) the factors as trained and (A0, B0)
those that were taken out of W:

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]

so the file holds an ordinary adapter of twice the rank for W, as PEFT's `path_initial_model_for_weight_conversion`
makes it. It is exact up to the rounding of the sum, but where the base is in NF4 the sum is not what was trained: there
the base is q(W - s B0 A0). As both pairs of factors are in the file unchanged, slothcore takes them apart and makes
that base again; how the adapter really is stands in the metadata of the file, which others pass over.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slothcore.lora.base_change import can_take_out
from slothcore.lora.config import LoraConfig
from slothcore.lora.init_names import uses_weights
from slothcore.lora.plan import AdapterPlan
from slothcore.models.decoder import Decoder
from slothcore.models.hub import ADAPTER_FILE

KEY = "slothcore_adapter"
AXIS = {".lora_A.": 0, ".lora_B.": 1}
"""Along which the rank of a factor lies."""


@dataclass(frozen=True)
class AdapterFile:
    """An `adapter_model.safetensors`.

    Attributes:
        tensors: by name, mapped from the file and read where they are used.
        trained: the adapter as it was trained, if that is another than the file tells everyone; else None.
        is_doubled: whether the tensors are those of twice its rank.
    """

    tensors: dict[str, Tensor]
    trained: LoraConfig | None = None
    is_doubled: bool = False

    @classmethod
    def read(cls, file: Path) -> "AdapterFile":
        """Raises: ValueError, naming the file, if it is damaged."""
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                record = (opened.metadata() or {}).get(KEY)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); copy it again") from error
        if record is None:
            return cls(tensors)
        try:
            values = json.loads(record)
            known = {field.name for field in fields(LoraConfig)}
            config = LoraConfig(**{name: value for name, value in values["config"].items() if name in known})
            return cls(tensors, config, bool(values["doubled"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: its metadata do not describe the adapter ({error}); copy it again") from error

    def trained_tensors(self) -> dict[str, Tensor]:
        """The factors as they were trained, and whatever else the file holds."""
        return {name: self._half(name, tensor, first=True) for name, tensor in self.tensors.items()}

    def taken_tensors(self) -> dict[str, Tensor]:
        """What was taken out of the base weights, under the names of the factors; empty if nothing was."""
        if not self.is_doubled:
            return {}
        return {n: self._half(n, t, first=False) for n, t in self.tensors.items() if _axis(n) is not None}

    def _half(self, name: str, tensor: Tensor, *, first: bool) -> Tensor:
        axis = _axis(name)
        if not self.is_doubled or axis is None:
            return tensor
        trained, taken = tensor.tensor_split(2, dim=axis)
        return trained if first else taken.neg() if axis else taken


def trained_config(folder: Path) -> LoraConfig:
    """The adapter of a folder as it was trained; as its configuration alone says, where its weights are not there.

    Raises: ValueError as `LoraConfig.from_folder`, or if the file of its weights is damaged.
    """
    config, weights = LoraConfig.from_folder(folder), folder / ADAPTER_FILE
    return (AdapterFile.read(weights).trained if weights.is_file() else None) or config


def as_trained(
    file: AdapterFile, config: LoraConfig, model: Decoder
) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The adapter as it was trained, where its file tells others of another: configuration, tensors, what it took out.

    Args:
        config: of the folder.
    """
    if file.trained is None:
        return config, file.tensors, {}
    # The base by the folder's word, which a user may have corrected.
    trained = replace(file.trained, base_model_name_or_path=config.base_model_name_or_path, revision=config.revision)
    if trained.init_lora_weights == "loftq" and model.bits != 4:
        warnings.warn(
            f"this adapter was begun by LoftQ for a base in 4 bits, and this one has {model.bits}; load it with "
            "bits=4, or its output is not what was trained",
            stacklevel=4,
        )
    if file.is_doubled and not can_take_out(model, AdapterPlan.of(model, trained)):
        warnings.warn(
            f"this adapter was begun by {trained.init_lora_weights}, and the original weights that its base is made "
            "from are not to be had; it is put on this base as an ordinary one of twice the rank, and differs from "
            "what was trained by what quantising loses",
            stacklevel=4,
        )
        return config, file.tensors, {}
    return trained, file.trained_tensors(), file.taken_tensors()


def recorded(config: LoraConfig, *, is_doubled: bool, told_otherwise: bool = False) -> dict[str, str]:
    """The metadata of the file of an adapter that began with base weights, or is told otherwise; else empty."""
    if not uses_weights(config.init_lora_weights) and not told_otherwise:
        return {}
    return {KEY: json.dumps({"config": asdict(config), "doubled": is_doubled})}


def doubled(
    config: LoraConfig, tensors: Mapping[str, Tensor], taken: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The ordinary adapter for the unchanged base: twice the rank, the scaling as it was.

    Args:
        tensors: of the adapter as trained, by their names in the file.
        taken: what was taken out of the base weights, under the names of the factors.
    """
    by = math.sqrt(2) if config.use_rslora else 2
    config = replace(
        config,
        r=2 * config.r,
        lora_alpha=by * config.lora_alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: by * alpha for pattern, alpha in config.alpha_pattern.items()},
    )
    joined = dict(tensors)
    for name, tensor in taken.items():
        axis = _axis(name)
        assert axis is not None
        joined[name] = torch.cat([tensors[name].to("cpu"), tensor.neg() if axis else tensor], dim=axis)
    return config, joined


def _axis(name: str) -> int | None:
    """0 for an A, 1 for a B, None for any other tensor."""
    return next((axis for part, axis in AXIS.items() if part in name), None)
