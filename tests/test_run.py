"""Every option of a run reaches what it is meant for: one that got lost on the way would train another model."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slothcore import run as run_module
from slothcore.loading import load
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from slothcore.run import train_from_config
from slothcore.training.config import TrainConfig
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import write_model, write_records

# None of these is the default.
OPTIONS = {
    "bits": 16,
    "dtype": "bfloat16",
    "device": "cpu",
    "max_seq_length": 90,
    "gradient_checkpointing": True,
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.25,
    "target_modules": ("k_proj", "up_proj"),
    "bias": "all",
    "use_rslora": True,
    "lora_dtype": "auto",
    "modules_to_save": ("lm_head",),
    "learning_rate": 3e-3,
    "weight_decay": 0.3,
    "adam_beta1": 0.7,
    "adam_beta2": 0.8,
    "adam_epsilon": 1e-5,
    "warmup_ratio": 0.5,
    "lr_scheduler_type": "constant_with_warmup",
    "max_steps": 8,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "seed": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    write_model(folder / "model", attention_bias=True)
    write_records(folder / "data.jsonl", 9)
    return folder


class Stopped(Exception):
    """Raised where training would begin."""


@pytest.fixture
def trainer_of(folder, monkeypatch):
    """The trainer that a configuration comes to, before its first step."""

    def prepare(**options) -> SFTTrainer:
        made = []

        def stop(self: SFTTrainer) -> None:
            made.append(self)
            raise Stopped

        monkeypatch.setattr(SFTTrainer, "train", stop)
        places = {"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "output_dir": str(folder / "run")}
        with pytest.raises(Stopped):
            train_from_config(TrainConfig(**{**places, **options}))
        return made[0]

    return prepare


def test_no_option_is_the_default() -> None:
    defaults = {item.name: item.default for item in fields(TrainConfig)}
    assert [name for name, value in OPTIONS.items() if defaults[name] == value] == []


def test_options_reach_the_model_and_its_adapter(trainer_of) -> None:
    model = trainer_of(**OPTIONS).model
    assert (model.bits, model.dtype, model.device.type, model.max_seq_length) == (16, torch.bfloat16, "cpu", 90)
    assert model.gradient_checkpointing
    adapter = model.lora_config
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save"):
        assert getattr(adapter, name) == OPTIONS[name], name
    assert set(adapter.target_modules) == set(OPTIONS["target_modules"])
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    trained = {name.rpartition("layers.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"0.self_attn.k_proj.lora_A", "1.mlp.up_proj.lora_B", "0.self_attn.q_proj.bias", "lm_head.weight"} <= trained
    assert not {name for name in trained if "q_proj.lora" in name or "down_proj" in name}


def test_options_reach_the_optimizer_and_the_schedule(trainer_of) -> None:
    trainer = trainer_of(**OPTIONS)
    for group in trainer.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.7, 0.8), 1e-5)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert [len(trainer.schedule.plan(step).rows) for step in range(2)] == [6, 3]
    assert (trainer.total_steps, trainer.warmup_steps) == (8, 4)
    factors = [trainer._factor(step) for step in range(8)]
    assert factors == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"bits": 32}, (32, torch.float32)), ({"bits": 4}, (4, torch.float32)), ({"bits": 16}, (16, torch.bfloat16))],
)
def test_the_adapter_is_float32_unless_asked_otherwise(trainer_of, options, expected) -> None:
    model = trainer_of(device="cpu", **options).model
    assert (model.bits, model.dtype) == expected
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_the_seed_decides_the_first_factors(trainer_of) -> None:
    def first_factor(seed: int) -> torch.Tensor:
        return trainer_of(device="cpu", bits=32, seed=seed).model.get_parameter(
            "model.layers.0.self_attn.q_proj.lora_A"
        )

    assert torch.equal(first_factor(1), first_factor(1))
    assert not torch.equal(first_factor(1), first_factor(2))


def test_all_weights_train_when_asked(trainer_of) -> None:
    model = trainer_of(device="cpu", bits=32, full_finetuning=True).model
    assert model.lora_config is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_loaded_and_how_reaches_the_loader(trainer_of, monkeypatch) -> None:
    asked = {}

    def load(name, **options):
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(run_module, "load", load)
    given = {"revision": "v2", "token": "hf_secret", "local_files_only": True, "rope_scaling": {"factor": 2.0}}
    with pytest.raises(ValueError, match="enough"):
        trainer_of(**given, disable_tqdm=True)
    assert {name: asked[name] for name in given} == given
    assert asked["progress"] is False


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    model, _ = load(folder / "model", bits=32, device="cpu")
    model = add_lora(model, r=3, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


def test_an_adapter_as_the_model_is_trained_further(trainer_of, adapter, capsys) -> None:
    model = trainer_of(model=str(adapter), bits=32, device="cpu", target_modules="q_proj", r=3).model
    assert f"training the adapter of {adapter} further: r 3, lora_alpha 16" in capsys.readouterr().out
    assert (model.lora_config.r, model.lora_config.lora_dropout) == (3, 0.5)
    saved = load_file(adapter / "adapter_model.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name.removeprefix("base_model.model.").removesuffix(".weight") for name in saved}
    factor = "model.layers.1.self_attn.q_proj.lora_B"
    assert torch.equal(model.get_parameter(factor), saved[f"base_model.model.{factor}.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "whose r is 3, and r is set to 8; drop the option"),
        ({"lora_alpha": 32}, "whose lora_alpha is 16, and lora_alpha is set to 32"),
        ({"lora_dropout": 0.1}, "whose lora_dropout is 0.5, and lora_dropout is set to 0.1"),
        ({"target_modules": ("k_proj",)}, r"whose target_modules is \('q_proj',\), and target_modules is set to"),
        ({"bias": "all"}, "whose bias is 'none', and bias is set to 'all'"),
        ({"modules_to_save": ("lm_head",)}, "modules_to_save is set to"),
        ({"lora_dtype": "auto", "dtype": "bfloat16", "bits": 16}, "whose lora_dtype is 'float32'"),
        ({"full_finetuning": True}, "full_finetuning is set, but the model has a LoRA adapter"),
    ],
)
def test_an_adapter_as_the_model_is_not_made_into_another(trainer_of, adapter, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(**{"model": str(adapter), "bits": 32, "device": "cpu", **options})
