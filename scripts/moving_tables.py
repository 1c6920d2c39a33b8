"""The tables of docs/moving.md: what each library calls its options, and what slothcore calls them.

Listed here are the names of the others, in the order in which their users meet them, and a few words where a name alone
would mislead. What each is called here follows from the options and from `training/other_names.py`, which the messages
about unknown options go by too.
"""

from slothcore.training.config import TrainConfig, field_types
from slothcore.training.other_names import OTHER_NAMES, REMARKS, has_no_counterpart

# Names with the same meaning in all of them.
LOOP = (
    *("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay"),
    *("max_grad_norm", "optim", "seed", "logging_steps", "save_steps", "save_total_limit", "eval_steps"),
)
UNSLOTH = (
    *("model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "full_finetuning", "token"),
    *("rope_scaling", "fast_inference", "gpu_memory_utilization"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "loftq_config", "use_gradient_checkpointing", "random_state", "embedding_learning_rate"),
)
PEFT = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora", "init_lora_weights"),
    *("loftq_config", "modules_to_save", "task_type"),
    *("exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"),
)
QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type")
TRAINING_ARGUMENTS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", *LOOP),
    *("lr_scheduler_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "bf16", "fp16"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile", "use_liger_kernel"),
    *("auto_find_batch_size", "remove_unused_columns", "save_only_model"),
    *("eval_strategy", "save_strategy", "per_device_eval_batch_size", "load_best_model_at_end"),
    *("metric_for_best_model", "report_to", "run_name", "push_to_hub", "deepspeed", "fsdp", "dataloader_num_workers"),
)
SFT_CONFIG = (
    *("max_length", "packing", "dataset_text_field", "completion_only_loss", "assistant_only_loss"),
    *("chat_template_path", "eos_token", "dataset_num_proc", "activation_offloading"),
)
AXOLOTL = (
    *("base_model", "model_type", "tokenizer_type", "revision_of_model", "load_in_4bit", "load_in_8bit", "bf16"),
    *("fp16", "tf32", "trust_remote_code"),
    *("datasets", "pretraining_dataset", "test_datasets", "val_set_size", "chat_template", "chat_template_jinja"),
    *("eot_tokens", "special_tokens", "train_on_inputs", "dataset_prepared_path", "rl"),
    *("sequence_len", "excess_length_strategy", "sample_packing", "eval_sample_packing", "group_by_length"),
    *("pad_to_sequence_len", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear"),
    *("lora_modules_to_save", "peft_use_dora", "peft_use_rslora", "peft_init_lora_weights", "peft_layers_to_transform"),
    *("lora_model_dir", "tokens"),
    *("loraplus_lr_ratio", "loraplus_lr_embedding", "micro_batch_size", "gradient_accumulation_steps", "num_epochs"),
    *("max_steps", "optimizer", "lr_scheduler", "cosine_min_lr_ratio", "learning_rate", "warmup_steps"),
    *("warmup_ratio", "weight_decay"),
    *("max_grad_norm", "neftune_noise_alpha", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("eval_batch_size", "flash_attention", "torch_compile", "loss_watchdog_threshold"),
    *("evals_per_epoch", "eval_steps", "saves_per_epoch", "save_steps", "save_total_limit", "early_stopping_patience"),
    *("load_best_model_at_end", "output_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints", "seed"),
    *("wandb_project", "wandb_entity", "wandb_name", "hub_model_id", "deepspeed", "fsdp"),
)
LLAMA_FACTORY = (
    *("model_name_or_path", "adapter_name_or_path", "quantization_bit", "quantization_method", "rope_scaling"),
    *("flash_attn", "enable_liger_kernel", "use_unsloth_gc", "disable_gradient_checkpointing"),
    *("trust_remote_code", "stage", "do_train", "finetuning_type"),
    *("dataset", "eval_dataset", "val_size", "template", "cutoff_len", "packing", "neat_packing", "train_on_prompt"),
    *("mask_history", "interleave_probs", "max_samples", "overwrite_cache", "preprocessing_num_workers"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora"),
    *("pissa_init", "pissa_iter", "add_tokens", "loraplus_lr_ratio"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "bf16", "fp16", "pure_bf16", "neftune_noise_alpha", *LOOP),
    *("eval_strategy", "save_only_model", "ddp_timeout", "export_dir"),
    *("plot_loss", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "deepspeed", "fsdp"),
)
LIBRARIES = {
    "unsloth": UNSLOTH,
    "peft": (*PEFT, *QUANTIZATION),
    "trl": (*SFT_CONFIG, *TRAINING_ARGUMENTS),
    "axolotl": AXOLOTL,
    "llama_factory": LLAMA_FACTORY,
}

# What to write, or why there is nothing to write, wherever the name alone does not say it.
NOTES = {
    **REMARKS,
    "bnb_4bit_compute_dtype": "by default what the GPU has",
    "bnb_4bit_quant_type": "nf4, always, with double quantisation",
    "optim": "`adamw_torch`, `adamw_bnb_8bit`, `paged_adamw_32bit` and the like are understood",
    "optimizer": "`adamw_torch`, `adamw_bnb_8bit`, `paged_adamw_32bit` and the like are understood",
    "assistant_only_loss": "the default where there is a conversation",
    "neat_packing": "packing always keeps documents apart",
    "sample_packing": "packing always keeps documents apart",
    "chat_template": "a built-in name or a .jinja file; by default the model's own",
    "auto_resume_from_checkpoints": "`latest`",
    "metric_for_best_model": "the evaluation loss, always",
    "attn_implementation": "slothcore has kernels of its own",
    "flash_attention": "slothcore has kernels of its own",
    "flash_attn": "slothcore has kernels of its own",
    "use_liger_kernel": "slothcore has kernels of its own",
    "enable_liger_kernel": "slothcore has kernels of its own",
    "torch_compile": "slothcore has kernels of its own, and CUDA graphs",
    "tf32": "nothing is rounded that you did not ask for",
    "trust_remote_code": "no code of a model is run",
    "pad_to_sequence_len": "there is no padding",
    "dataset_num_proc": "all cores, always",
    "preprocessing_num_workers": "all cores, always",
    "dataloader_num_workers": "rows are prepared ahead in any case",
    "dataset_prepared_path": "kept in `SLOTHCORE_HOME` by itself",
    "overwrite_cache": "the cache is never out of date",
    "task_type": "causal language models",
    "fast_inference": "there is one way to generate",
    "gpu_memory_utilization": "there is one way to generate",
    "model_type": "`config.json` says it",
    "tokenizer_type": "`tokenizer.json` says it",
    "eos_token": "the end of a turn is found in the template, and learned",
    "eot_tokens": "the end of a turn is found in the template, and learned",
    "eval_sample_packing": "`packing` is about evaluation, too",
    "group_by_length": "there is no padding",
    "gradient_checkpointing_kwargs": "there is one way to recompute",
    "loss_watchdog_threshold": "a loss that is no number ends the run",
    "remove_unused_columns": "columns that are not needed are left alone",
    "save_only_model": "a checkpoint can always be resumed",
    "quantization_method": "NF4, as of bitsandbytes",
    "do_train": "`slothcore train` does",
    "ddp_timeout": "one GPU",
    "deepspeed": "one GPU",
    "fsdp": "one GPU",
}

# What holds where a file says nothing: of transformers and TRL, of axolotl, of LLaMA-Factory. Here: TrainConfig's.
DEFAULTS = {
    ("full_finetuning",): ("all weights; `peft_config` adds LoRA", "all weights without `adapter`", "LoRA"),
    ("bits",): ("as loaded", "16", "16"),
    ("r", "lora_alpha"): ("8, 8", "to be given", "8, twice the rank"),
    ("max_seq_length",): ("1024", "512", "2048"),
    ("overlength",): ("truncate", "drop", "truncate"),
    ("per_device_train_batch_size", "gradient_accumulation_steps"): ("8, 1", "1, 1", "8, 1"),
    ("num_train_epochs",): ("3", "1", "3"),
    ("learning_rate",): ("2e-5", "to be given", "5e-5"),
    ("lr_scheduler_type",): ("linear", "cosine", "linear"),
    ("completion_only_loss",): ("prompts of conversations are learned too", "answers only", "answers only"),
}
# Of values that do not say by themselves what they stand for.
HERE = {"full_finetuning": "LoRA", "max_seq_length": "2048, or the model's", "completion_only_loss": "answers only"}


def defaults_table() -> str:
    """What each library does where a file says nothing of an option."""
    config = TrainConfig()
    rows = []
    for names, others in DEFAULTS.items():
        options = ", ".join(f"`{name}`" for name in names)
        here = ", ".join(HERE.get(name) or str(getattr(config, name)).removesuffix(".0") for name in names)
        rows.append((options, here, *others))
    head = [("Option here", "Here", "TRL, PEFT", "axolotl", "LLaMA-Factory"), ("---",) * 5]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *rows])


def name_here(name: str) -> str | None:
    """What slothcore calls an option of another library; None: it has none such.

    Raises: KeyError for a name that nothing is known of.
    """
    if name in field_types():
        return name
    return None if has_no_counterpart(name) and name not in OTHER_NAMES else OTHER_NAMES[name]


def moving_table(library: str) -> str:
    """Name there, name here, and what else has to be said; names that are the same in one row."""
    same = [name for name in LIBRARIES[library] if name_here(name) == name and name not in NOTES]
    rows = []
    for name in dict.fromkeys(LIBRARIES[library]):
        if name not in same:
            here = name_here(name)
            rows.append(f"| `{name}` | {f'`{here}`' if here else '-'} | {NOTES.get(name, '')} |")
    listed = ", ".join(f"`{name}`" for name in dict.fromkeys(same))
    return "\n".join(["| There | Here | |", "| --- | --- | --- |", *rows, "", f"The same in both: {listed}."])
