"""Checkpoints of the text part of a multimodal model: their files name its layers as the whole model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slothcore.data.masking import TokenizedRow
from slothcore.lora.adapter_io import WEIGHTS_FILE, adapter_state
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.models.zoo import FAMILIES_TINY, saved, tiny_model, token_ids
from tests.training.tiny import train

WHOLE, PART = "base_model.model.model.language_model.", "base_model.model.model."
OPTIONS: dict[str, dict[str, Any]] = {
    "factors": {},
    "of base weights": {"init_lora_weights": "pissa"},
    "more than factors": {"use_dora": True, "bias": "all", "modules_to_save": ["norm", "lm_head", "embed_tokens"]},
}
STEPS = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}

pytestmark = pytest.mark.filterwarnings("ignore:.*belong to no text model")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(FAMILIES_TINY["gemma3"][0]), tmp_path_factory.mktemp("base"))


def adapted(base: Path, **options: Any) -> Decoder:
    torch.manual_seed(0)
    return add_lora(load_model(base, bits=32, device="cpu"), r=2, **options)


def rows(seed: int) -> list[TokenizedRow]:
    return [TokenizedRow(ids, ids) for ids in token_ids(4, 12, seed=seed).tolist()]


def assert_same_adapter(one: Decoder, other: Decoder) -> None:
    mine, yours = adapter_state(one), adapter_state(other)
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, yours[name]), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_resumed_equals_straight(base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    straight, resumed = adapted(base, **options), adapted(base, **options)
    train(tmp_path / "straight", rows(1), straight, **STEPS)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    assert any(name.startswith(WHOLE) for name in load_file(checkpoint / WEIGHTS_FILE))
    train(tmp_path / "resumed", rows(1), resumed, resume_from_checkpoint=str(checkpoint), **STEPS)
    assert_same_adapter(resumed, straight)


def test_a_checkpoint_with_the_names_of_the_part_is_still_read(base: Path, tmp_path: Path) -> None:
    """As slothcore wrote them at first."""
    straight, resumed = adapted(base), adapted(base)
    train(tmp_path / "straight", rows(1), straight, **STEPS)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    weights = checkpoint / WEIGHTS_FILE
    save_file({name.replace(WHOLE, PART): tensor for name, tensor in load_file(weights).items()}, weights)
    train(tmp_path / "resumed", rows(1), resumed, resume_from_checkpoint=str(checkpoint), **STEPS)
    assert_same_adapter(resumed, straight)


def test_the_result_is_that_of_the_best_evaluation(base: Path, tmp_path: Path) -> None:
    """A rate that makes the loss rise: the first evaluation is the best, and its checkpoint is not the last."""
    model, other = adapted(base), adapted(base)
    options = {**STEPS, "learning_rate": 0.3, "lr_scheduler_type": "constant", "save_steps": 0, "eval_steps": 1}
    _, result, _ = train(tmp_path / "run", rows(1), model, rows(2), load_best_model_at_end=True, **options)
    assert result.best_step is not None
    assert result.best_step < 4
    until = {**options, "max_steps": result.best_step}
    train(tmp_path / "until", rows(1), other, rows(2), **until)
    assert_same_adapter(model, other)
