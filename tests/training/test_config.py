"""Options from Python, YAML and flags; an unknown name or wrong value is one sentence."""

from dataclasses import fields

import pytest

from slothcore.training.config import TrainConfig, field_types
from slothcore.training.options import describe
from slothcore.training.other_names import OTHER_NAMES, WITHOUT_COUNTERPART


def test_flags_stand_on_top_of_the_file(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 5\nlearning_rate: 1e-4\ntarget_modules: [q_proj, v_proj]\npacking: true\n")
    config = TrainConfig.from_sources(path, {"max_steps": "7", "bits": "16"})
    assert (config.max_steps, config.learning_rate, config.bits) == (7, 1e-4, 16)
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.packing is True


def test_the_written_configuration_repeats_the_run(tmp_path) -> None:
    config = TrainConfig(
        model="a/b",
        data=("x.json", "y.json"),
        lora_dropout=0.1,
        modules_to_save=("lm_head",),
        exclude_modules="o_proj,0.mlp.up_proj",
        layers_to_transform=[0, 2],
        rank_pattern={"down_proj": 32},
        alpha_pattern={r"1\.self_attn\.q_proj": 0.5},
        adam_epsilon=1e-9,
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
        local_files_only=True,
        resume_from_checkpoint="latest",
        overwrite_output_dir=True,
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = TrainConfig.from_yaml(path)
    for item in fields(TrainConfig):
        if item.name in ("resume_from_checkpoint", "overwrite_output_dir"):
            assert getattr(again, item.name) == item.default
        else:
            assert getattr(again, item.name) == getattr(config, item.name)


def test_the_file_of_a_run_can_be_read_in_any_script(tmp_path) -> None:
    config = TrainConfig(data="データ/ü 😀.jsonl", run_name="a\u2028\ufeff\x85\udcfcb\xa0")
    assert "\ndata: データ/ü 😀.jsonl\n" in config.to_yaml()
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert TrainConfig.from_yaml(tmp_path / "run.yaml") == config


@pytest.mark.parametrize("text", ["yarn", '{"rope_type": "yarn", "factor": 4}', "{rope_type: yarn, factor: 4}", "null"])
def test_rope_scaling_is_a_name_or_a_mapping(tmp_path, text) -> None:
    expected = {"yarn": "yarn", "null": None}.get(text, {"rope_type": "yarn", "factor": 4})
    (tmp_path / "run.yaml").write_text(f"rope_scaling: {text}\n")
    assert TrainConfig.from_yaml(tmp_path / "run.yaml").rope_scaling == expected
    assert TrainConfig.from_sources(None, {"rope_scaling": text}).rope_scaling == expected


def test_a_token_is_used_and_never_written_or_shown(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("token: hf_secret\n")
    config = TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert config.token == "hf_secret"
    for text in (config.to_yaml(), str(config.to_dict()), repr(config)):
        assert "secret" not in text
    assert TrainConfig.from_dict(config.to_dict()).token is None


def test_every_option_explains_itself() -> None:
    for item in fields(TrainConfig):
        assert item.metadata["help"]
        assert item.metadata["group"]
        assert describe(field_types()[item.name])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown option 'learning_rat' in the configuration; did you mean 'learning_rate'"),
        ({"lora_r": 8}, "unknown option 'lora_r'.*did you mean 'r'"),
        ({"load_in_4bit": True}, "unknown option 'load_in_4bit'.*did you mean 'bits'"),
        ({"lr": 1}, "unknown option 'lr'.*did you mean 'learning_rate'"),
        ({"torch_dtype": "auto"}, "unknown option 'torch_dtype'.*did you mean 'dtype'"),
        ({"train_data": "a"}, "unknown option 'train_data'.*did you mean 'data'"),
        ({"gradient_clipping": 1.0}, "unknown option 'gradient_clipping'.*did you mean 'max_grad_norm'"),
        ({"save_strategy": "best"}, "unknown option 'save_strategy' .*; slothcore has nothing like it: leave it out"),
        ({"shampoo": 1}, "'shampoo' .*; --help lists the options$"),
        ({"report_to": "mlflow"}, "report_to must be of tensorboard, wandb, got 'mlflow'; correct the name, or leave"),
        ({"early_stopping_patience": 2}, "early_stopping_patience is set without eval_steps, so .*; set eval_steps"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end is set without eval_steps, so .*; set eval_steps"),
        ({"early_stopping_threshold": 0.1}, "threshold is set without early_stopping_patience, and has no effect; set"),
        ({"early_stopping_threshold": -1}, "early_stopping_threshold must not be negative, got -1.0"),
        ({"early_stopping_patience": 0, "eval_steps": 1}, "early_stopping_patience must be at least 1, got 0"),
        ({"sample_steps": 5}, "sample_steps is set without sample_prompts, and has no effect; set sample_prompts too"),
        ({"sample_prompts": []}, "sample_prompts must not be empty"),
        ({"data": ""}, "data must not be empty"),
        ({"data": []}, "data must not be empty"),
        ({"output_dir": ""}, "output_dir must not be empty"),
        ({"token": ""}, "token must not be empty"),
        ({"revision": ""}, "revision must not be empty"),
        ({"rope_scaling": {}}, "rope_scaling must not be empty"),
        (
            {"rope_scaling": "longer"},
            "rope_scaling must be linear | dynamic | yarn | llama3, a mapping or null, got 'longer'",
        ),
        (
            {"rope_scaling": "{oops"},
            "rope_scaling must be linear | dynamic | yarn | llama3, a mapping or null, got '{oops'",
        ),
        (
            {"rope_scaling": {4: 1}},
            "rope_scaling must be linear | dynamic | yarn | llama3, a mapping or null, got {4: 1}",
        ),
        ({"bits": 3}, "bits must be 4 | 16 | 32, got 3"),
        ({"bits": True}, "bits must be"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": True}, "r must be a whole number, got True"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank of LoRA must be a whole number of at least 1, got q_proj = 1.5"),
        ({"alpha_pattern": {"q_proj": 0}}, "lora_alpha must be a number greater than 0, got q_proj = 0"),
        ({"rank_pattern": {"(q": 2}}, r"'\(q' is not a regular expression"),
        ({"layers_to_transform": ["first"]}, "layers_to_transform must be a list of numbers or null"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": -1}, "learning_rate must be greater than 0, got -1"),
        ({"weight_decay": "inf"}, "weight_decay must be finite, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), got 1.0"),
        ({"gradient_checkpointing": "perhaps"}, "gradient_checkpointing must be true | false | mlp | offload, got 'pe"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be true | false | mlp | offload, got 1"),
        ({"cuda_graphs": "perhaps"}, "cuda_graphs must be true or false or null, got 'perhaps'"),
        ({"graph_tokens": 0}, "graph_tokens must be at least 1, got 0"),
        ({"packing": "perhaps"}, "packing must be true or false, got 'perhaps'"),
        ({"optim": "adamax"}, "optim must be adamw | adamw_8bit | paged_adamw | paged_adamw_8bit | lion | lion_8bit"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio must be greater than 0, got 0.0"),
        ({"embedding_learning_rate": "nan"}, "embedding_learning_rate must be finite, got nan"),
        ({"neftune_noise_alpha": -5}, "neftune_noise_alpha must be greater than 0, got -5.0"),
        (
            {"loraplus_lr_ratio": 4, "full_finetuning": True, "bits": 16},
            "loraplus_lr_ratio is about LoRA factors, and full_finetuning has none; drop one",
        ),
        ({"target_modules": [1]}, r"target_modules must be text or a list of names, got \[1\]"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_steps .3. and warmup_ratio .0.1. are both set"),
        ({"full_finetuning": True}, "full_finetuning trains dense weights, and bits is 4"),
        ({"eval_data": "a", "eval_fraction": 0.1}, "eval_data and eval_fraction are both set"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be error | skip, got 'ignore'"),
        ({"chat_template": ""}, "chat_template must not be empty"),
        ({"prompt_template": "{a}"}, "prompt_template is set without completion_template, and nothing would be learn"),
        ({"data_weights": 1}, "data_weights must be a list of numbers or null, got 1"),
        ({"data_weights": [1, "many"]}, r"data_weights must be a list of numbers or null, got \[1, 'many'\]"),
        ({"data_weights": [1, True]}, r"data_weights must be a list of numbers or null, got \[1, True\]"),
        ({"data": ["a", "b"], "data_weights": [1, 0]}, "each of data_weights must be greater than 0, got 0.0"),
        ({"data": ["a", "b"], "data_weights": [1]}, "data_weights and data must be equally many, got 1 and 2"),
    ],
)
def test_a_wrong_option_is_one_sentence(values, message) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as caught:
        TrainConfig.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object/apply:os.getcwd []\n"])
def test_a_file_that_is_no_mapping_of_plain_values_is_refused(tmp_path, text) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        TrainConfig.from_yaml(path)


def test_a_key_that_stands_twice_is_refused(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nbits: 4\nlearning_rate: 2e-4\n")
    with pytest.raises(ValueError, match="learning_rate stands twice, again in line 3"):
        TrainConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("all-linear", "all-linear"),
        (r".*layers\.\d{1,2}\..*q_proj", r".*layers\.\d{1,2}\..*q_proj"),
    ],
)
def test_commas_part_names_and_leave_expressions_whole(text, expected) -> None:
    assert TrainConfig(target_modules=text).target_modules == expected
    assert TrainConfig(modules_to_save=["lm_head,embed_tokens"]).modules_to_save == ("lm_head", "embed_tokens")


@pytest.mark.parametrize(
    ("text", "value"),
    [("mlp", "mlp"), ("offload", "offload"), ("true", True), ("on", True), ("false", False), ("no", False)],
)
def test_gradient_checkpointing_is_a_kind_or_yes_or_no(tmp_path, text, value) -> None:
    (tmp_path / "run.yaml").write_text(f"gradient_checkpointing: {text}\n")
    for config in (
        TrainConfig.from_yaml(tmp_path / "run.yaml"),
        TrainConfig.from_sources(None, {"gradient_checkpointing": text}),
        TrainConfig(gradient_checkpointing=value),
    ):
        assert config.gradient_checkpointing is value or config.gradient_checkpointing == value == text
        (tmp_path / "again.yaml").write_text(config.to_yaml())
        assert TrainConfig.from_yaml(tmp_path / "again.yaml").gradient_checkpointing == value
    assert TrainConfig().gradient_checkpointing is False


def test_every_other_name_leads_to_an_option() -> None:
    assert set(OTHER_NAMES.values()) <= field_types().keys()
    assert not OTHER_NAMES.keys() & field_types().keys()
    assert not WITHOUT_COUNTERPART & (OTHER_NAMES.keys() | field_types().keys())


def test_lists_of_numbers(tmp_path) -> None:
    config = TrainConfig(data=["a", "b"], data_weights=[1, "2.5"])
    assert config.data_weights == (1.0, 2.5)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "run.yaml") == config
    assert TrainConfig(data="a", data_weights=[3]).data_weights == (3.0,)


def test_none_and_true_in_words() -> None:
    config = TrainConfig(
        max_seq_length="none", eval_steps="5", resume_from_checkpoint="true", completion_only_loss="no"
    )
    assert (config.max_seq_length, config.eval_steps) == (None, 5)
    assert (config.resume_from_checkpoint, config.completion_only_loss) == ("latest", False)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"use_rslora": True},
        {"lora_dropout": 0.1},
        {"modules_to_save": ("lm_head",)},
        {"exclude_modules": ("o_proj",)},
        {"layers_to_transform": (0,)},
        {"rank_pattern": {"o_proj": 2}},
        {"alpha_pattern": {"o_proj": 2}},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_about_an_adapter_is_refused_where_all_weights_train(option: dict) -> None:
    message = f"{next(iter(option))} is about a LoRA adapter, and full_finetuning trains all weights; drop one"
    with pytest.raises(ValueError, match=message):
        TrainConfig(full_finetuning=True, bits=16, **option)


def test_folders_may_begin_at_home(tmp_path, monkeypatch) -> None:
    """A path from Python, or from a file, has seen no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("output_dir", "logging_dir", "resume_from_checkpoint", "chat_template", "sample_prompts")
    config = TrainConfig(**dict.fromkeys(names, "~/a"), sample_steps=1)
    assert [getattr(config, name) for name in names] == [str(tmp_path / "a")] * 5
    assert TrainConfig(output_dir="a/~b").output_dir == "a/~b"
