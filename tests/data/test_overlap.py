"""Rows to evaluate on that are trained on as well."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from slothcore.cli import main
from slothcore.data.dataset import open_dataset
from slothcore.data.masking import TokenizedRow
from slothcore.data.token_store import TokenStore, TokenWriter
from slothcore.data.tokenizer import Tokenizer
from slothcore.loading import load
from slothcore.training.config import TrainConfig
from slothcore.training.preparation import prepare_rows
from slothcore.training.trainer import SFTTrainer
from tests.data.tiny_tokenizers import write_byte_tokenizer
from tests.training.tiny import write_model


def stored(rows: Sequence[Sequence[int]], folder: Path | None = None) -> TokenStore:
    with TokenWriter(folder) as writer:
        for row in rows:
            writer.add(TokenizedRow(list(row), list(row)))
        return writer.finish({})


@pytest.mark.parametrize("mapped", [False, True])
def test_documents_of_both_stores_are_counted(mapped: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 2, size=generator.integers(2, 6)).tolist() for _ in range(60)]
    ours, theirs = rows[:20], rows[20:]
    expected = sum(row in theirs for row in ours)
    assert 0 < expected < 20
    assert stored(ours).num_also_in(stored(theirs, tmp_path if mapped else None)) == expected
    # Labels are no part of it: what was read is known, learned or not.
    unlearned = TokenStore.from_rows([TokenizedRow(row, [-100] * (len(row) - 1) + row[-1:]) for row in theirs])
    assert stored(ours).num_also_in(unlearned) == expected


def test_rows_held_out_that_are_trained_on_are_said(tmp_path: Path, capsys) -> None:
    tokenizer, path = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "bytes")), tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in "aabcdefghi"), encoding="utf-8")
    config = TrainConfig(max_seq_length=100, packing=True)
    counts = []
    for seed in range(20):
        train, held_out = open_dataset(path).hold_out(0.2, seed=seed)
        texts = [record["text"] for record in train]
        counts.append(sum(record["text"] in texts for record in held_out))
        rows = prepare_rows(train, tokenizer, config, what="training")
        capsys.readouterr()
        prepare_rows(held_out, tokenizer, config, what="evaluation", learned=rows)
        said = "evaluation: 1 of 2 documents is in the training data, too, token by token, so its loss is not only of"
        assert (said in capsys.readouterr().out) == bool(counts[-1])
    assert set(counts) == {0, 1}


def test_data_to_evaluate_on_that_are_trained_on_are_said(tmp_path: Path, capsys) -> None:
    said = "evaluation: 2 of 3 documents are in the training data, too,"
    files, records = [], []
    for name, words in (("train.jsonl", "one two three four"), ("eval.jsonl", "two five four")):
        records.append([{"prompt": "Say ", "completion": word} for word in words.split()])
        files.append(str(tmp_path / name))
        Path(files[-1]).write_text("\n".join(map(json.dumps, records[-1])), encoding="utf-8")
    model = write_model(tmp_path / "model")
    assert main(["preview", "--model", str(model), "--data", files[0], "--eval-data", files[1]]) == 0
    assert said in capsys.readouterr().out
    config = TrainConfig(output_dir=str(tmp_path / "run"), bits=32, full_finetuning=True)
    SFTTrainer(*load(model, device="cpu", bits=32), *records, config=config)
    assert said in capsys.readouterr().out
    SFTTrainer(*load(model, device="cpu", bits=32), records[0], records[1][1:2], config=config)
    assert "in the training data" not in capsys.readouterr().out
