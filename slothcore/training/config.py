"""Every option of a training run, in one flat dataclass: from Python, from YAML, from flags.

Names are PEFT's and transformers' where those have one. The help text lives beside each field, so the command line,
the documentation and the checks cannot drift apart.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from slothcore.data.formats import LAYOUTS
from slothcore.training.options import check_names, coerce, option, read_yaml

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
)

# Names in one word, q_proj,v_proj; a regular expression may have commas of its own.
NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")

# Never written into a file, and not shown.
SECRETS = ("token",)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a training run. An unknown name or a wrong value raises ValueError.

    Flags stand on top of the file: `TrainConfig.from_sources("run.yaml", {"max_steps": 100})`.
    """

    model: str | None = option(None, "a Hugging Face name or a local folder with the base model", group="Model")
    revision: str | None = option(None, "branch, tag or commit of a model on the Hub", group="Model")
    token: str | None = option(
        None,
        "access token of the Hub, written nowhere; null: HF_TOKEN, or what hf auth login stored",
        group="Model",
        shown=False,
    )
    local_files_only: bool = option(False, "take a Hub model from the download cache, without network", group="Model")
    bits: Literal[4, 16, 32] = option(4, "base weights: 4 (NF4), 16 (bfloat16 or float16) or 32", group="Model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "compute dtype; null: bfloat16 or float16 on a GPU, float32 on a CPU", group="Model"
    )
    device: str | None = option(None, "cpu, cuda or cuda:N; null: a GPU if there is one", group="Model")
    max_seq_length: int | None = option(
        None,
        "tokens of the longest row, and of a packed row; beyond the model's limit see rope_scaling; "
        "null: 2048, or that limit if it is less",
        group="Model",
    )
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | Mapping[str, Any] | None = option(
        None,
        "how positions beyond the model's limit are reached, or the values as in config.json; null: linear",
        group="Model",
    )
    gradient_checkpointing: Literal["mlp", "offload"] | bool = option(
        False,
        "less memory for more time: true recomputes each layer in the backward pass; mlp: gate and up of the MLP only; "
        "offload: as mlp, and what else is kept waits in host memory",
        group="Model",
    )

    data: str | tuple[str, ...] | None = option(None, "training files: .json, .jsonl, .csv, .txt", group="Data")
    format: str = option(
        "auto", f"layout of the records: {', '.join(LAYOUTS)}, or auto: told from the field names", group="Data"
    )
    text_field: str = option("text", "field that holds the text of a plain-text record", group="Data")
    eval_data: str | tuple[str, ...] | None = option(None, "files to evaluate on", group="Data")
    eval_fraction: float = option(0.0, "share of the training records held out instead of eval_data", group="Data")
    completion_only_loss: bool | None = option(
        None, "train on the answers only; null: yes where prompt and answer are told apart", group="Data"
    )
    packing: bool = option(False, "fill each row with several documents, attention kept apart", group="Data")
    overlength: Literal["truncate", "drop"] = option(
        "truncate", "what happens to a row longer than max_seq_length; counted and said", group="Data"
    )

    full_finetuning: bool = option(
        False,
        "train all weights instead of a LoRA adapter; bits 32, or 16, which rounds small updates away",
        group="LoRA",
    )
    r: int = option(16, "rank of the adapter", group="LoRA")
    lora_alpha: float = option(16, "the adapter is scaled by lora_alpha / r", group="LoRA")
    lora_dropout: float = option(0.0, "dropout on the input of the adapter", group="LoRA")
    target_modules: str | tuple[str, ...] = option(
        "all-linear", "names of the linear layers to adapt, or all-linear", group="LoRA"
    )
    bias: Literal["none", "all", "lora_only"] = option("none", "which biases are trained", group="LoRA")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead", group="LoRA")
    lora_dtype: Literal["float32", "auto"] = option(
        "float32", "dtype of the adapter; auto: the compute dtype, which takes less memory", group="LoRA"
    )
    modules_to_save: tuple[str, ...] = option((), "further modules to train whole, such as lm_head", group="LoRA")

    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs when positive", group="Optimization")
    num_train_epochs: float = option(1.0, "passes over the data when max_steps is not given", group="Optimization")
    per_device_train_batch_size: int = option(
        2, "rows of one forward and backward pass, unless memory_budget takes more", group="Optimization"
    )
    gradient_accumulation_steps: int = option(4, "passes of one optimizer step", group="Optimization")
    memory_budget: Literal["auto"] | float | None = option(
        "auto",
        "GiB that the tensors of a run may take on the GPU, or auto: what is free at its start; rows of a step then "
        "go through in as few passes as fit by prediction, with the same result; "
        "null, and auto on a CPU: per_device_train_batch_size rows a pass",
        group="Optimization",
    )
    cuda_graphs: bool | None = option(
        None, "replay short passes as CUDA graphs; null: on a GPU, where the model allows it", group="Optimization"
    )
    graph_tokens: int = option(2048, "tokens of the longest pass that replays a graph", group="Optimization")
    learning_rate: float = option(2e-4, "highest learning rate", group="Optimization")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear", "how the learning rate falls after the warm-up", group="Optimization"
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0", group="Optimization")
    warmup_ratio: float = option(0.0, "warmup_steps as a share of all steps", group="Optimization")
    optim: Literal["adamw", "adamw_8bit"] = option(
        "adamw", "AdamW, or bitsandbytes' 8-bit one (GPU)", group="Optimization"
    )
    weight_decay: float = option(0.0, "decoupled decay; biases and norms are exempt", group="Optimization")
    adam_beta1: float = option(0.9, "decay of AdamW's first moment", group="Optimization")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment", group="Optimization")
    adam_epsilon: float = option(1e-8, "added to AdamW's denominator", group="Optimization")
    max_grad_norm: float = option(1.0, "clip the norm of all gradients to this; 0: no clipping", group="Optimization")
    seed: int = option(42, "fixes initial adapter weights, data order and dropout", group="Optimization")

    output_dir: str = option("output", "folder for the adapter, the checkpoints and the log", group="Run")
    overwrite_output_dir: bool = option(False, "delete the run that output_dir already holds", group="Run")
    resume_from_checkpoint: bool | str | None = option(
        None, "a checkpoint folder, or latest: the newest one in output_dir", group="Run"
    )
    logging_steps: int = option(10, "steps between two lines of the log", group="Run")
    save_steps: int = option(500, "steps between two checkpoints; 0: none", group="Run")
    save_total_limit: int | None = option(3, "how many checkpoints are kept, the newest; null: all", group="Run")
    eval_steps: int | None = option(None, "steps between two evaluations; null: only at the end", group="Run")
    per_device_eval_batch_size: int = option(8, "rows of one forward pass in evaluation", group="Run")
    plot: bool = option(True, "draw loss.png at the end (needs matplotlib)", group="Run")
    disable_tqdm: bool = option(False, "lines instead of a progress bar, as outside of a terminal", group="Run")

    def __post_init__(self) -> None:
        for name, annotation in field_types().items():
            object.__setattr__(self, name, coerce(name, getattr(self, name), annotation))
        if isinstance(self.target_modules, str) and NAMES.fullmatch(self.target_modules):
            object.__setattr__(self, "target_modules", _split([self.target_modules]))
        object.__setattr__(self, "modules_to_save", _split(self.modules_to_save))
        if isinstance(self.resume_from_checkpoint, bool):
            object.__setattr__(self, "resume_from_checkpoint", "latest" if self.resume_from_checkpoint else None)
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float):
                _require(math.isfinite(value), f"{name} must be finite, got {value}")
        for name in "model data eval_data output_dir revision token rope_scaling".split():
            # As an unset variable of a shell script gives it.
            _require(getattr(self, name) not in ("", (), {}), f"{name} must not be empty")
        for name in COUNTS:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in "warmup_steps save_steps seed weight_decay max_grad_norm".split():
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in "learning_rate adam_epsilon num_train_epochs lora_alpha".split():
            _require(getattr(self, name) > 0, f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in "eval_fraction lora_dropout adam_beta1 adam_beta2".split():
            _require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")
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
            not (self.eval_data and self.eval_fraction),
            "eval_data and eval_fraction are both set; drop one",
        )

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
        return yaml.safe_dump(repeated.to_dict(), sort_keys=False)


def field_types() -> dict[str, Any]:
    """The type of each option, in the order in which they are declared."""
    hints = get_type_hints(TrainConfig)
    return {item.name: hints[item.name] for item in fields(TrainConfig)}


def _split(words: Iterable[str]) -> tuple[str, ...]:
    """The names in words that may hold several of them, with commas between."""
    return tuple(name.strip() for word in words for name in word.split(","))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
