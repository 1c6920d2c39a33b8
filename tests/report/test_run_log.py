"""The log as columns: read once, on from where it ended, whatever stands in it."""

import json
from pathlib import Path

import pytest

from slothcore.report import run_log
from slothcore.report.run_log import RunLog
from tests.report.made_up import add_lines, write_run


def test_columns_hold_what_was_logged(tmp_path: Path) -> None:
    log = RunLog(write_run(tmp_path, steps=30) / "log.jsonl")
    log.update()
    assert (log.lines, log.skipped) == (33, 0)
    assert log.columns["loss"].steps == list(range(1, 31))
    assert log.columns["tokens"].values == [1000.0 * step for step in range(1, 31)]
    assert log.columns["eval_loss"].steps == [10, 20, 30]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "lo\n',
        "null\n",
        "[1, 2]\n",
        "3\n",
        '{"loss": 1}\n',
        '{"step": "3", "loss": 1}\n',
        '{"step": true, "loss": 1}\n',
        '{"step": -1, "loss": 1}\n',
        '{"step": 1e9, "loss": 1}\n',
        "[" * 100_000 + "\n",
        "\x00\x01\n",
    ],
)
def test_a_line_that_is_no_record_is_skipped_and_counted(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path, steps=3)
    add_lines(folder, line, {"step": 4, "loss": 0.5})
    log = RunLog(folder / "log.jsonl")
    log.update()
    assert (log.lines, log.skipped) == (8, 1)
    assert log.columns["loss"].steps == [1, 2, 3, 4]


def test_bytes_that_are_no_utf8_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "\xff": 1}\n{"step": 2, "loss": 2}\n')
    log = RunLog(tmp_path / "log.jsonl")
    log.update()
    assert (log.lines, log.skipped, log.columns["loss"].steps) == (2, 1, [2])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null", '"1.0"', "true", "1" + "0" * 400, "[1]"])
def test_a_value_that_is_no_finite_number_is_left_out(tmp_path: Path, value: str) -> None:
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": {value}, "grad_norm": 2}}\n')
    log = RunLog(tmp_path / "log.jsonl")
    log.update()
    assert not log.columns["loss"]
    assert log.columns["grad_norm"].values == [2.0]


def test_each_line_is_parsed_once_however_often_the_log_is_read(tmp_path: Path, monkeypatch) -> None:
    folder, parsed = write_run(tmp_path, steps=30), []
    original = json.loads
    monkeypatch.setattr(run_log.json, "loads", lambda line: (parsed.append(line), original(line))[1])
    log = RunLog(folder / "log.jsonl")
    for step in range(31, 41):
        log.update()
        add_lines(folder, {"step": step, "loss": 1.0})
    log.update()
    assert len(parsed) == 33 + 10
    assert log.columns["loss"].steps == list(range(1, 41))


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.update()
    add_lines(tmp_path, '{"step": 1, "loss": 2}\n{"step": 2, "lo')
    log.update()
    assert (log.columns["loss"].steps, log.skipped, log.unfinished) == ([1], 0, 1)
    add_lines(tmp_path, 'ss": 3}\n')
    log.update()
    assert (log.columns["loss"].values, log.skipped, log.unfinished) == ([2.0, 3.0], 0, 0)


def test_a_log_that_was_rewound_is_read_anew(tmp_path: Path) -> None:
    log = RunLog(write_run(tmp_path, steps=30) / "log.jsonl")
    log.update()
    write_run(tmp_path, steps=9)
    log.update()
    assert (log.lines, log.columns["loss"].steps[-1]) == (12, 9)
    # As a resumed run does: another file in its place, longer than what was read of the first.
    longer = write_run(tmp_path / "other", steps=60) / "log.jsonl"
    longer.replace(tmp_path / "log.jsonl")
    log.update()
    assert (log.lines, log.columns["loss"].steps) == (63, list(range(1, 61)))
