"""The options of a training run, group by group: type, default and help text of each.

Names are PEFT's and transformers' where those have one. The help text lives beside each field, so the command line,
the documentation and the checks cannot drift apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slothcore.data.formats import LAYOUTS
from slothcore.training.optimizer_kinds import Optim
from slothcore.training.options import option
from slothcore.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model, and how it is kept and computed."""

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
    new_tokens: tuple[str, ...] = option(
        (),
        "texts to add to the vocabulary, each as one token; to be learned, it needs embed_tokens and lm_head in "
        "modules_to_save",
        group="Model",
    )
    gradient_checkpointing: Literal["mlp", "offload"] | bool = option(
        False,
        "less memory for more time: true recomputes each layer in the backward pass; mlp: gate and up of the MLP only; "
        "offload: as mlp, and what else is kept waits in host memory",
        group="Model",
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained on, how records become text, and which of it is learned."""

    data: str | tuple[str, ...] | None = option(
        None,
        "training files (.json, .jsonl, .csv, .parquet, .txt, ...), folders, patterns, or datasets of the Hub",
        group="Data",
    )
    format: str = option(
        "auto", f"layout of the records: {', '.join(LAYOUTS)}, or auto: told from the field names", group="Data"
    )
    text_field: str = option("text", "field that holds the text of a plain-text record", group="Data")
    prompt_template: str | None = option(
        None,
        "one line with {column} names that makes the prompt of a record; goes with completion_template",
        group="Data",
    )
    completion_template: str | None = option(
        None, "one line with {column} names that makes what is learned of a record", group="Data"
    )
    data_weights: tuple[float, ...] | None = option(
        None,
        "how often the rows of each entry of data are seen, relative to the others; one number for each",
        group="Data",
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "a record that cannot be used ends the run, or is left out, counted and said", group="Data"
    )
    eval_data: str | tuple[str, ...] | None = option(None, "files to evaluate on", group="Data")
    eval_fraction: float = option(0.0, "share of the training records held out instead of eval_data", group="Data")
    completion_only_loss: bool | None = option(
        None, "train on the answers only; null: yes where prompt and answer are told apart", group="Data"
    )
    mask_history: bool = option(False, "of a conversation learn the assistant's last turn only", group="Data")
    chat_template: str | None = option(
        None, "name of a built-in chat template, or a .jinja file; null: the model's own", group="Data"
    )
    packing: bool = option(False, "fill each row with several documents, attention kept apart", group="Data")
    overlength: Literal["truncate", "drop"] = option(
        "truncate", "what happens to a row longer than max_seq_length; counted and said", group="Data"
    )


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What trains: an adapter, or all weights."""

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
    exclude_modules: str | tuple[str, ...] | None = option(
        None, "names of layers among these that are left out", group="LoRA"
    )
    layers_to_transform: tuple[int, ...] | None = option(
        None, "numbers of the layers of the model that are adapted, from 0; null: all", group="LoRA"
    )
    rank_pattern: Mapping[str, Any] | None = option(
        None, "other ranks, by names or regular expressions for the ends of paths, as in down_proj: 32", group="LoRA"
    )
    alpha_pattern: Mapping[str, Any] | None = option(None, "the same for lora_alpha", group="LoRA")
    bias: Literal["none", "all", "lora_only"] = option("none", "which biases are trained", group="LoRA")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead", group="LoRA")
    use_dora: bool = option(
        False, "DoRA: lengths of the weights' rows are learned apart from their directions", group="LoRA"
    )
    lora_dtype: Literal["float32", "auto"] = option(
        "float32",
        "dtype of the adapter, and of embed_tokens and lm_head where they train; auto: the compute dtype, which takes "
        "less memory and rounds their small updates away",
        group="LoRA",
    )
    init_lora_weights: bool | str = option(
        True,
        "first factors: true, false, gaussian, orthogonal; or out of the base weights: pissa, pissa_niter_N (fast, "
        "with N = 4 or so), olora, loftq (with bits 4)",
        group="LoRA",
    )
    loftq_iter: int = option(1, "rounds of quantising and decomposing of init_lora_weights loftq", group="LoRA")
    modules_to_save: tuple[str, ...] = option(
        (), "further modules to train whole, such as embed_tokens and lm_head", group="LoRA"
    )
    adapter: str | None = option(
        None,
        "train this saved adapter further instead of a new one: a run, its folder, or a Hub name; its options hold",
        group="LoRA",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """Steps, their rows, and how the weights move."""

    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs when positive", group="Optimization")
    num_train_epochs: float = option(1.0, "passes over the data when max_steps is not given", group="Optimization")
    per_device_train_batch_size: int = option(
        2, "rows of one forward and backward pass, unless memory_budget takes more", group="Optimization"
    )
    gradient_accumulation_steps: int = option(
        4, "passes of one optimizer step, unless memory_budget makes them fewer", group="Optimization"
    )
    memory_budget: Literal["auto"] | float | None = option(
        "auto",
        "GiB that the tensors of a run may take on the GPU, or auto: what is free at its start; rows of a step then "
        "go through in as few passes as fit by prediction, with the same result (LoRA dropout, NEFTune "
        "and the experts' auxiliary loss depend on the cut); "
        "null, and auto on a CPU: per_device_train_batch_size rows a pass",
        group="Optimization",
    )
    cuda_graphs: bool | None = option(
        None, "replay short passes as CUDA graphs; null: on a GPU, where the model allows it", group="Optimization"
    )
    graph_tokens: int = option(2048, "tokens of the longest pass that replays a graph", group="Optimization")
    learning_rate: float = option(2e-4, "highest learning rate", group="Optimization")
    lr_scheduler_type: Schedule = option(
        "linear", "how the learning rate falls after the warm-up, as in transformers", group="Optimization"
    )
    lr_scheduler_kwargs: Mapping[str, Any] | None = option(
        None,
        "values of the schedule, such as num_cycles, min_lr_rate, power or num_decay_steps; null: its own",
        group="Optimization",
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0", group="Optimization")
    warmup_ratio: float = option(0.0, "warmup_steps as a share of all steps", group="Optimization")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: factors B, biases and norms learn at this multiple of learning_rate", group="Optimization"
    )
    embedding_learning_rate: float | None = option(
        None, "learning rate of embed_tokens and lm_head where they are trained in full", group="Optimization"
    )
    optim: Optim = option(
        "adamw",
        "the optimizer; those with 8bit (state in 8 bits), paged (moved to host memory if the GPU needs room) "
        "or lion in the name are bitsandbytes' and need a GPU",
        group="Optimization",
    )
    weight_decay: float = option(0.0, "decoupled decay; biases and norms are exempt", group="Optimization")
    adam_beta1: float = option(0.9, "decay of the first moment of AdamW, and of Lion's update", group="Optimization")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment, and of Lion's", group="Optimization")
    adam_epsilon: float = option(1e-8, "added to AdamW's denominator", group="Optimization")
    max_grad_norm: float = option(1.0, "clip the norm of all gradients to this; 0: no clipping", group="Optimization")
    neftune_noise_alpha: float | None = option(
        None,
        "NEFTune: noise of alpha / sqrt(tokens x hidden size) on the embeddings of a document",
        group="Optimization",
    )
    seed: int = option(42, "fixes initial adapter weights, data order, dropout and noise", group="Optimization")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the result goes, and what is written on the way."""

    output_dir: str = option("output", "folder for the adapter, the checkpoints and the log", group="Run")
    overwrite_output_dir: bool = option(False, "delete the run that output_dir already holds", group="Run")
    resume_from_checkpoint: bool | str | None = option(
        None, "a checkpoint folder, or latest: the newest one in output_dir", group="Run"
    )
    logging_steps: int = option(10, "steps between two lines of the log", group="Run")
    save_steps: int = option(500, "steps between two checkpoints; 0: none", group="Run")
    save_total_limit: int | None = option(
        3, "how many checkpoints are kept, the newest, and the best besides; null: all", group="Run"
    )
    eval_steps: int | None = option(None, "steps between two evaluations; null: only at the end", group="Run")
    eval_on_start: bool = option(
        False, "evaluate before the first step too; it is shown, and never the best", group="Run"
    )
    per_device_eval_batch_size: int = option(8, "rows of one forward pass in evaluation", group="Run")
    early_stopping_patience: int | None = option(
        None, "end the run after so many evaluations without a lower loss; null: never early", group="Run"
    )
    early_stopping_threshold: float = option(
        0.0, "how much lower than the lowest yet a loss must be to count for early_stopping_patience", group="Run"
    )
    load_best_model_at_end: bool = option(
        False,
        "save as the result what had the lowest evaluation loss; a checkpoint is written at each new lowest",
        group="Run",
    )
    sample_prompts: str | tuple[str, ...] | None = option(
        None,
        "what to ask the model as it trains, greedily: texts, asked as the data asks, or a .txt file (one a line) or "
        ".jsonl file (records as in the data; answers are shown beside); see samples.jsonl and report.html",
        group="Run",
    )
    sample_steps: int | None = option(
        None, "steps between two samplings, beside those at start and end; null: with each evaluation", group="Run"
    )
    sample_max_new_tokens: int = option(64, "most tokens of a sample", group="Run")
    report_to: str | tuple[str, ...] | None = option(
        None, "tensorboard, wandb, or both: where the log goes too; null: nowhere", group="Run"
    )
    run_name: str | None = option(None, "name of the run in wandb; null: that of output_dir", group="Run")
    logging_dir: str | None = option(
        None, "folder for the files of report_to; null: in output_dir, the folders tensorboard and wandb", group="Run"
    )
    plot: bool = option(True, "draw loss.png at the end (needs matplotlib)", group="Run")
    report: bool = option(True, "write report.html, a page that needs no network, beside the log", group="Run")
    disable_tqdm: bool = option(False, "lines instead of a progress bar, as outside of a terminal", group="Run")
