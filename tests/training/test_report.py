"""What a run says: a bar in a terminal, lines elsewhere, and a clock that counts training alone."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from slothcore.training.report import Meter, Report

CPU = torch.device("cpu")
RECORD = {"step": 3, "loss": 1.25, "tokens_per_second": 1234.4, "elapsed": 6.0}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_the_clock_stands_still_while_the_meter_is_entered(clock: Clock) -> None:
    meter = Meter(CPU, window_loss=0.0, window_steps=0, elapsed=50.0)
    clock.now += 10
    meter.add(torch.tensor(2.0), 300)
    with meter:
        clock.now += 1000
        assert meter.elapsed() == 60.0, "what a checkpoint stores"
    clock.now += 5
    assert meter.elapsed() == 65.0
    assert meter.tokens_per_second() == 300 / 15


def reported(folder: Path, **options) -> None:
    with Report(folder, step=2, total_steps=9, device=CPU, disable_tqdm=False, **options) as report:
        report.advance()
        report.log(RECORD)
        report.log({"step": 3, "eval_loss": 2.5, "eval_perplexity": None})


def test_outside_of_a_terminal_each_line_of_the_log_is_said(tmp_path: Path, capsys) -> None:
    reported(tmp_path)
    out, err = capsys.readouterr()
    assert err == "", "a bar would fill the file that the output goes to"
    assert out.splitlines() == [
        "step 3/9: loss 1.2500, tokens/s 1234, 00:12 left",
        "step 3: evaluation loss 2.5000, perplexity infinite",
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0]) == RECORD


def test_in_a_terminal_there_is_a_bar(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reported(tmp_path)
    out, err = capsys.readouterr()
    assert "training" in err
    assert "loss=1.2500" in err
    assert "step 3/9" not in out
