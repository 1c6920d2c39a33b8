"""Learning rates and decay of every parameter, against PEFT's groups for LoRA+, and in a run to the last bit."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from slothcore.lora.adapter_io import adapter_state
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from slothcore.training.config import TrainConfig
from slothcore.training.optimizer import create_optimizer, trainable_parameters
from slothcore.training.parameter_groups import parameter_groups
from slothcore.training.schedule import learning_rate_factor
from tests.lora.reference import load_pair, peft_parameters, write_tiny_llama
from tests.training.tiny import CONFIG, random_rows, tiny_model, train

RATE, RATIO, EMBEDDING_RATE = 3e-4, 7.0, 1e-5

ADAPTERS = {
    "factors": {},
    "biases": {"bias": "all"},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "dora": {"use_dora": True},
    "rslora of some, with their biases": {
        "bias": "lora_only",
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
    },
}


def rates(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    """Learning rate and weight decay of each parameter, by its identity."""
    return {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loraplus_has_the_groups_of_peft(tmp_path: Path, adapter: str) -> None:
    options = {"r": 4, "target_modules": "all-linear", **ADAPTERS[adapter]}
    ours, reference = load_pair(write_tiny_llama(tmp_path / "model", attention_bias=True))
    add_lora(ours, **options)
    config = TrainConfig(learning_rate=RATE, loraplus_lr_ratio=RATIO, weight_decay=0.1)
    actual = rates(create_optimizer(ours, config))

    peft_model = get_peft_model(reference, PeftLoraConfig(**options, task_type="CAUSAL_LM"))
    expected = rates(
        create_loraplus_optimizer(
            peft_model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1
        )
    )
    mine = adapter_state(ours)
    theirs = {name.replace("vector.weight", "vector"): p for name, p in peft_parameters(peft_model).items()}
    assert mine.keys() == theirs.keys()
    assert len(actual) == len(mine), "every parameter in one group"
    for name, parameter in mine.items():
        rate, decay = expected[id(theirs[name])]
        assert actual[id(parameter)] == (rate, 0.0 if "magnitude" in name else decay), name
    assert len(set(actual.values())) == (2 if adapter in ("factors", "embedding and head") else 3)


def test_embedding_and_head_have_their_own_rate(capsys) -> None:
    model = add_lora(from_config(CONFIG, device="cpu"), r=4, modules_to_save=("embed_tokens", "lm_head"))
    config = TrainConfig(
        learning_rate=RATE, loraplus_lr_ratio=RATIO, embedding_learning_rate=EMBEDDING_RATE, weight_decay=0.1
    )
    found = rates(create_optimizer(model, config))
    for name, parameter in trainable_parameters(model).items():
        rate = RATE
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rate = EMBEDDING_RATE
        elif name.endswith("lora_B"):
            rate = RATE * RATIO
        assert found[id(parameter)] == (rate, 0.1), name
    assert capsys.readouterr().out == (
        "learning rates: 0.0003, 0.0021 for factors B and vectors, 1e-05 for embed_tokens and lm_head; "
        "one schedule for all\n"
    )


def test_a_tied_table_is_one_parameter_of_all_weights() -> None:
    model = from_config({**CONFIG, "tie_word_embeddings": True}, device="cpu")
    config = TrainConfig(full_finetuning=True, bits=32, embedding_learning_rate=EMBEDDING_RATE, learning_rate=RATE)
    groups = parameter_groups(model, config)
    table = model.model.embed_tokens.weight
    assert [group["lr"] for group in groups] == [EMBEDDING_RATE, RATE, RATE]
    assert [id(parameter) for parameter in groups[0]["params"]] == [id(table)]
    # Norms do not decay.
    assert all(parameter.dim() == 1 for parameter in groups[2]["params"])
    assert groups[2]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_learning_rate": 1e-5}, "neither embed_tokens nor lm_head is trained in full; add them to modul"),
        ({"loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio is set, but no LoRA factor is trained; drop it"),
    ],
)
def test_a_rate_for_nothing_is_refused(options, message) -> None:
    model = add_lora(from_config(CONFIG, device="cpu"), r=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("input_layernorm.weight"))
    with pytest.raises(ValueError, match=message):
        create_optimizer(model, TrainConfig(**options))


def test_without_options_there_is_one_rate_and_nothing_is_said(capsys) -> None:
    model = add_lora(from_config(CONFIG, device="cpu"), r=4)
    groups = parameter_groups(model, TrainConfig(learning_rate=RATE, weight_decay=0.1))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(RATE, 0.1)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tied", [False, True])
def test_tables_with_their_own_rate_are_resumed_to_the_last_bit(tmp_path: Path, tied: bool) -> None:
    def model() -> Decoder:
        torch.manual_seed(0)
        saved = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
        return add_lora(from_config({**CONFIG, "tie_word_embeddings": tied}, device="cpu"), r=4, modules_to_save=saved)

    options = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-4, "loraplus_lr_ratio": 4.0, "max_steps": 6}
    rows = random_rows(12)
    straight, _, _ = train(tmp_path / "straight", rows, model(), **options)
    train(tmp_path / "cut", rows, model(), save_steps=4, **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-4")
    resumed, _, _ = train(tmp_path / "cut", rows, model(), resume_from_checkpoint=checkpoint, **options)
    start = dict(model().named_parameters())
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
        # AdamW moves an element by about its rate in each of the 6 steps, which falls from 1 to 1/6 of it.
        moved = float((parameter.detach() - start[name].detach()).abs().max())
        rate = 1e-4 if name.endswith("weight") else 4e-3 if name.endswith("lora_B") else 1e-3
        assert 0.5 * rate < moved < 4 * rate, name


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["apart", "end to end"])
def test_a_run_equals_an_optimizer_with_the_same_gradients(tmp_path, graphs, monkeypatch, cuda_graphs) -> None:
    """Every group moves by its own rate times the factor of the schedule; the log has the base rate."""
    from slothcore.training.optimizer_step import OptimizerStep

    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    gradients: list[dict[str, torch.Tensor]] = []
    original = OptimizerStep._clip

    def clip(self: OptimizerStep) -> torch.Tensor:
        norm = original(self)
        gradients.append({name: p.grad.clone() for name, p in self.parameters.items()})
        return norm

    monkeypatch.setattr(OptimizerStep, "_clip", clip)
    options = {"learning_rate": 1e-3, "loraplus_lr_ratio": 5.0, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    _, _, log = train(
        tmp_path / "run", random_rows(12), model, max_steps=6, weight_decay=0.1, cuda_graphs=cuda_graphs, **options
    )
    assert any(made.replays for made in graphs) == cuda_graphs

    copies = {name: nn.Parameter(value) for name, value in start.items()}
    groups = [
        {"params": [p for n, p in copies.items() if n.endswith("lora_B") == b], "lr": 5e-3 if b else 1e-3}
        for b in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, fused=True)
    for step, given in enumerate(gradients):
        factor = learning_rate_factor("cosine", step, warmup_steps=2, total_steps=6)
        for group, rate in zip(optimizer.param_groups, (1e-3, 5e-3), strict=True):
            group["lr"] = rate * factor
        for name, parameter in copies.items():
            parameter.grad = given[name]
        optimizer.step()
        assert log[step]["learning_rate"] == 1e-3 * factor
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, copies[name]), name
