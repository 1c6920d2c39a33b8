"""The benchmark of the GGUF quantisers on few numbers: it times, compares bytes, prints and records."""

import csv
from pathlib import Path

import pytest

from benchmarks import gguf_quantize
from slothcore.export.gguf_quantize import PACKS

OPTIONS = ["--device", "cpu", "--millions", "0.05", "--rounds", "1"]


def test_it_times_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    assert gguf_quantize.main([*OPTIONS, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[3:9]] == list(PACKS)
    assert all(line.split("|")[5].strip() == "yes" for line in printed[3:9])
    for line, system in zip(printed[9:11], ("slothcore", "llama.cpp"), strict=True):
        assert line.startswith(f"Llama-3.1-8B, {system}: Q8_0 ")
        assert [part.split()[0] for part in line.partition(": ")[2].split(", ")] == ["Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"]
    with (tmp_path / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["system"]) for row in rows] == [
        (kind, system) for kind in PACKS for system in ("slothcore", "llama.cpp")
    ]
    assert all(float(row["rate"].removesuffix(" GB/s")) > 0 for row in rows)


def test_other_bytes_fail_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def off_by_one(weight, kind):
        packed = gguf_quantize.quantize(weight, kind).copy()
        packed[0, 0] ^= 1
        return packed

    monkeypatch.setattr(gguf_quantize, "llama_cpp_quantizer", lambda: off_by_one)
    assert gguf_quantize.main(OPTIONS) == 1
    assert "NO" in capsys.readouterr().out


def test_without_llama_cpp_it_times_slothcore_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf_quantize, "find_spec", lambda name: None)
    assert gguf_quantize.main(OPTIONS) == 0
    printed = capsys.readouterr().out
    assert "Llama-3.1-8B, slothcore" in printed
    assert "Llama-3.1-8B, llama.cpp" not in printed


def test_estimates_add_up_the_tensors_of_each_kind() -> None:
    figures = [{"kind": kind, "rate": 1e9} for kind in PACKS]
    # All but norms and frequencies: 8.03 billion numbers, whatever the mixture.
    found = gguf_quantize.estimates(figures, "rate")
    assert found == "Q8_0 8.0 s, Q4_K_M 8.0 s, Q5_K_M 8.0 s, Q6_K 8.0 s"
    # Q6_K alone takes twice as long: in the mixtures, the head and two weights of 16 layers, 1.53 billion numbers.
    figures[-1]["rate"] = 0.5e9
    assert gguf_quantize.estimates(figures, "rate") == "Q8_0 8.0 s, Q4_K_M 9.6 s, Q5_K_M 9.6 s, Q6_K 16.1 s"
