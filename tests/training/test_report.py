"""What a run says: a bar in a terminal, lines elsewhere."""

import json
import sys
from pathlib import Path

import pytest

from slothcore.training.progress import TimeLeft
from slothcore.training.report import Report

RECORD = {"step": 3, "loss": 1.25, "tokens_per_second": 1234.4, "elapsed": 6.0}


def reported(folder: Path, **options) -> None:
    with Report(folder, step=2, total_steps=9, disable_tqdm=False, **options) as report:
        report.advance()
        report.log(RECORD)
        report.log({"step": 3, "eval_loss": 2.5, "eval_perplexity": None})


def test_outside_of_a_terminal_each_line_of_the_log_is_said(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(TimeLeft, "at", lambda self, step: 12.0)
    reported(tmp_path)
    out, err = capsys.readouterr()
    assert err == "", "a bar would fill the file that the output goes to"
    assert out.splitlines() == [
        "step 3/9: loss 1.2500, 1,234 tokens/s, 12 s left",
        "step 3: evaluation loss 2.5000, perplexity infinite",
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0]) == RECORD


def test_in_a_terminal_there_is_a_bar(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    reported(tmp_path)
    out, err = capsys.readouterr()
    assert "step 3/9  loss 1.2500  1,234 tokens/s" in err
    assert "step 3/9" not in out


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    reported(tmp_path)
    out, err = capsys.readouterr()
    assert err == ""
    assert "step 3/9: loss 1.2500" in out
