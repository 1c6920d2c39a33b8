"""Every option of a training run, in one flat dataclass: from Python, from YAML, from flags.

The options themselves stand in `option_groups.py`; here is what holds between them.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from slothcore.data.columns import ColumnTemplates
from slothcore.data.formats import check_format_name
from slothcore.data.new_tokens import check_new_tokens
from slothcore.lora.config import LoraConfig
from slothcore.lora.init_names import check_init
from slothcore.training.option_groups import DataOptions, LoraOptions, ModelOptions, OptimizationOptions, RunOptions
from slothcore.training.options import WORDS_FOR_NONE, check_device_name, check_names, coerce, read_yaml, strict_names
from slothcore.training.schedule import checked_kwargs

# At least 1 where they are given.
COUNTS = (
    "r",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "max_seq_length",
    "save_total_limit",
    "eval_steps",
    "graph_tokens",
    "loftq_iter",
    *("early_stopping_patience", "sample_steps", "sample_max_new_tokens"),
)

# Greater than 0 where they are given.
POSITIVE = (
    *("learning_rate", "adam_epsilon", "num_train_epochs", "lora_alpha"),
    *("loraplus_lr_ratio", "embedding_learning_rate", "neftune_noise_alpha"),
)

# As an unset variable of a shell script gives it.
NOT_EMPTY = (
    *("model", "data", "eval_data", "output_dir", "revision", "token", "rope_scaling"),
    *("chat_template", "prompt_template", "completion_template", "data_weights"),
    *("sample_prompts", "run_name", "logging_dir", "adapter", "text_field"),
)

# Names in one word, q_proj,v_proj; a regular expression may have commas of its own.
NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")

# What report_to may name.
TRACKERS = ("tensorboard", "wandb")

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}

# Never written into a file, and not shown.
SECRETS = ("token",)


@strict_names
@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunOptions, OptimizationOptions, LoraOptions, DataOptions, ModelOptions):
    """Options of a training run. An unknown name or a wrong value raises ValueError.

    Flags stand on top of the file: `TrainConfig.from_sources("run.yaml", {"max_steps": 100})`.
    """

    def __post_init__(self) -> None:
        for name, annotation in field_types().items():
            object.__setattr__(self, name, coerce(name, getattr(self, name), annotation))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and NAMES.fullmatch(value):
                object.__setattr__(self, name, _split([value]))
        for name in ("rank_pattern", "alpha_pattern", "layers_to_transform"):
            object.__setattr__(self, name, getattr(self, name) or None)
        object.__setattr__(self, "modules_to_save", _split(self.modules_to_save))
        object.__setattr__(self, "report_to", _trackers(self.report_to))
        if isinstance(self.resume_from_checkpoint, bool):
            object.__setattr__(self, "resume_from_checkpoint", "latest" if self.resume_from_checkpoint else None)
        # As in transformers; models, adapters and data are found at ~ wherever they are named.
        for name in ("output_dir", "logging_dir", "resume_from_checkpoint", "chat_template", "sample_prompts"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, os.path.expanduser(value))
        self._check_ranges()
        self._check_combinations()
        self._check_beginning()
        kwargs = checked_kwargs(
            self.lr_scheduler_type, self.lr_scheduler_kwargs or {}, learning_rate=self.learning_rate
        )
        object.__setattr__(self, "lr_scheduler_kwargs", kwargs or None)

    def _check_ranges(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float):
                _require(math.isfinite(value), f"{name} must be finite, got {value}")
        for name in NOT_EMPTY:
            _require(getattr(self, name) not in ("", (), {}), f"{name} must not be empty")
        for name in COUNTS:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in "warmup_steps save_steps seed weight_decay max_grad_norm early_stopping_threshold".split():
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in POSITIVE:
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be greater than 0, got {value}")
        for name in "eval_fraction lora_dropout adam_beta1 adam_beta2".split():
            _require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")
        length = self.max_seq_length
        _require(
            length is None or length > 1,
            f"max_seq_length must be at least 2, got {length}: nothing predicts the first token",
        )
        for layer in self.layers_to_transform or ():
            _require(layer >= 0, f"layers_to_transform counts layers from 0, got {layer}")
        if self.device is not None:
            check_device_name(self.device)
        check_format_name(self.format)
        check_new_tokens(self.new_tokens)
        for weight in self.data_weights or ():
            _require(0 < weight < math.inf, f"each of data_weights must be greater than 0, got {weight}")
        budget = self.memory_budget
        _require(
            budget is None or isinstance(budget, str) or budget > 0,
            f"memory_budget must be greater than 0 GiB, got {budget}",
        )
        _require(self.seed < 2**63, f"seed must be below 2**63, got {self.seed}")
        _require(0 <= self.warmup_ratio <= 1, f"warmup_ratio must lie in [0, 1], got {self.warmup_ratio}")
        _require(
            self.max_steps >= 1 or self.max_steps == -1,
            f"max_steps must be at least 1, or -1 to count in num_train_epochs, got {self.max_steps}",
        )

    def _check_combinations(self) -> None:
        _require(
            self.bits == 4 or self.dtype is None or BITS[self.dtype] == self.bits,
            f"dtype {self.dtype} does not go with bits={self.bits}",
        )
        _require(
            not (self.full_finetuning and self.bits == 4),
            "full_finetuning trains dense weights, and bits is 4; set bits to 16 or 32, or train a LoRA adapter",
        )
        _require(
            not (self.full_finetuning and self.dtype == "float16"),
            "full_finetuning in float16 loses small updates; set dtype to bfloat16 or float32",
        )
        _require(
            not (self.warmup_steps and self.warmup_ratio),
            f"warmup_steps ({self.warmup_steps}) and warmup_ratio ({self.warmup_ratio}) are both set; drop one",
        )
        _require(
            not (self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio)),
            "lr_scheduler_type constant has no warm-up; set it to constant_with_warmup, or drop warmup_steps and "
            "warmup_ratio",
        )
        adapter = "use_dora init_lora_weights use_rslora lora_dropout modules_to_save"
        for name in f"{adapter} exclude_modules layers_to_transform rank_pattern alpha_pattern".split():
            _require(
                not self.full_finetuning or getattr(self, name) == getattr(TrainConfig, name),
                f"{name} is about a LoRA adapter, and full_finetuning trains all weights; drop one",
            )
        _require(
            not (self.full_finetuning and self.loraplus_lr_ratio is not None),
            "loraplus_lr_ratio is about LoRA factors, and full_finetuning has none; drop one",
        )
        _require(
            not (self.eval_data and self.eval_fraction),
            "eval_data and eval_fraction are both set; drop one",
        )
        _require(
            self.prompt_template is None or self.completion_template is not None,
            "prompt_template is set without completion_template, and nothing would be learned; give both",
        )
        if self.completion_template is not None:
            ColumnTemplates(self.completion_template, self.prompt_template or "")
        if self.data_weights is not None:
            files = [self.data] if isinstance(self.data, str) else self.data or ()
            _require(
                len(self.data_weights) == len(files),
                f"data_weights and data must be equally many, got {len(self.data_weights)} and {len(files)}; "
                "give one for each",
            )
        self._check_evaluations()

    def _check_beginning(self) -> None:
        """What an adapter is on, and begins with."""
        check_init(self.init_lora_weights)
        LoraConfig(
            exclude_modules=self.exclude_modules,
            rank_pattern=dict(self.rank_pattern or {}),
            alpha_pattern=dict(self.alpha_pattern or {}),
        )
        _require(
            self.init_lora_weights != "loftq" or self.bits == 4,
            f"init_lora_weights loftq makes up for what NF4 loses, and bits is {self.bits}; set bits to 4, or choose "
            "pissa",
        )
        _require(
            self.loftq_iter == 1 or self.init_lora_weights == "loftq",
            f"loftq_iter is {self.loftq_iter}, and has no effect without init_lora_weights loftq; set that too, or "
            "drop loftq_iter",
        )
        # axolotl says so which kind of adapter is to be made.
        _require(
            self.adapter not in ("lora", "qlora"),
            f"adapter names a saved adapter that is to be trained further, got {self.adapter!r}; leave it out for a "
            "new one, which bits: 4 makes a QLoRA",
        )
        _require(
            self.adapter is None or not self.full_finetuning,
            f"adapter {self.adapter} would be trained further, and full_finetuning trains no adapter; drop one",
        )

    def _check_evaluations(self) -> None:
        """What is decided by several evaluations needs several; what goes with an option needs that option."""
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            _require(
                not getattr(self, name) or self.eval_steps is not None,
                f"{name} is set without eval_steps, so there is one evaluation only, at the end; set eval_steps, "
                "and eval_data or eval_fraction",
            )
        for name, needed in (
            ("early_stopping_threshold", "early_stopping_patience"),
            ("sample_steps", "sample_prompts"),
        ):
            _require(
                not getattr(self, name) or getattr(self, needed) is not None,
                f"{name} is set without {needed}, and has no effect; set {needed} too, or leave {name} out",
            )
        known = ", ".join(TRACKERS)
        for name in self.report_to or ():
            _require(name in TRACKERS, f"report_to must be of {known}, got {name!r}; correct the name, or leave it out")

    @property
    def source(self) -> str | None:
        """What is loaded: the model, or without one the adapter, which names its base."""
        return self.model or self.adapter

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the configuration") -> "TrainConfig":
        """Raises ValueError for an unknown name, naming the nearest known one, and for a wrong value."""
        check_names(values, field_types(), source=source)
        return cls(**values)

    @classmethod
    def from_sources(cls, path: str | Path | None, flags: Mapping[str, Any]) -> "TrainConfig":
        """The options of a YAML file (if any) with those of `flags` on top."""
        values: dict[str, Any] = {}
        if path is not None:
            values = read_yaml(path)
            check_names(values, field_types(), source=str(path))
        check_names(flags, field_types(), source="the flags")
        return cls.from_dict({**values, **flags})

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        """Raises FileNotFoundError, or ValueError for anything that is not a valid configuration."""
        return cls.from_sources(path, {})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; without secrets."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in SECRETS}

    def to_yaml(self) -> str:
        """The file that repeats this run."""
        # What belongs to one invocation, a repetition must not inherit.
        repeated = replace(self, resume_from_checkpoint=None, overwrite_output_dir=False)
        return yaml.safe_dump(repeated.to_dict(), sort_keys=False, allow_unicode=True)


def field_types() -> dict[str, Any]:
    """The type of each option, in the order in which they are declared."""
    hints = get_type_hints(TrainConfig)
    return {item.name: hints[item.name] for item in fields(TrainConfig)}


def _split(words: Iterable[str]) -> tuple[str, ...]:
    """The names in words that may hold several of them, with commas between."""
    return tuple(name.strip() for word in words for name in word.split(","))


def _trackers(report_to: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names in `report_to`, each once; None for none, however that is written."""
    names = _split([report_to] if isinstance(report_to, str) else report_to or ())
    return tuple(dict.fromkeys(name for name in names if name.lower() not in WORDS_FOR_NONE)) or None


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
