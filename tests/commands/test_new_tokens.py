"""`preview` and `plan` know of new tokens what the run will do with them."""

import json
import re
from pathlib import Path

import pytest

import slothcore
from slothcore.cli import main
from slothcore.training.report import read_log
from tests.training.tiny import write_model

NEW = ("--new-tokens", "<|note|>", "axolotl")
BOTH = ("--modules-to-save", "embed_tokens", "lm_head")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("<|note|> an axolotl, two axolotls. " * 3, encoding="utf-8")
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    return ["--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--max-seq-length", "128", *more]


def test_the_preview_counts_what_the_run_trains_on(folder, capsys) -> None:
    def learned(*more: str) -> int:
        assert main(["preview", *words(folder, *more), "--rows", "1"]) == 0
        return int(re.search(r"with ([\d,]+) tokens", capsys.readouterr().out)[1].replace(",", ""))

    # 8 and twice 7 bytes become one token each, three times; a begin and an end token stay.
    assert learned() - learned(*NEW) == 3 * (7 + 2 * 6)
    run = ["train", *words(folder, *NEW), "--output-dir", str(folder / "run"), "--max-steps", "1", "--device", "cpu"]
    assert main([*run, "--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "1"]) == 0
    capsys.readouterr()
    rows = json.loads((folder / "run" / "run.json").read_text())["rows"]["training"]
    assert rows["tokens"] == learned(*NEW)
    assert read_log(folder / "run" / "log.jsonl")[-1]["step"] == 1
    # A run is previewed with its own tokenizer.
    assert main(["preview", "--config", str(folder / "run" / "config.yaml"), "--rows", "0"]) == 0
    assert f"with {rows['tokens']:,} tokens" in capsys.readouterr().out


def test_the_plan_has_rows_for_them(folder, capsys) -> None:
    def trained(*more: str) -> int:
        capsys.readouterr()
        assert main(["plan", *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["gradient_checkpointing"]["false"]["bytes"]["trained"]

    model = ["--model", str(folder / "model")]
    assert trained(*model, *NEW, *BOTH) - trained(*model, *BOTH) == 2 * 2 * 64 * 4
    assert trained(*model, *NEW) == trained(*model)
    # And of an adapter that brought them, with its base as small as before.
    run = [
        "train",
        *words(folder, *NEW, *BOTH),
        "--output-dir",
        str(folder / "run"),
        "--max-steps",
        "1",
        "--device",
        "cpu",
    ]
    assert main(run) == 0
    assert trained("--model", str(folder / "run")) == trained(*model, *NEW, *BOTH)


def test_a_long_list_of_them_does_not_bury_the_log(folder, capsys) -> None:
    model, tokenizer = slothcore.load(folder / "model", bits=32, device="cpu", progress=False)
    added = slothcore.add_tokens(model, tokenizer, [f"<t{number}>" for number in range(1000)])
    assert len(added) == 1000
    said = capsys.readouterr().out
    assert "added 1,000 tokens: '<t0>', " in said
    assert "'<t11>' and 988 more; the vocabulary grows" in said
    assert "<t12>" not in said
