"""The export benchmark on a small model: every case is exported, checked, timed, recorded and removed."""

import csv
from pathlib import Path

import pytest

from benchmarks import export
from slothcore.export.formats import FORMATS


def test_it_times_prints_and_records(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cases = ["merged", "merged:original", "merged-4bit", "adapter"]
    options = ["--gigabytes", "0.02", "--device", "cpu", "--folder", str(tmp_path), "--formats", *cases]
    assert export.main([*options, "--out", str(tmp_path / "csv")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["csv"], "what was written is removed"
    printed = capfd.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[-4:]] == cases
    assert sum("read back" in line for line in printed) == len(cases)
    with (tmp_path / "csv" / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["benchmark"] == "export"
        assert float(row["median_ms"]) > 0
        assert float(row["rate"].removesuffix(" GB/s")) > 0
        assert float(row["fraction_of_floor"]) > 0


def test_a_case_that_fails_costs_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--gigabytes", "0.02", "--device", "cpu", "--folder", str(tmp_path), "--no-check"]
    assert export.main([*options, "--formats", "merged:int8", "merged"]) == 1
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1].startswith("| merged |")
    assert "dtype must be one of bfloat16, float16, float32 for the format merged" in printed.err
    assert printed.err.splitlines()[-1] == "failed, as said above: merged:int8"
    assert list(tmp_path.iterdir()) == []


def test_a_bare_write_leaves_nothing(tmp_path: Path) -> None:
    assert export.timed_write(tmp_path / "bare", 2 * export.PIECE_BYTES + 5) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("megabytes", [16, 200])
def test_the_peak_of_memory_is_that_of_the_call(megabytes: int) -> None:
    """Though as much was in use before, small and large, and has been freed."""

    def fill() -> int:
        return sum(len(piece) for piece in [bytearray(b"x") * 2**16 for _ in range(megabytes * 16)])

    kept = bytearray(b"x") * (50 * 2**20)
    fill()
    found, seconds, peak = export.measured(fill)
    assert found == megabytes * 2**20
    assert seconds > 0
    # The system counts in steps of some pages a thread.
    assert -(2**20) < peak - found < 8 * 2**20
    assert export.measured(lambda: None)[2] < 2**20
    del kept


def test_cases_are_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert {case.partition(":")[0] for case in export.CASES} <= FORMATS.keys()
    with pytest.raises(SystemExit):
        export.parse_arguments(["--formats", "gif"])
    assert "gif is no format; there are merged" in capsys.readouterr().err
