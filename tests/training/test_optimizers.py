"""Every optimizer: against its original, across a checkpoint, in the memory plan; and where it cannot run.

bitsandbytes' kernels also exist for the CPU in the release that the tests have, so its optimizers are stepped here for
real, but for the pages, which ordinary memory stands in for.
"""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TransformersAdafactor

from slothcore.cli import main
from slothcore.models.streaming import TextCache
from slothcore.run import train_from_config
from slothcore.training import optimizer as optimizer_module
from slothcore.training.adafactor import Adafactor
from slothcore.training.config import TrainConfig
from slothcore.training.optimizer import create_optimizer, load_optimizer_state, optimizer_state
from slothcore.training.optimizer_kinds import KINDS, SMALLEST_PAGED, check_optimizer
from slothcore.training.options import OTHER_VALUES
from tests.training.tiny import random_rows, tiny_model, train, write_model, write_records

SHAPES = [(16, 300), (64, 64), (5, 7), (400, 300), (3, 8, 20), (77,)]
ON_GPU = [name for name, kind in KINDS.items() if kind.is_bitsandbytes]
ANYWHERE = [name for name in KINDS if name not in ON_GPU]


class Model(nn.Module):
    """Parameters of many shapes, and gradients that depend on the step alone."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, shape in enumerate(SHAPES):
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(f"p{index}", nn.Parameter(value))

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (number + 1)
        optimizer.step()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets bitsandbytes' optimizers run on a CPU; pages are ordinary tensors with bitsandbytes' mark."""

    def get_state_buffer(self: Any, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer = torch.zeros_like(p, dtype=dtype)
        if self.is_paged and p.numel() >= SMALLEST_PAGED:
            buffer.is_paged = True
        return buffer

    monkeypatch.setattr(optimizer_module, "check_optimizer", lambda optim, device: None)
    monkeypatch.setattr("bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer", get_state_buffer)
    monkeypatch.setattr("bitsandbytes.functional.prefetch_tensor", lambda *arguments: None)
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda parameter: None)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_is_that_of_transformers(dtype: torch.dtype, weight_decay: float) -> None:
    ours, theirs = Model(dtype), Model(dtype)
    actual = Adafactor(ours.parameters(), lr=1e-2, weight_decay=weight_decay)
    expected = TransformersAdafactor(
        theirs.parameters(), lr=1e-2, weight_decay=weight_decay, scale_parameter=False, relative_step=False
    )
    for number in range(5):
        ours.step(actual, number)
        theirs.step(expected, number)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
            state = actual.state[mine]
            assert state.pop("step") == number + 1
            assert all(torch.equal(value, expected.state[other][key]) for key, value in state.items())
            state["step"] = number + 1


CLASSES = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    "lion": bitsandbytes.optim.Lion32bit,
    "lion_8bit": bitsandbytes.optim.Lion8bit,
    "adafactor": Adafactor,
    "sgd": torch.optim.SGD,
}


@pytest.mark.parametrize("optim", KINDS)
def test_each_name_is_the_optimizer_that_it_says(on_cpu: None, optim: str) -> None:
    """With the options of the configuration: as the original class has it, to the last bit."""
    ours, theirs = Model(), Model()
    config = TrainConfig(optim=optim, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() < 2) == is_vector] for is_vector in (False, True))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    options: dict[str, Any] = {"lr": config.learning_rate}
    if optim in ("adamw", "sgd"):
        options["fused"] = True
    if "adamw" in optim:
        options["eps"] = 1e-6
    if optim not in ("adafactor", "sgd"):
        options["betas"] = (0.8, 0.95)
    actual, expected = create_optimizer(ours, config), CLASSES[optim](groups, **options)
    for number in range(4):
        ours.step(actual, number)
        theirs.step(expected, number)
    for mine, other, start in zip(ours.parameters(), theirs.parameters(), Model().parameters(), strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, start)


@pytest.mark.parametrize("optim", KINDS)
def test_a_step_is_counted_in_the_versions_of_what_it_changed(on_cpu: None, optim: str) -> None:
    model = Model()
    optimizer = create_optimizer(model, TrainConfig(optim=optim))
    for number in range(2):
        versions = [parameter._version for parameter in model.parameters()]
        model.step(optimizer, number)
        assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion"])
def test_a_conversation_knows_that_the_model_has_learned(on_cpu: None, tmp_path: Path, optim: str) -> None:
    """Keys that it kept from before the run are those of other weights."""
    model = tiny_model().eval()
    cache, prompt = TextCache(model), list(range(1, 30))

    def read() -> tuple[list[int], int]:
        before = cache.tokens_read
        tokens = list(model.stream(prompt, max_new_tokens=4, eos_token_id=(), cache=cache))
        return tokens, cache.tokens_read - before

    first = read()
    assert read() == (first[0], 4)
    train(tmp_path, random_rows(8), model, max_steps=2, optim=optim, learning_rate=0.05)
    model.eval()
    after, whole = read(), model.generate(torch.tensor(prompt), max_new_tokens=4, eos_token_id=())
    assert after == (whole[0, len(prompt) :].tolist(), len(prompt) + 3)
    assert after[0] != first[0]
    assert read() == (after[0], 4)


@pytest.mark.parametrize("optim", KINDS)
def test_a_saved_state_is_gone_on_with_to_the_last_bit(on_cpu: None, optim: str) -> None:
    config = TrainConfig(optim=optim, weight_decay=0.1)
    straight, before, after = Model(), Model(), Model()
    optimizers = [create_optimizer(model, config) for model in (straight, before, after)]
    for number in range(5):
        straight.step(optimizers[0], number)
    for number in range(3):
        before.step(optimizers[1], number)
    tensors, values = optimizer_state(optimizers[1], dict(before.named_parameters()))
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors.values())
    with torch.no_grad():
        for mine, saved in zip(after.parameters(), before.parameters(), strict=True):
            mine.copy_(saved)
    load_optimizer_state(optimizers[2], dict(after.named_parameters()), tensors, values)
    for number in range(3, 5):
        after.step(optimizers[2], number)
    for one, other in zip(straight.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)
        state, expected = optimizers[2].state[other], optimizers[0].state[one]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(state[key], value) if isinstance(value, Tensor) else state[key] == value
            assert getattr(state[key], "is_paged", False) == getattr(value, "is_paged", False), key
    paged = {k for s in optimizers[2].state.values() for k, v in s.items() if getattr(v, "is_paged", False)}
    assert paged == ({"state1", "state2"} if KINDS[optim].is_paged else set())


@pytest.mark.parametrize("optim", KINDS)
def test_the_plan_knows_the_state(on_cpu: None, optim: str) -> None:
    model = Model()
    optimizer = create_optimizer(model, TrainConfig(optim=optim))
    model.step(optimizer, 0)
    shared = {"qmap1", "qmap2"}  # one code book for all
    actual = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in shared and not getattr(value, "is_paged", False)
    )
    assert sum(map(KINDS[optim].state_bytes, model.parameters())) == actual
    pages = (v for state in optimizer.state.values() for v in state.values() if getattr(v, "is_paged", False))
    assert sum(map(KINDS[optim].page_bytes, model.parameters())) == sum(value.nbytes for value in pages)


@pytest.mark.parametrize("optim", ON_GPU)
def test_what_needs_a_gpu_is_refused_on_a_cpu(tmp_path: Path, optim: str) -> None:
    message = f"optim {optim} needs a GPU, and the model is on cpu; set optim to adamw, adafactor or sgd"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", random_rows(4), optim=optim)
    # Before a model is loaded, too.
    config = TrainConfig(model="nowhere", data="nothing", device="cpu", output_dir=str(tmp_path / "run"), optim=optim)
    with pytest.raises(ValueError, match=message):
        train_from_config(config)
    assert not (tmp_path / "run").exists()
    check_optimizer(optim, torch.device("cuda"))


@pytest.mark.parametrize(("theirs", "ours"), OTHER_VALUES["optim"].items())
def test_other_names_of_an_optimizer(tmp_path: Path, theirs: str, ours: str) -> None:
    assert TrainConfig(optim=theirs).optim == ours
    (tmp_path / "run.yaml").write_text(f"optim: {theirs}\n")
    assert TrainConfig.from_yaml(tmp_path / "run.yaml") == TrainConfig(optim=ours)


def test_options_as_flags(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_records(tmp_path / "data.jsonl", 8)
    words = ["train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--device", "cpu"]
    words += ["--bits", "32", "--optim", "adamw_torch_fused", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    words += ["--lr-scheduler-type", "polynomial", "--lr-scheduler-kwargs", '{"power": 2, "lr_end": 1e-6}']
    words += ["--modules-to-save", "lm_head", "--embedding-learning-rate", "1e-5", "--loraplus-lr-ratio", "4"]
    assert main([*words, "--plot", "false", "--neftune-noise-alpha", "5"]) == 0
    config = TrainConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert (config.optim, config.lr_scheduler_type) == ("adamw", "polynomial")
    assert config.lr_scheduler_kwargs == {"power": 2.0, "lr_end": 1e-6}
    assert (config.embedding_learning_rate, config.loraplus_lr_ratio, config.neftune_noise_alpha) == (1e-5, 4.0, 5.0)


@pytest.mark.parametrize("optim", ANYWHERE)
def test_a_run_is_resumed_to_the_last_bit(tmp_path: Path, optim: str) -> None:
    """With groups of several rates, a schedule with values of its own, and noise."""
    options = {
        "optim": optim,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "loraplus_lr_ratio": 4.0,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "neftune_noise_alpha": 5.0,
    }
    rows = random_rows(12)
    straight, _, expected = train(tmp_path / "straight", rows, **options)
    train(tmp_path / "cut", rows, save_steps=3, **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-3")
    resumed, _, log = train(tmp_path / "cut", rows, resume_from_checkpoint=checkpoint, **options)
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    kept = "step", "loss", "grad_norm", "learning_rate"
    assert [[record[key] for key in kept] for record in log] == [[record[key] for key in kept] for record in expected]
    assert min(record["loss"] for record in log) < log[0]["loss"]


@pytest.mark.parametrize("optim", ANYWHERE)
def test_the_predicted_state_is_that_of_a_run(tmp_path: Path, optim: str) -> None:
    trainer, _, _ = train(tmp_path, random_rows(4), tiny_model(), max_steps=1, optim=optim)
    state = [v for entries in trainer.optimizer.state.values() for v in entries.values() if isinstance(v, Tensor)]
    assert trainer.memory.optimizer == sum(value.nbytes for value in state)
