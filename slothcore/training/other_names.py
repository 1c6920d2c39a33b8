"""What other libraries call an option, and which of their options have no counterpart here."""

# Name there (Unsloth, TRL, transformers, PEFT, axolotl, LLaMA-Factory) to name here, where they differ.
OTHER_NAMES = {
    "model_name": "model",
    "base_model": "model",
    "model_name_or_path": "model",
    "revision_of_model": "revision",
    "model_revision": "revision",
    "hub_token": "token",
    "hf_hub_token": "token",
    "load_in_4bit": "bits",
    "load_in_8bit": "bits",
    "quantization_bit": "bits",
    "fp16": "dtype",
    "bf16": "dtype",
    "bfloat16": "dtype",
    "float16": "dtype",
    "pure_bf16": "dtype",
    "torch_dtype": "dtype",
    "bnb_4bit_compute_dtype": "dtype",
    "cutoff_len": "max_seq_length",
    "max_length": "max_seq_length",
    "model_max_length": "max_seq_length",
    "sequence_len": "max_seq_length",
    "add_tokens": "new_tokens",
    "add_special_tokens": "new_tokens",
    "additional_special_tokens": "new_tokens",
    "special_tokens": "new_tokens",
    "tokens": "new_tokens",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "disable_gradient_checkpointing": "gradient_checkpointing",
    "use_unsloth_gc": "gradient_checkpointing",
    "activation_offloading": "gradient_checkpointing",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "dataset_path": "data",
    "data_path": "data",
    "train_data": "data",
    "train_dataset": "data",
    "train_file": "data",
    "pretraining_dataset": "data",
    "dataset_config": "data",
    "dataset_split": "data",
    "dataset_train_split": "data",
    "dataset_text_field": "text_field",
    "interleave_probs": "data_weights",
    "eval_dataset": "eval_data",
    "val_data": "eval_data",
    "test_datasets": "eval_data",
    "dataset_test_split": "eval_data",
    "val_set_size": "eval_fraction",
    "val_size": "eval_fraction",
    "train_on_inputs": "completion_only_loss",
    "assistant_only_loss": "completion_only_loss",
    "train_on_prompt": "completion_only_loss",
    "template": "chat_template",
    "chat_template_path": "chat_template",
    "chat_template_jinja": "chat_template",
    "excess_length_strategy": "overlength",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "full_finetune": "full_finetuning",
    "finetuning_type": "full_finetuning",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "lora_target_linear": "target_modules",
    "lora_target_modules": "target_modules",
    "lora_bias": "bias",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "peft_init_lora_weights": "init_lora_weights",
    "pissa_init": "init_lora_weights",
    "pissa_iter": "init_lora_weights",
    "loftq_config": "init_lora_weights",
    "additional_target": "modules_to_save",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "adapter_name_or_path": "adapter",
    "lora_model_dir": "adapter",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "auto_find_batch_size": "memory_budget",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "cosine_min_lr_ratio": "lr_scheduler_kwargs",
    "loraplus_lr_embedding": "embedding_learning_rate",
    "embedding_lr": "embedding_learning_rate",
    "optimizer": "optim",
    "max_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "random_state": "seed",
    "resume": "resume_from_checkpoint",
    "auto_resume_from_checkpoints": "resume_from_checkpoint",
    "saves_per_epoch": "save_steps",
    "evals_per_epoch": "eval_steps",
    "early_stopping_steps": "early_stopping_patience",
    "save_dir": "output_dir",
    "use_tensorboard": "report_to",
    "wandb_name": "run_name",
    "use_cpu": "device",
    "no_cuda": "device",
    "plot_loss": "plot",
}
# The same of the commands that use a result, such as generate, serve and export (vLLM, llama.cpp, Ollama, Unsloth).
OTHER_FLAGS = {
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "max_length": "max_new_tokens",
    "temp": "temperature",
    "do_sample": "temperature",
    "repeat_penalty": "repetition_penalty",
    "stop": "stop_strings",
    "system_prompt": "system",
    "output_file": "output",
    "input_file": "prompts_file",
    "file": "prompts_file",
    "lora": "adapter",
    "lora_modules": "adapter",
    "adapters": "adapter",
    "alias": "served_model_name",
    "max_model_len": "max_length",
    "max_seq_length": "max_length",
    "ctx_size": "max_length",
    "max_num_seqs": "max_rows",
    "parallel": "max_rows",
    "quantization": "dtype",
    "quantization_method": "dtype",
    "quantize": "dtype",
    "outtype": "dtype",
    "outfile": "output_dir",
    "save_directory": "output_dir",
    "save_method": "format",
    "repo_id": "push",
    "push_to_hub": "push",
}
# The same of the values of an option.
OTHER_VALUES = {
    "optim": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_32bit": "paged_adamw",
        "lion_32bit": "lion",
    },
    "gradient_checkpointing": {"unsloth": "offload"},
    "target_modules": {"all": "all-linear"},
}
# What those have and slothcore has not, because it needs no saying here or because there is nothing like it.
WITHOUT_COUNTERPART = frozenset(
    """
    adam_beta3 adam_epsilon2 attn_implementation bnb_4bit_quant_type bnb_4bit_use_double_quant cache_dir
    cut_cross_entropy data_seed dataset_dir dataset_exact_deduplication dataset_kwargs dataset_num_proc
    dataset_prepared_path dataset_processes ddp debug deepspeed default_system_message device_map disable_shuffling
    do_eval do_predict do_train double_quantization eager_attention embedding_lr_scale enable_liger_kernel eos_token
    eot_tokens eval_accumulation_steps eval_delay eval_max_new_tokens eval_packing eval_sample_packing eval_strategy
    eval_table_max_new_tokens eval_table_size evaluation_strategy exact_deduplication fan_in_fan_out fast_inference
    finetune_attention_modules finetune_language_layers finetune_mlp_modules finetune_vision_layers fix_tokenizer
    flash_attention flash_attn flex_attention freeze_trainable_layers freeze_trainable_modules fsdp full_determinism
    gc_steps gpu_memory_utilization gradient_checkpointing_kwargs greater_is_better group_by_length
    is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model
    label_smoothing_factor layers_pattern local_rank logging_first_step logging_strategy lora_fan_in_fan_out
    lora_mlp_kernel lora_o_kernel lora_on_cpu lora_qkv_kernel lora_task_type loss_type loss_watchdog_patience
    loss_watchdog_threshold low_cpu_mem_usage max_lora_rank max_samples metric_for_best_model model_init_kwargs
    model_type n_gpu_layers num_beams optim_args optim_target_modules orpo_alpha overwrite_cache packing_strategy
    pad_to_multiple_of pad_to_sequence_len pad_token padding_free peft pissa_convert plugins predict_with_generate
    preprocessing_batch_size preprocessing_num_workers push_dataset_to_hub push_to_hub quantization_method
    quantization_type remove_unused_columns resize_vocab rl s2_attention save_first_step save_only_model
    save_safetensors save_strategy scaling_softmax sdp_attention shuffle_dataset shuffle_merged_datasets stage
    streaming strict task_type tensor_parallel_size tf32 tool_format torchdistx_path train_sampling_strategy
    truncation_mode trust_remote_code type_of_model unfrozen_parameters use_adam_mini use_bnb_nested_quant use_cache
    use_dft_loss use_fast_tokenizer use_flash_attention_2 use_liger_kernel use_muon use_peft use_qalora use_ray
    use_reentrant_gc use_unsloth val_set_seed xformers_attention
    """.split()
)
# The same, by how such names begin.
KINDS_WITHOUT_COUNTERPART = (
    *("apollo_", "badam_", "comet_", "dataloader_", "ddp_", "deepspeed_", "dpo_", "export_", "flash_attn_", "fp8"),
    *("fsdp_", "galore_", "gptq", "gradio_", "hub_", "image_", "infer_", "kto_", "liger_", "lisa_", "mlflow_"),
    *("oft_", "peft_", "pose_", "ppo_", "pref_", "ref_model", "relora", "reward_model", "rl_", "sample_packing_"),
    *("simpo_", "swanlab_", "tokenizer", "torch_compile", "unsloth_", "use_apollo", "use_badam", "use_galore"),
    *("use_llama_pro", "use_swanlab", "video_", "vllm_", "wandb_"),
)
_OPPOSITE = "the opposite: `completion_only_loss: false` learns the prompts too"
_SHARE = "a share of the rows, below 1"
_STEPS = "the steps from one to the next"
_ALWAYS_SFT = "of preference data the good answers are learned"
_PUSH = "`slothcore export --push` does it, when the run is over"
# What to write where the name alone would mislead: the value is another one, or the name of an option is not enough.
REMARKS = {
    "load_in_4bit": "true: `bits: 4`, the default; false: `bits: 16`",
    "load_in_8bit": "there are no 8-bit weights: `bits: 4` or `bits: 16`",
    "quantization_bit": "`bits: 4`; a file without it means `bits: 16`",
    "bf16": "true: `dtype: bfloat16`; otherwise leave it out",
    "bfloat16": "true: `dtype: bfloat16`; otherwise leave it out",
    "pure_bf16": "true: `dtype: bfloat16`; otherwise leave it out",
    "fp16": "true: `dtype: float16`; otherwise leave it out",
    "float16": "true: `dtype: float16`; otherwise leave it out",
    "special_tokens": "what is to be added; begin, end and padding are the tokenizer's own",
    "use_gradient_checkpointing": '`True`: `true`; `"unsloth"`: `offload`',
    "use_unsloth_gc": "`true`: `offload`",
    "activation_offloading": "`true`: `offload`",
    "disable_gradient_checkpointing": "the opposite, and false is the default",
    "dataset": "a list of paths or Hub names; there is no `dataset_info.json`",
    "datasets": "a list of paths or Hub names alone; the layout is found by looking, or is `format`",
    "pretraining_dataset": "a list of paths or Hub names alone, or `OWNER/NAME:CONFIG/SPLIT`",
    "dataset_config": "`OWNER/NAME:CONFIG/SPLIT`",
    "dataset_split": "`OWNER/NAME:SPLIT`",
    "dataset_train_split": "`OWNER/NAME:SPLIT`",
    "dataset_test_split": "`OWNER/NAME:SPLIT`",
    "val_set_size": _SHARE,
    "val_size": _SHARE,
    "train_on_inputs": _OPPOSITE,
    "train_on_prompt": _OPPOSITE,
    "template": "by default the model's own, which is right for a chat model",
    "chat_template_jinja": "a .jinja file",
    "finetuning_type": "`lora`: leave it out; `full`: `full_finetuning: true`",
    "lora_target_linear": "true: `target_modules: all-linear`, the default",
    "loftq_config": "`init_lora_weights: loftq`, and `loftq_iter`",
    "pissa_init": "true: `init_lora_weights: pissa_niter_16`, or `pissa`",
    "pissa_iter": "16: `init_lora_weights: pissa_niter_16`",
    "lora_model_dir": "the folder of an adapter; axolotl's own `adapter: lora` or `qlora` is what `bits` says",
    "auto_find_batch_size": "`auto`, the default",
    "cosine_min_lr_ratio": "`lr_scheduler_type: cosine_with_min_lr`, and `{min_lr_rate: 0.1}`",
    "use_tensorboard": "`tensorboard`",
    "evals_per_epoch": _STEPS,
    "saves_per_epoch": _STEPS,
    "use_cpu": "true: `device: cpu`",
    "no_cuda": "true: `device: cpu`",
    "eval_strategy": "`eval_steps` alone says it",
    "evaluation_strategy": "`eval_steps` alone says it",
    "save_strategy": "`save_steps` alone says it",
    "logging_strategy": "`logging_steps` alone says it",
    "max_samples": "cut the file",
    "dataset_dir": "`data` names the files",
    "layers_pattern": "an argument of `slothcore.add_lora`",
    "cache_dir": "the variable `HF_HOME`",
    "stage": f"sft, or pt on texts; {_ALWAYS_SFT}",
    "rl": _ALWAYS_SFT,
    "default_system_message": "put it into the data",
    "use_peft": "an adapter is trained unless `full_finetuning` says otherwise",
    "finetune_attention_modules": "`target_modules` names the layers",
    "finetune_mlp_modules": "`target_modules` names the layers",
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "export_dir": "`slothcore export --output-dir` writes it, when the run is over",
    "wandb_project": "the variable `WANDB_PROJECT`",
    "wandb_entity": "the variable `WANDB_ENTITY`",
}
# What to say of a value that is refused, where others have such values.
VALUE_REMARKS = {
    "data": "give paths or Hub names alone; the layout is found by looking, or is format",
    "eval_data": "give paths or Hub names alone; the layout is found by looking, or is format",
    "warmup_steps": "a share of all steps is warmup_ratio",
}


def has_no_counterpart(name: str) -> bool:
    """Whether another library has this option, and slothcore nothing like it."""
    return name in WITHOUT_COUNTERPART or name.startswith(KINDS_WITHOUT_COUNTERPART)
