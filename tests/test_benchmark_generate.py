"""The benchmark of writing on a tiny model: it runs, compares first tokens, and refuses what differs."""

import csv
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import generate, shapes
from benchmarks.writers import hf, slothcore_
from benchmarks.writing_cases import UNEQUAL, WritingCase

TINY = ["--tiny", "--device", "cpu", "--bits", "32", "--no-floor"]


def rows_in(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_slothcore_beside_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--systems", "slothcore,transformers", "--cases", f"2x8,16x6,{UNEQUAL}", "--new-tokens", "5"]
    folders = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "csv")]
    assert generate.main([*TINY, *options, *folders]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[:2] for row in cells] == [
        [case, system] for case in ("2x8", "16x6", UNEQUAL) for system in ("slothcore", "transformers")
    ]
    assert [row[-1] for row in cells] == ["2/2 equal", "-", "16/16 equal", "-", "8/8 equal", "-"]
    assert all(float(row[6].replace(",", "")) > 0 for row in cells)
    rows = rows_in(tmp_path / "csv")
    cases = ["2x8 first", "2x8 step", "16x6 first", "16x6 step", UNEQUAL]
    assert [(row["system"], row["case"]) for row in rows] == [
        (system, case) for system in ("slothcore", "transformers") for case in cases
    ]
    for row in rows:
        assert row["benchmark"] == "generate"
        assert float(row["median_ms"]) > 0
        assert (row["tokens_per_second"] == "") == row["case"].endswith("first")


def row(system: str, first_tokens: list[int], **other: Any) -> dict[str, Any]:
    tokens = [[token, 9] for token in first_tokens]
    figures = {"total_s": 2.0, "first_ms": 50.0, "step_ms": 10.0, "new_tokens": 64, "peak_gib": 7.0}
    return {"system": system, "case": "16x128", "tokens": tokens, **figures, **other}


def test_a_system_that_writes_something_else_is_refused(monkeypatch, tmp_path: Path, capsys) -> None:
    truth = list(range(16))
    near, far = [*truth[:8], *[99] * 8], [*truth[:7], *[99] * 9]
    for first_tokens, status in ((truth, 0), (near, 0), (far, 1)):
        rows = {"slothcore": row("slothcore", first_tokens), "transformers": row("transformers", truth)}
        monkeypatch.setattr(generate, "run_system", lambda system, args, rows=rows: [rows[system]])
        options = ["--systems", "slothcore,transformers", "--cases", "16x128", "--checkpoint", str(tmp_path / "model")]
        out = tmp_path / str(len(set(first_tokens)))
        assert generate.main([*TINY, *options, "--out", str(out)]) == status
        assert ("first tokens differ, 7 of 16 are equal" in capsys.readouterr().out) == bool(status)
        assert [r["system"] for r in rows_in(out)] == (["slothcore"] * 2 if not status else []) + ["transformers"] * 2


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="all systems are installed")
def test_a_system_that_fails_costs_its_own_rows(tmp_path: Path, capfd) -> None:
    options = ["--systems", "slothcore,unsloth", "--cases", "1x4", "--new-tokens", "2"]
    assert generate.main([*TINY, *options, "--checkpoint", str(tmp_path / "model")]) == 1
    out = capfd.readouterr().out
    assert "failed: exit status 1 ModuleNotFoundError" in out
    assert out.count("| 1x4") == 2


def test_the_floor_is_what_a_step_reads() -> None:
    """Llama-3.1-8B: 6.98e9 weights of layers in NF4 and a head of 0.53e9 in 16 bits."""
    case = WritingCase.parse("1x128", new_tokens=64)
    config = shapes.LLAMA_3_1_8B
    layers = 32 * (4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    head = 128256 * 4096
    factors = 32 * 16 * 2 * ((8192 + 2 * 5120 + 8192) + 3 * (4096 + 14336))
    cache = (128 + 32) * 32 * 2 * 8 * 128 * 2
    nf4 = layers / 2 + layers / 64 + layers / 64 / 256 * 4
    assert generate.step_bytes(config, case, 4, 16) == pytest.approx(nf4 + 2 * head + factors + cache, rel=1e-6)
    more = WritingCase.parse("16x128", new_tokens=64)
    added = generate.step_bytes(config, more, 16, 16) - generate.step_bytes(config, case, 16, 16)
    assert added == pytest.approx(15 * cache)


def test_cases() -> None:
    case = WritingCase.parse("3x20", new_tokens=7)
    assert (case.lengths, case.new_tokens, case.rows, case.longest) == ((20,) * 3, (7,) * 3, 3, 27)
    prompts = case.prompts(50, first_token=4)
    assert [len(prompt) for prompt in prompts] == [20] * 3
    assert all(4 <= token < 50 for prompt in prompts for token in prompt)
    assert prompts[0] != prompts[1]
    assert prompts == case.prompts(50, first_token=4)
    unequal = WritingCase.parse(UNEQUAL, new_tokens=7)
    assert unequal.rows == 128
    assert len(set(unequal.lengths)) > 60
    assert len(set(unequal.new_tokens)) > 60
    for wrong in ("8", "0x3", "ax3", "3x", "-1x3"):
        with pytest.raises(ValueError, match="a case is ROWSxLENGTH or unequal"):
            WritingCase.parse(wrong, new_tokens=7)
    with pytest.raises(SystemExit):
        generate.parse_arguments(["--systems", "nobody"])


def test_both_systems_cut_what_is_longer(tmp_path: Path) -> None:
    """Prompts of unequal length, each continued by as many tokens as it is to have; and the same ones by both."""
    from benchmarks import checkpoint
    from benchmarks.peers import Settings
    from benchmarks.worker import lora_factors, set_factors

    folder = checkpoint.write_checkpoint(tmp_path, shapes.TINY, device="cpu")
    settings = Settings(str(folder), 32, "no", 4, 64, "cpu")
    prompts, new_tokens = [[5, 6, 7], [8], [9] * 20, [10, 11]], [4, 9, 1, 6]
    written = []
    for system in (slothcore_, hf):
        model = system.load(settings)
        set_factors(lora_factors(model, layers=2))
        written.append(system.write(system.prepare(model, settings, rows=4, tokens=128), prompts, new_tokens))
    assert [len(row) for row in written[0]] == new_tokens
    assert written[0] == written[1]
    assert sys.modules.get("unsloth") is None
