"""Evaluation on a split, on one file, on several: each target token counts once, whatever file and batch it is in."""

import json
import math
from pathlib import Path

import pytest
import torch

from slothcore.data.masking import TokenizedRow
from slothcore.data.tokenizer import Tokenizer
from slothcore.loading import load
from slothcore.run import train_from_config
from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log
from tests.training.tiny import write_model, write_records

# Files of three layouts and very unequal sizes, so that a mean over files or batches would be another number.
FILES: dict[str, list[dict]] = {
    "prompts.jsonl": [{"prompt": f"Say {n}.", "completion": f" {n}" * (1 + 3 * n)} for n in range(7)],
    "alpaca.json": [{"instruction": "Add", "input": "1, 2", "output": "3"}],
    "texts.jsonl": [{"text": "All of this text is learned, to its very end."}, {"text": "This too."}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_model(folder / "model", max_position_embeddings=256)
    write_records(folder / "train.jsonl")
    for name, records in FILES.items():
        text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
        (folder / name).write_text(text)
    return folder


def evaluations(folder: Path, output: str, **changes) -> list[dict]:
    options = {
        "model": str(folder / "model"),
        "data": str(folder / "train.jsonl"),
        "device": "cpu",
        "bits": 32,
        "lora_dropout": 0.2,
        "output_dir": str(folder / output),
        "max_seq_length": 256,
        "max_steps": 2,
        "eval_steps": 1,
        "eval_on_start": True,
        "save_steps": 0,
        "plot": False,
        "disable_tqdm": True,
        **changes,
    }
    train_from_config(TrainConfig(**options))
    return [record for record in read_log(folder / output / "log.jsonl") if "eval_loss" in record]


def by_hand(folder: Path, names: list[str]) -> float:
    """The mean loss of the target tokens of all rows, each row by itself, on the model that training begins with."""
    model, tokenizer = load(str(folder / "model"), bits=32, device="cpu")
    assert isinstance(tokenizer, Tokenizer)
    total, targets = 0.0, 0
    for row in (row for name in names for row in rows_of(folder / name, tokenizer)):
        loss = model(torch.tensor(row.input_ids), labels=torch.tensor(row.labels)).loss.item()
        total += loss * row.num_targets
        targets += row.num_targets
    return total / targets


def rows_of(path: Path, tokenizer: Tokenizer) -> list[TokenizedRow]:
    from slothcore.data.files import load_dataset
    from slothcore.data.masking import tokenise_dataset

    rows, _ = tokenise_dataset(load_dataset(path), tokenizer, max_seq_length=256)
    return rows


@pytest.mark.parametrize("names", [["prompts.jsonl"], [*FILES]], ids=["one file", "three files"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_every_target_token_of_every_file_counts_once(folder, names, batch, packing) -> None:
    found = evaluations(
        folder,
        f"{len(names)} {batch} {packing}",
        eval_data=[str(folder / name) for name in names],
        per_device_eval_batch_size=batch,
        packing=packing,
    )
    assert [record["step"] for record in found] == [0, 1, 2]
    # The adapter adds nothing yet, so step 0 is the base model.
    assert found[0]["eval_loss"] == pytest.approx(by_hand(folder, names), rel=1e-5)
    assert found[0]["eval_perplexity"] == pytest.approx(math.exp(found[0]["eval_loss"]))
    assert len({record["eval_loss"] for record in found}) == 3


def test_a_split_is_evaluated_as_a_file_of_its_rows_is(folder) -> None:
    """`eval_fraction` holds rows out; given as files, the same two halves give the same numbers."""
    held_out = evaluations(folder, "split", eval_fraction=0.25, seed=3)
    from slothcore.run import read_records

    config = TrainConfig(model="-", data=str(folder / "train.jsonl"), eval_fraction=0.25, seed=3)
    for name, records in zip(("kept", "held out"), read_records(config), strict=True):
        assert records is not None
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    files = {"data": str(folder / "kept.jsonl"), "eval_data": str(folder / "held out.jsonl"), "seed": 3}
    apart = evaluations(folder, "files", **files)
    assert [record["eval_loss"] for record in held_out] == [record["eval_loss"] for record in apart]


def test_evaluating_changes_nothing_in_training(folder) -> None:
    """Dropout draws numbers in training alone."""
    logs = []
    for output, changes in (("with", {"eval_data": str(folder / "texts.jsonl")}), ("without", {})):
        if not changes:
            changes = {"eval_steps": None, "eval_on_start": False}
        evaluations(folder, output, max_steps=4, logging_steps=1, **changes)
        log = read_log(folder / output / "log.jsonl")
        logs.append([(record["loss"], record["grad_norm"]) for record in log if "loss" in record])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4
