"""The cases of the step benchmark: Alpaca's lengths, micro-batches, recomputation, memory limits, growth."""

import csv
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoint, floor, report, run, shapes, worker
from benchmarks.peers import Settings, peer, variants

TINY_OPTIONS = ("--tiny", "--device", "cpu", "--bits", "32")


def row(system: str, case: str, **other: Any) -> dict[str, Any]:
    """What a worker reports of one case."""
    milliseconds = other.pop("milliseconds", 10.0)
    return {
        "system": system,
        "case": case,
        "recompute": False,
        "median_ms": milliseconds,
        "tokens_per_second": 1e6 / milliseconds,
        "peak_gib": None,
        "losses": [6.0],
        "gradient_norms": [0.4],
        **other,
    }


def test_the_lengths_are_alpacas() -> None:
    every = [length for length, count in shapes.alpaca_lengths().items() for _ in range(count)]
    assert len(every) == 4000
    assert (round(statistics.mean(every)), statistics.median(every)) == (119, 103)
    case, micro_batch = shapes.parse_case("alpaca")
    assert (micro_batch, len(case.lengths(0)), case.longest) == (8, 8, max(every))
    assert case.lengths(3) == case.lengths(3) != case.lengths(4)
    drawn = [length for step in range(500) for length in case.lengths(step)]
    assert statistics.mean(drawn) == pytest.approx(119, rel=0.03)
    assert statistics.median(drawn) == pytest.approx(103, rel=0.03)


def test_a_case_names_its_micro_batch() -> None:
    assert shapes.parse_case("8x512/2") == (shapes.StepCase(8, 512), 2)
    assert shapes.parse_case("4x2048") == (shapes.StepCase(4, 2048), 4)
    assert shapes.parse_case("alpaca/2") == (shapes.AlpacaCase(), 2)
    assert variants("transformers", "alpaca") == ["alpaca/2", "alpaca"]
    assert variants("slothcore", "alpaca") == ["alpaca"]
    assert variants("unsloth", "4x2048") == ["4x2048"]


def test_real_tokens_are_counted() -> None:
    assert worker.tokens_per_second([100, 100, 100], [10.0, 90.0, 20.0]) == pytest.approx(5000)
    # 600 tokens in 200 ms: the slow step on a new length is not passed over.
    assert worker.tokens_per_second([100, 200, 300], [10.0, 170.0, 20.0]) == pytest.approx(3000)


def test_the_tokens_do_not_depend_on_how_they_are_asked_for() -> None:
    case = shapes.StepCase(3, 5)
    rows = worker.random_batch(case, 7, 512)
    assert rows.shape == (3, 5)
    assert torch.equal(rows, torch.stack(worker.random_sequences([5, 5, 5], 7, 512)))
    assert not torch.equal(rows, worker.random_batch(case, 8, 512))


def test_peers_pad_on_the_right_and_leave_padding_out_of_the_loss() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks.peers.hf import padded

    batch = padded([torch.tensor([7, 8, 9]), torch.tensor([5])])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 2, 2]]
    assert batch["labels"].tolist() == [[7, 8, 9], [5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in padded([torch.tensor([7, 8]), torch.tensor([5, 6])])


@pytest.mark.parametrize("system", ["slothcore", "transformers"])
def test_micro_batches_change_neither_loss_nor_gradient(tmp_path: Path, system: str) -> None:
    if system == "transformers":
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    checkpoint.write_checkpoint(tmp_path, shapes.TINY, device="cpu")
    settings = Settings(str(tmp_path), 32, False, 4, longest=1024, device="cpu")
    model = peer(system).load(settings)
    factors = worker.lora_factors(model, layers=shapes.TINY["num_hidden_layers"])
    whole, halved = (
        worker.time_steps(
            peer(system),
            model,
            factors,
            settings,
            shapes.AlpacaCase(),
            micro_batch=micro_batch,
            warmup=0,
            steps=2,
            vocab_size=shapes.TINY["vocab_size"],
        )
        for micro_batch in (8, 2)
    )
    assert halved["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert halved["gradient_norms"] == pytest.approx(whole["gradient_norms"], rel=1e-4)


def test_alpaca_beside_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All ways of running the case, with and without recomputation: one loss, gradient norm and count of tokens."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    options = ["--cases", "alpaca", "--recompute", "both", "--compare", "--warmup", "1", "--steps", "1", *TINY_OPTIONS]
    folders = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "csv")]
    status = run.main(["--systems", "slothcore,transformers", *options, *folders])
    output = capsys.readouterr()
    assert status == 0, output.err + output.out
    with (tmp_path / "csv" / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(r["system"], r["case"], r["settings"].rpartition("=")[2]) for r in rows]
    assert found == [
        ("slothcore", "alpaca", "no"),
        ("slothcore", "alpaca", "yes"),
        *[("transformers", case, recompute) for recompute in ("no", "yes") for case in ("alpaca/2", "alpaca")],
    ]
    tokens = sum(shapes.AlpacaCase().lengths(1))
    for r in rows:
        assert float(r["first_loss"]) == pytest.approx(float(rows[0]["first_loss"]), rel=1e-5)
        assert float(r["gradient_norm"]) == pytest.approx(float(rows[0]["gradient_norm"]), rel=1e-4)
        assert float(r["tokens_per_second"]) * float(r["median_ms"]) == pytest.approx(1e3 * tokens, rel=1e-4)
        assert (r["fraction_of_floor"] != "") == (r["system"] == "slothcore")
    assert "floor of alpaca: " in output.out
    assert output.out.count(" first |") == len(rows), "nothing has landed in this folder yet"


def test_each_way_is_judged_by_the_plain_mean() -> None:
    """A sum of means over micro-batches is four times the loss."""
    rows = [row("transformers", "alpaca/2", losses=[24.0]), row("transformers", "alpaca"), row("slothcore", "alpaca")]
    report.judge(rows)
    assert [r.get("problem", "") for r in rows] == ["refused: first loss 24.0000, transformers has 6.0000", "", ""]
    rows = [row("transformers", "alpaca/2"), row("slothcore", "alpaca", losses=[6.5])]
    report.judge(rows)
    assert "transformers has 6.0000" in rows[1]["problem"], "without the whole batch, micro-batches are the reference"


def test_recomputation_is_run_in_addition_or_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], bool]] = []

    def run_system(system: str, cases: list[str], settings: Settings, args: object) -> list[dict[str, Any]]:
        calls.append((cases, settings.recompute))
        big = {} if settings.recompute else {"problem": run.OUT_OF_MEMORY}
        return [row(system, case, recompute=settings.recompute, **(big if "64" in case else {})) for case in cases]

    monkeypatch.setattr(run, "run_system", run_system)
    for chosen, expected in {
        "no": [(["2x8", "2x64"], False), (["2x64"], True)],
        "yes": [(["2x8", "2x64"], True)],
        "both": [(["2x8", "2x64"], False), (["2x8", "2x64"], True)],
    }.items():
        calls.clear()
        args = run.parse_arguments(["--cases", "2x8,2x64", "--recompute", chosen, *TINY_OPTIONS])
        run.run_round("slothcore", [], args)
        assert calls == expected, chosen
    # The bare option is a yes.
    assert run.parse_arguments(["--recompute", *TINY_OPTIONS]).recompute == "yes"


def test_rows_over_a_memory_limit_are_remarked_upon() -> None:
    rows = [
        row("slothcore", "4x64", milliseconds=5.0, peak_gib=33.0),
        row("slothcore", "4x64", milliseconds=8.0, peak_gib=7.7, recompute=True),
        row("unsloth", "4x64", milliseconds=10.0, peak_gib=7.8, recompute=True),
        row("transformers", "4x64", milliseconds=20.0, peak_gib=26.4),
    ]
    report.judge(rows)
    report.mark_limits(rows, [7.8, 30.0])
    text = report.table(rows)
    assert "slothcore 4x64: 33.00 GiB, over the limit of 7.8 and 30" in text
    assert "transformers 4x64: 26.40 GiB, over the limit of 7.8\n" in text + "\n"
    assert "unsloth 4x64, recompute: " not in text
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.limits_table(rows, [7.8, 36.0]).split("\n")
    ]
    assert lines[2:] == [
        ["4x64", "7.8", "slothcore", "4x64", "yes", "125,000", "7.70", "1.00"],
        ["4x64", "7.8", "unsloth", "4x64", "yes", "100,000", "7.80", "0.80"],
        ["4x64", "7.8", "transformers", "none", "-", "-", "-", "-"],
        ["4x64", "36", "slothcore", "4x64", "no", "200,000", "33.00", "1.00"],
        ["4x64", "36", "unsloth", "4x64", "yes", "100,000", "7.80", "0.50"],
        ["4x64", "36", "transformers", "4x64", "no", "50,000", "26.40", "0.25"],
    ]
    assert "no row has a peak" in report.limits_table([row("slothcore", "4x64")], [7.8])


def test_every_way_is_timed_against_the_fastest_of_slothcore() -> None:
    rows = [
        row("slothcore", "alpaca", milliseconds=20.0, recompute=True),
        row("slothcore", "alpaca", milliseconds=10.0),
        row("transformers", "alpaca/2", milliseconds=40.0),
    ]
    report.judge(rows)
    ratios = [line.split("|")[-2].strip() for line in report.table(rows).splitlines()[2:5]]
    assert ratios == ["2.00", "1.00", "4.00"]


def test_growth_is_slothcore_alone_in_two_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--growth", "--warmup", "0", "--steps", "1", *TINY_OPTIONS, "--checkpoint", str(tmp_path / "model")]
    assert run.main(options) == 0
    printed = capsys.readouterr().out.split("| case ")
    first, second = ([line.split("|")[1:4] for line in part.splitlines()[2:] if line] for part in printed[-2:])
    assert [int(tokens.replace(",", "")) for _, tokens, _ in first] == [16 * 2**i for i in range(7)]
    assert [int(documents) for _, _, documents in first] == [2**i for i in range(7)]
    assert {tokens.strip() for _, tokens, _ in second} == {"128"}
    assert [int(documents) for _, _, documents in second] == [1, 2, 4, 8, 16]
    assert shapes.growth_cases(1024)[0][-1] == "64x1024"
    assert shapes.growth_cases(1024)[1] == ["1x8192", "2x4096", "4x2048", "8x1024", "16x512"]


def test_growth_shows_what_failed() -> None:
    rows = [
        row("slothcore", "1x16", floor_ms=8.0),
        row("slothcore", "2x16", problem=run.OUT_OF_MEMORY),
        row("slothcore", "2x16", recompute=True, milliseconds=25.0),
        row("slothcore", "4x16", problem="failed: exit status 1"),
    ]
    lines = report.growth_table(rows, [["1x16", "2x16", "4x16", "8x16"]]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["1x16", "16", "1", "no", "10.0", "100,000", "10.0", "1.25", "-"]
    assert cells[1][:5] == ["2x16", "32", "2", "yes", "25.0"]
    assert [line[-1] for line in cells[2:]] == ["failed", "not run"]


def test_step_over_floor_is_printed_and_a_missing_floor_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run_system", lambda system, cases, settings, args: [row(system, case) for case in cases])
    found = floor.Floor(1.0, 1.0, 2.0, 2.0, 2.0, "varlen_attn, slothcore")
    for floors, problem in (({"2x8": found}, ""), ({}, "failed: exit status 1")):
        monkeypatch.setattr(run, "measure_floors", lambda args, result=(floors, problem): result)
        options = ["--systems", "slothcore", "--cases", "2x8", "--checkpoint", str(tmp_path / "model")]
        assert run.main([*options, *TINY_OPTIONS]) == 0
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if line.startswith("| slothcore")]
        assert line.split("|")[-3].strip() == ("-" if problem else "1.25")
        wanted = "floor: failed" if problem else "floor of 2x8: 8.0 ms = products 1.0 + 1.0, attention 2.0 + 2.0"
        assert wanted in printed
