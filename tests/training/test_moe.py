"""Training of experts: LoRA on NF4 ones and all weights of dense ones, with the auxiliary loss, and resuming either."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slothcore.lora.adapter_io import load_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.load import load_model
from slothcore.training.batches import RowSet
from slothcore.training.evaluation import evaluate
from slothcore.training.report import read_log
from tests.training.tiny import random_rows, train, write_model

SPARSE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}
LORA, FULL = "lora on nf4 experts", "all weights"
KINDS: dict[str, dict[str, Any]] = {LORA: {}, FULL: {"full_finetuning": True, "bits": 32}}
STEPS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "save_steps": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("moe") / "base", **SPARSE)


def fresh(base: Path, kind: str):
    if kind == FULL:
        return load_model(base, bits=32, device="cpu")
    torch.manual_seed(1)
    return add_lora(load_model(base, bits=4, device="cpu"), r=4, lora_alpha=8, lora_dropout=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_straight(base: Path, kind: str, tmp_path: Path) -> None:
    rows = random_rows(6)
    straight, resumed = fresh(base, kind), fresh(base, kind)
    before = {name: weight.detach().clone() for name, weight in straight.named_parameters()}
    options = {**STEPS, **KINDS[kind], "max_steps": 6}
    train(tmp_path / "straight", rows, straight, **options)
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    train(tmp_path / "resumed", rows, resumed, resume_from_checkpoint=checkpoint, **options)
    again = resumed.state_dict()
    for name, weight in straight.state_dict().items():
        assert torch.equal(again[name], weight), name
    moved = [name for name, weight in straight.named_parameters() if not torch.equal(weight, before[name])]
    assert moved == [name for name, weight in straight.named_parameters() if weight.requires_grad]
    assert sum("experts" in name for name in moved) == 2 * 3 * (1 if kind == FULL else 2)

    losses = [record["loss"] for record in read_log(tmp_path / "straight" / "log.jsonl") if "loss" in record]
    assert losses[-1] < losses[0]


def test_an_evaluation_is_of_the_targets_alone(base: Path, tmp_path: Path) -> None:
    """In batches of every size, without what training adds to have the experts used evenly."""
    rows, model = random_rows(7), fresh(base, FULL)
    results = [evaluate(model, RowSet(rows), batch_size=size) for size in (1, 3, 7)]
    logits = [model(torch.tensor(row.input_ids)).logits[:-1] for row in rows]
    targets = [torch.tensor(row.labels[1:]) for row in rows]
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets)).item()
    assert [result.loss for result in results] == pytest.approx([expected] * 3, rel=1e-5)
    assert results[0].perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_a_checkpoint_of_other_experts_is_refused(base: Path, tmp_path: Path) -> None:
    """The same shapes, and one expert's frozen weight of another value."""
    rows = random_rows(4)
    train(tmp_path / "first", rows, fresh(base, LORA), max_steps=3, **STEPS)
    other = fresh(base, LORA)
    other.model.layers[0].mlp.experts.up_proj.weight[3] += 1
    checkpoint = str(tmp_path / "first" / "checkpoint-3")
    with pytest.raises(ValueError, match="is of another model"):
        train(tmp_path / "second", rows, other, max_steps=6, resume_from_checkpoint=checkpoint, **STEPS)


def test_the_results_can_be_used(base: Path, tmp_path: Path) -> None:
    """The adapter on its base, and the whole model in transformers, say what the trained models say."""
    rows = random_rows(4)
    tuned, full = (fresh(base, kind) for kind in KINDS)
    train(tmp_path / "lora", rows, tuned, max_steps=2, **STEPS)
    train(tmp_path / "full", rows, full, max_steps=2, **STEPS, **KINDS[FULL])
    input_ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        loaded = load_adapter(load_model(base, bits=4, device="cpu"), tmp_path / "lora" / "adapter")
        assert torch.equal(loaded(input_ids).logits, tuned.eval()(input_ids).logits)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model", attn_implementation="eager").eval()
        assert (theirs(input_ids).logits - full.eval()(input_ids).logits).abs().max() < 1e-4
