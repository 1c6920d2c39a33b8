"""The loading benchmark on a small checkpoint: it writes what slothcore loads, times it, and cleans up."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import loading
from slothcore.models.load import load_model


def test_it_times_prints_and_records(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--gigabytes", "0.02", "--shard-gigabytes", "0.02", "--device", "cpu", "--folder", str(tmp_path)]
    assert loading.main([*options, "--out", str(tmp_path / "csv")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["csv"], "the checkpoint is removed"
    printed = capfd.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[-4:]] == ["bare read", "slothcore"] * 2
    with (tmp_path / "csv" / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["system"], row["case"]) for row in rows] == [
        ("bare read", "cold"),
        ("slothcore", "cold"),
        ("bare read", "warm"),
        ("slothcore", "warm"),
    ]
    for row in rows:
        assert row["benchmark"] == "loading"
        assert float(row["median_ms"]) > 0
        assert float(row["rate"].removesuffix(" GB/s")) > 0
        assert (row["fraction_of_floor"] != "") == (row["system"] == "slothcore")


def test_the_sizes_are_those_asked_for(tmp_path: Path) -> None:
    for gigabytes in (16.0, 5.0, 1.0, 0.2):
        config = loading.model_config(gigabytes)
        size = sum(loading.bf16_bytes(shape) for group in loading.shard_shapes(config) for shape in group.values())
        assert size / 1e9 == pytest.approx(gigabytes, rel=0.06)
    assert loading.model_config(16.0) == loading.shapes.LLAMA_3_1_8B


def test_the_files_are_a_checkpoint(tmp_path: Path) -> None:
    files = loading.write_checkpoint(tmp_path / "model", 0.02, 20_000_000, device="cpu")
    assert len(files) > 2
    model = load_model(tmp_path / "model", bits=16, device="cpu")
    table = model.model.embed_tokens.weight
    assert table.float().std().item() == pytest.approx(loading.WEIGHT_STD, rel=0.01)
    query = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(query.reshape(-1), table.reshape(-1)[: query.numel()])
    assert 0.0 <= loading.drop_from_page_cache(files) <= 1.0
    for file in files:
        file.read_bytes()
    assert loading.share_in_page_cache(files) == 1.0
