"""20 optimizer steps against transformers + PEFT + torch's AdamW, on the same batches: every loss within 1e-4.

The reference gets padded batches, transformers' schedule, torch's clipping, and a mean over the targets of the whole
optimizer step. Its adapter starts from the file that slothcore writes.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, get_scheduler

from slothcore.data.masking import TokenizedRow
from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.load import load_model
from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import random_rows, write_model

STEPS = 20
STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "Tom had a red ball. He threw the ball high. The dog ran to get it, and they were happy.",
    "One day, a bird sat on a tree. It sang a song for the sun.",
    "The cat was hungry. Mom gave the cat some milk, and the cat said thank you.",
    "A boy saw a big box. He wanted to open it, but it was too heavy for him.",
    "Sam and Mia went to the shop. They bought a cake.",
    "It was a cold day. The frog wore a hat.",
]

GEOMETRIES = {
    "grouped queries": {},
    "tied head": {"tie_word_embeddings": True},
    "llama3 scaling": {
        "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def train_both(
    folder: Path, tmp_path: Path, rows: list[TokenizedRow], *, bits: int, use_dora: bool = False
) -> tuple[list[dict], list[dict]]:
    """The losses, gradient norms and learning rates of slothcore, and those of the reference."""
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        bits=bits,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        # Which slothcore applies to matrices alone; the reference would let magnitudes decay.
        weight_decay=0.0 if use_dora else 0.05,
        max_grad_norm=0.5,
        logging_steps=1,
        save_steps=0,
        plot=False,
        disable_tqdm=True,
    )
    model = load_model(folder, bits=bits, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    add_lora(model, r=8, lora_alpha=16, use_dora=use_dora)
    save_adapter(model, tmp_path / "start")
    trainer = SFTTrainer(model, None, rows, config=config)
    trainer.train()

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if bits == 4:
        quantise_layers(base)
    reference = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    return read_log(tmp_path / "run" / "log.jsonl"), train_reference(reference, trainer, rows, config)


def train_reference(
    model: torch.nn.Module, trainer: SFTTrainer, rows: list[TokenizedRow], config: TrainConfig
) -> list[dict]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=STEPS)
    records = []
    model.train()
    for step in range(STEPS):
        chosen = [rows[index] for index in trainer.schedule.plan(step).rows]
        num_targets = sum(row.num_targets for row in chosen)
        total = 0.0
        for start in range(0, len(chosen), 2):
            loss = padded_loss(model, chosen[start : start + 2]) / num_targets
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        records.append({"loss": total, "grad_norm": norm, "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return records


def padded_loss(model: torch.nn.Module, rows: list[TokenizedRow]) -> Tensor:
    """The sum over all targets of a batch padded on the right."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def quantise_layers(model: torch.nn.Module) -> None:
    """Replace each linear weight of the layers by what bitsandbytes gives back from its four bits."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            # Blocks run over the flattened weight. bitsandbytes' CPU kernel forgets that where a row is no multiple of
            # 64 (babyllama's down_proj has 352), so it gets the weight as one row.
            flat = module.weight.data.reshape(1, -1)
            packed, state = bnb.quantize_4bit(flat, compress_statistics=True, quant_type="nf4")
            module.weight.data = bnb.dequantize_4bit(packed, state).view_as(module.weight)


def assert_same_course(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) == STEPS
    for step, (record, reference) in enumerate(zip(ours, theirs, strict=True)):
        assert record["loss"] == pytest.approx(reference["loss"], abs=1e-4), f"step {step}"
        assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3), f"step {step}"
        assert record["learning_rate"] == reference["learning_rate"], f"step {step}"
    # A course that stands still would agree with anything.
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.05


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_random_models(tmp_path, geometry, bits) -> None:
    folder = write_model(tmp_path / "model", **GEOMETRIES[geometry])
    assert_same_course(*train_both(folder, tmp_path, random_rows(10), bits=bits))


@pytest.mark.parametrize("bits", [32, 4])
def test_dora(tmp_path, bits) -> None:
    folder = write_model(tmp_path / "model")
    assert_same_course(*train_both(folder, tmp_path, random_rows(10), bits=bits, use_dora=True))


@pytest.mark.parametrize("bits", [32, 4])
def test_a_trained_model(tmp_path, shared_data, bits) -> None:
    folder = shared_data / "models" / "babyllama-105"
    tokenizer = Tokenizer.from_folder(folder)
    ids = [tokenizer.encode(story) for story in STORIES]
    # Every other story is learned from its middle on, as a completion would be.
    rows = [TokenizedRow(i, [-100] * (len(i) // 2 * (n % 2)) + i[len(i) // 2 * (n % 2) :]) for n, i in enumerate(ids)]
    assert_same_course(*train_both(folder, tmp_path, rows, bits=bits))
