"""Names of other libraries: files as their users have them are answered whole, and rightly."""

import copy
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest

from slothcore.cli import main
from slothcore.training.config import TrainConfig, field_types
from slothcore.training.options import check_names
from slothcore.training.other_names import (
    KINDS_WITHOUT_COUNTERPART,
    OTHER_FLAGS,
    OTHER_NAMES,
    REMARKS,
    VALUE_REMARKS,
    has_no_counterpart,
)

# Every option of twenty published examples of axolotl and LLaMA-Factory, and of TRL's script, that slothcore has not.
AXOLOTL = """
    base_model model_type tokenizer_type is_llama_derived_model is_mistral_derived_model load_in_8bit load_in_4bit
    strict datasets dataset_prepared_path val_set_size pretraining_dataset test_datasets lora_model_dir
    exact_deduplication sequence_len sample_packing eval_sample_packing pad_to_sequence_len lora_r lora_target_linear
    lora_fan_in_fan_out lora_target_modules lora_modules_to_save lora_mlp_kernel lora_qkv_kernel lora_o_kernel
    wandb_project wandb_entity wandb_watch wandb_name wandb_log_model micro_batch_size num_epochs optimizer
    lr_scheduler train_on_inputs group_by_length bf16 fp16 tf32 bfloat16 gradient_checkpointing_kwargs local_rank
    xformers_attention flash_attention s2_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv
    flash_attn_fuse_mlp torchdistx_path loss_watchdog_threshold loss_watchdog_patience evals_per_epoch saves_per_epoch
    eval_table_size eval_max_new_tokens eval_table_max_new_tokens debug deepspeed fsdp fsdp_config special_tokens
    eot_tokens plugins unfrozen_parameters ddp_find_unused_parameters push_dataset_to_hub gptq_groupsize rl peft
    lisa_n_layers lisa_step_interval
""".split()
LLAMA_FACTORY = """
    model_name_or_path trust_remote_code stage do_train finetuning_type lora_rank lora_target pref_beta pref_loss
    dataset template cutoff_len max_samples overwrite_cache preprocessing_num_workers plot_loss bf16 fp16 pure_bf16
    ddp_timeout val_size eval_strategy evaluation_strategy quantization_bit quantization_method double_quantization
    save_only_model deepspeed use_galore galore_layerwise galore_target galore_rank galore_scale pissa_init pissa_iter
    pissa_convert adapter_name_or_path export_dir export_size export_device infer_backend
""".split()
TRL = """
    model_name_or_path dataset_name dataset_config dataset_train_split eos_token eval_strategy use_peft lora_r
    attn_implementation torch_dtype model_revision lora_target_modules use_bnb_nested_quant packing_strategy
    max_length remove_unused_columns dataloader_drop_last optim_target_modules eval_delay logging_first_step
    optim_args
""".split()


@pytest.mark.parametrize("names", [AXOLOTL, LLAMA_FACTORY, TRL], ids=["axolotl", "llama_factory", "trl"])
def test_a_file_of_another_library_is_answered_at_once(names: list[str]) -> None:
    """All names in one message, of none of which is guessed what is meant."""
    with pytest.raises(ValueError, match=r"^unknown options in lora\.yml: here ") as caught:
        check_names(["learning_rate", *names], field_types(), source="lora.yml")
    said = str(caught.value)
    assert "nothing is known of" not in said
    renamed, absent = said.removeprefix("unknown options in lora.yml: here ").split("; slothcore has nothing like ")
    for name in names:
        if name in OTHER_NAMES:
            assert re.search(rf"(^|, ){name} is {OTHER_NAMES[name]}\b", renamed), name
        else:
            assert re.search(rf"(^|, ){name}(,| \(|: leave that out$)", absent), name
    assert "learning_rate" not in said.replace("embedding_learning_rate", "")


def test_a_misspelled_name_among_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("lr: 1\nmax_step: 3\nshampoo: 1\ntf32: true\nstage: dpo\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"slothcore: error: unknown options in {tmp_path}/run.yaml: here lr is learning_rate; nothing is known of "
        "max_step (did you mean max_steps?), shampoo: --help lists the options; slothcore has nothing like tf32, "
        "stage (sft, or pt on texts; of preference data the good answers are learned): leave that out\n"
    )
    assert main(["train", "--lr", "1", "--epochs=3"]) == 2
    assert "unknown options in the flags: here lr is learning_rate, epochs is num_" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        # Each is accepted with the value that it has there, and would train something else.
        ("train_on_inputs", "(the opposite: completion_only_loss: false learns the prompts too)"),
        ("train_on_prompt", "(the opposite: completion_only_loss: false learns the prompts too)"),
        ("saves_per_epoch", "(the steps from one to the next)"),
        ("evals_per_epoch", "(the steps from one to the next)"),
        ("pissa_init", "(true: init_lora_weights: pissa_niter_16, or pissa)"),
        ("activation_offloading", "(true: offload)"),
        ("stage", "(sft, or pt on texts; of preference data the good answers are learned)"),
        ("max_samples", "leave it out (cut the file)"),
    ],
)
def test_where_the_value_is_another_one_the_message_says_so(name: str, remark: str) -> None:
    with pytest.raises(ValueError, match=re.escape(remark) + "$"):
        TrainConfig.from_dict({name: True})


def test_remarks_are_about_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", "x", "--format", "adapter", "--push-to-hub", "a/b"]) == 2
    assert capsys.readouterr().err.endswith("unknown option 'push_to_hub' in the flags; did you mean 'push'?\n")


def test_python_answers_as_files_do() -> None:
    """The arguments of a notebook, given to TrainConfig."""
    message = (
        "unknown options in TrainConfig: here fp16 is dtype (true: dtype: float16; otherwise leave it out), "
        "dataset_text_field is text_field; nothing is known of shampoo: --help lists the options"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainConfig(max_steps=60, fp16=True, dataset_text_field="text", shampoo=1)  # type: ignore[call-arg]
    # What an editor shows as one types.
    assert list(inspect.signature(TrainConfig).parameters) == list(field_types())
    config = TrainConfig(max_steps=60)
    assert replace(config, seed=1).max_steps == copy.copy(config).max_steps == 60


def test_values_of_other_libraries() -> None:
    assert TrainConfig(gradient_checkpointing="unsloth").gradient_checkpointing == "offload"
    assert TrainConfig(target_modules="all").target_modules == "all-linear"
    with pytest.raises(ValueError, match=r"warmup_steps must be a whole number, got 0.1; a share of all steps is warm"):
        TrainConfig(warmup_steps=0.1)
    with pytest.raises(ValueError, match=r"got \[\{'path': 'a'\}\]; give paths or Hub names alone"):
        TrainConfig(data=[{"path": "a"}])


def test_the_tables_of_names_agree() -> None:
    assert not [name for name in field_types() if has_no_counterpart(name)]
    for name in REMARKS:
        assert name in OTHER_NAMES or has_no_counterpart(name), name
    assert VALUE_REMARKS.keys() <= field_types().keys()
    # A kind that no name needs any more would swallow a misspelled option.
    flags = set(field_types()) | set(OTHER_FLAGS.values())
    assert not [name for name in flags if name.startswith(KINDS_WITHOUT_COUNTERPART)]
