"""What becomes of landed figures: their comparison, and the chart."""

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks import chart, compare, harness, plan, run


def figure(**other: str) -> dict[str, str]:
    """A row of the CSV."""
    values = {
        "date": "2026-11-01",
        "commit": "abc",
        "gpu": "NVIDIA H100",
        "torch": "2.11",
        "triton": "3.6",
        "benchmark": "step",
        "system": "slothcore",
        "case": "4x2048",
        "settings": "bits=4 r=16 layers=32 tiny=False recompute=no",
        "median_ms": "500",
        "tokens_per_second": "16384",
        "peak_gib": "33",
    }
    return dict.fromkeys(harness.CSV_FIELDS, "") | values | other


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_a_figure_is_compared_with_the_last_of_its_kind() -> None:
    old = [
        figure(median_ms="900"),
        figure(median_ms="500", commit="def"),
        figure(gpu="NVIDIA H200", median_ms="400"),
        figure(system="unsloth", median_ms="550"),
        figure(settings="bits=16", median_ms="450"),
        figure(case="2x256", median_ms="120", peak_gib="8"),
    ]
    new = [
        figure(median_ms="540", torch="2.12"),
        figure(case="2x256", median_ms="100", peak_gib="8.1"),
        figure(case="alpaca"),
        figure(gpu="NVIDIA A100"),
    ]
    lines = cells(compare.table(compare.pairs(new, old)))
    assert lines[0][2:] == ["2026-11-01 def torch 2.11", "500", "540", "+8.0%", "33", "33", "+0.0%", "SLOWER"]
    assert lines[1][3:] == ["120", "100", "-16.7%", "8", "8.1", "+1.2%", "faster"]
    assert [line[-1] for line in lines[2:]] == ["first", "first"], "another GPU's figure is no earlier one"


def test_what_is_remarkable() -> None:
    assert compare.verdict(0.04, 0.2, 0.001) == "MORE MEMORY"
    assert compare.verdict(-0.2, -0.2, -0.01) == "faster, less memory, OTHER LOSS"
    assert compare.verdict(0.0, 0.0, float("nan")) == "OTHER LOSS"
    assert compare.verdict(None, None, None) == ""


def test_memory_and_loss_are_compared_where_they_were_measured() -> None:
    found = [(figure(first_loss="12.7"), figure(first_loss="12.5")), (figure(first_loss="12.7"), figure())]
    assert [line[-1] for line in cells(compare.table(found))] == ["OTHER LOSS", ""]
    now, before = figure(peak_gib=""), figure(peak_gib="")
    assert cells(compare.table([(now, before)]))[0][6:] == ["-", "-", "-", ""]


def test_results_are_compared_with_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.csv"
    rows = [figure(), figure(gpu="NVIDIA H200"), figure(median_ms="450", commit="def"), figure(case="alpaca")]
    lines = [",".join(harness.CSV_FIELDS), *(",".join(row[name] for name in harness.CSV_FIELDS) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert compare.main([str(path)]) == 0
    first, second = capsys.readouterr().out.split("NVIDIA ")[1:]
    assert first.startswith("H100\n")
    assert first.count("| step slothcore") == 1
    assert "-10.0%" in first
    assert second.startswith("H200: every figure landed once")


def test_a_run_is_compared_before_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter((10.0, 12.0))

    def run_system(job: plan.Job, args: object, journal: harness.Journal) -> list[dict]:
        values = {"median_ms": next(times), "tokens_per_second": 1.0, "peak_gib": None}
        return [
            {"system": job.system, "losses": [6.0], "gradient_norms": [1.0], **dataclasses.asdict(run), **values}
            for run in job.runs
        ]

    monkeypatch.setattr(run, "run_system", run_system)
    monkeypatch.setattr(run, "measure_floors", lambda args, bits: ({}, ""))
    options = ["--systems", "slothcore", "--cases", "2x8", "--tiny", "--device", "cpu", "--compare"]
    folders = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "csv")]
    verdicts = []
    for _ in range(2):
        assert run.main([*options, *folders]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| step slothcore 2x8")]
        verdicts.append(cells(f"\n\n{line}")[0])
    assert verdicts[0][-1] == "first"
    assert (verdicts[1][5], verdicts[1][-1]) == ("+20.0%", "SLOWER")


def test_the_title_says_what_was_trained() -> None:
    assert chart.title_of(figure()).startswith(
        "One LoRA training step: Llama-3.1-8B's shape, 32 layers, r=16 on all seven linears\nNVIDIA H100, 2026-11-01"
    )
    assert "a tiny Llama, 2 layers" in chart.title_of(figure(settings="bits=16 r=4 layers=2 tiny=True recompute=no"))
    assert chart.panel_title(figure()) == "4 x 2048 tokens, NF4: tokens/s (GiB)"
    alpaca = figure(case="alpaca/2", settings="bits=16 r=16 layers=32 tiny=False recompute=no")
    assert chart.panel_title(alpaca) == "8 sequences of Alpaca's lengths, bfloat16: tokens/s (GiB)"


def test_the_chart_shows_every_bar_of_a_step_in_one_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = [
        figure(),
        figure(settings="bits=4 recompute=mlp decoded=32 graphs=no", tokens_per_second="9000"),
        figure(system="transformers", case="alpaca/2", tokens_per_second="300", peak_gib=""),
    ]
    path = tmp_path / "chart.png"
    assert chart.draw(figures, path, title="t") == f"drew {path}"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    # One bar less in the same panel, and one panel less: both make the picture lower.
    heights = []
    for fewer in (figures, figures[1:], figures[:1]):
        chart.draw(fewer, path, title="t")
        heights.append(int.from_bytes(path.read_bytes()[20:24], "big"))
    assert heights[0] > heights[1] > heights[2]
    assert [chart.bar_label(row) for row in figures] == [
        "slothcore",
        "slothcore, recompute gate and up, decoded weights kept, no graphs",
        "transformers, 2 at a time",
    ]
    labels = [chart.value_label(row, figures[0]) for row in figures]
    assert labels == ["16,384  (33.0 GiB)", "9,000  (33.0 GiB)  1/1.8", "300  1/54.6"]


def test_without_matplotlib_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = chart.draw([figure()], tmp_path / "chart.png", title="t")
    assert "pip install 'slothcore[plots]'" in said
    assert not (tmp_path / "chart.png").exists()


def test_a_chart_of_results_takes_the_last_figures_of_one_commit() -> None:
    rows = [
        figure(commit="old"),
        figure(commit="new", median_ms="480"),
        figure(commit="new", median_ms="470"),
        figure(commit="new", system="unsloth"),
        figure(commit="new", case="1x1024"),
        figure(commit="new", settings="bits=16 r=16 layers=32 tiny=False recompute=no"),
        figure(commit="new", settings="bits=4 r=16 layers=2 tiny=True recompute=no"),
        figure(commit="newer", benchmark="loading"),
    ]
    found = chart.of_commit(rows, None)
    assert [(row["system"], row["median_ms"]) for row in found] == [("slothcore", "470"), ("unsloth", "500")]
    assert [row["commit"] for row in chart.of_commit(rows, "old")] == ["old"], "nobody to compare with"
    assert chart.of_commit(rows, "older") == []
    assert len(chart.of_commit(rows, "new", tiny=True)) == 1
    assert chart.path_beside(Path("results/h100.csv")) == Path("results/h100-step.png")


def test_no_chart_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.csv"
    path.write_text(",".join(harness.CSV_FIELDS) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        chart.main([str(path), "--commit", "abc"])
    assert "has no step of abc" in capsys.readouterr().err
    assert "no figure" in chart.draw_commit(path, None)


def test_a_journal_keeps_rows_at_once_and_puts_the_last_word_in_their_place(tmp_path: Path) -> None:
    harness.append_csv(tmp_path, [{"system": "earlier", "median_ms": "1"}])
    journal = harness.Journal(tmp_path)
    journal.add([{"system": "a", "median_ms": "1"}, {"system": "b", "median_ms": "2"}])
    journal.add([{"system": "earlier", "median_ms": "1"}])

    def systems() -> list[str]:
        return [row["system"] for row in compare.read([journal.path])]

    assert systems() == ["earlier", "a", "b", "earlier"], "there even if nothing more comes"
    assert len(journal.lines) == 3
    journal.settle([{"system": "b", "median_ms": "2", "fraction_of_floor": "0.9"}])
    assert systems() == ["earlier", "b"]
    assert compare.read([journal.path])[1]["fraction_of_floor"] == "0.9"
    assert journal.path.read_text(encoding="utf-8").startswith("date,commit,")
