"""The moving line: what it leaves out where there is little room, and how long it says that things take."""

import errno
import io
import re
import sys
from pathlib import Path

import pytest

from slothcore.training.progress import SHORTEST_BAR, TimeLeft, figures_of, in_words, line_of, say
from tests.pseudo_terminal import CONTROL, CTRL_C, PseudoTerminal
from tests.training.tiny import write_model, write_records

RECORD = {"step": 43, "loss": 1.25, "tokens_per_second": 12345.6, "memory_gib": 7.06, "skipped_steps": 2}
FIGURES = figures_of(RECORD)
WHOLE = " 43%  {bar}  step 43/100  loss 1.2500  12,346 tokens/s  12 min left  7.1 GiB  2 skipped"


def test_a_wide_terminal_shows_everything() -> None:
    line = line_of(43, 100, FIGURES, 720.0, width=200)
    bar = re.search(r"  (\S.*?)  step", line)[1]
    assert line == WHOLE.format(bar=bar)
    assert 0.35 < bar.count("█") / len(bar) < 0.45
    assert "#" in line_of(43, 100, FIGURES, 720.0, width=200, is_ascii=True)


@pytest.mark.parametrize("width", range(1, 140))
def test_every_width_is_kept_to_and_the_least_wanted_goes_first(width: int) -> None:
    line = line_of(43, 100, FIGURES, 720.0, width=width)
    assert 0 < len(line) <= max(1, width - 1)
    kinds = [*FIGURES.values(), "12 min left", "43%"]
    present = {kind for kind in kinds if kind in line}
    wider = {kind for kind in kinds if kind in line_of(43, 100, FIGURES, 720.0, width=width + 1)}
    assert present <= wider
    for least, most in (("GiB", "loss"), ("skipped", "tokens/s"), ("tokens/s", "left"), ("43%", "left")):
        assert least not in line or most in line
    if width > len("step 43/100"):
        assert "step 43/100" in line, "how far it is stands there as long as it fits"
    has_bar = "|" not in line and "█" in line
    assert has_bar == (width - 1 >= len(WHOLE.format(bar="")) + SHORTEST_BAR)


def test_characters_that_an_output_lacks_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script's on Windows, or under an old locale; the command line sees to its own output."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="latin-1"))
    say("step 3: 'caf\u00e9' -> '\u65e5\U0001f9a5'")
    assert output.getvalue() == b"step 3: 'caf\xe9' -> '\\u65e5\\U0001f9a5'\n"


def test_an_output_that_takes_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a terminal that has been closed, or a full disk below the file that it goes to."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    say("saved run/adapter")


def test_before_the_first_figures_and_at_the_end() -> None:
    assert line_of(0, 9, {}, None, width=40).endswith("step 0/9")
    assert "left" not in line_of(9, 9, FIGURES, 0.0, width=200)
    assert line_of(9, 9, {}, None, width=60).startswith("100%")


def test_a_cpu_says_its_own_memory() -> None:
    assert figures_of({"loss": 1.0, "tokens_per_second": 5.0, "host_memory_gib": 0.44})["memory"] == "0.4 GiB"
    assert set(figures_of({"loss": 1.0, "tokens_per_second": 5.0})) == {"loss", "speed"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3600, "60 min"),
        (99 * 60, "99 min"),
        (100 * 60, "1 h 40 min"),
        (7200, "2 h"),
        (12_000, "3 h 20 min"),
        (47.9 * 3600, "2 d"),
        (50 * 3600, "2 d 2 h"),
        (72 * 3600, "3 d"),
    ],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_left_counts_this_process_and_its_pauses() -> None:
    clock = Clock()
    left = TimeLeft(400, 1000, clock)
    assert left.at(400) is None, "nothing is known yet"
    clock.now += 10  # 10 steps of a second each; the 400 before took who knows what
    assert left.at(410) == pytest.approx(590)
    clock.now += 90
    assert left.at(500) == pytest.approx(500)
    clock.now += 50  # an evaluation, of which there will be five more
    assert left.at(500) == pytest.approx(500 + 5 * 50)
    clock.now += 100
    assert left.at(600) == pytest.approx(250 / 200 * 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    write_model(folder / "model")
    write_records(folder / "data.jsonl")
    return folder


def words(folder: Path, output_dir: Path, *more: str) -> list[str]:
    options = "--bits 32 --device cpu --r 4 --logging-steps 1 --plot no --report no --max-seq-length 64"
    data = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--output-dir", str(output_dir)]
    return ["train", *data, *options.split(), *more]


def drawn(seen: str) -> list[str]:
    """Every state of the moving line."""
    return [line.strip() for line in re.split(r"[\r\n]+", CONTROL.sub("", seen)) if "step " in line and "/" in line]


@pytest.mark.parametrize("columns", [24, 36, 80, 150])
def test_at_a_terminal_of_any_width_one_line_moves(columns: int, folder: Path, tmp_path: Path) -> None:
    with PseudoTerminal(
        words(folder, tmp_path / "run", "--max-steps", "12", "--eval-fraction", "0.2", "--eval-steps", "4"),
        columns=columns,
    ) as terminal:
        assert terminal.finish() == 0
    lines = [line for line in drawn(terminal.seen) if re.search(r"step \d+/12", line) and "evaluation" not in line]
    assert max(map(len, lines)) < columns
    assert lines[-1].count("step 12/12") == 1
    assert any("loss " in line for line in lines)
    assert ("tokens/s" in lines[-1]) == (columns >= 80)
    # Drawn over itself: the evaluations, the saving and what stands before and behind are lines of their own.
    moves = [part for part in terminal.seen.split("\n") if re.search(r"step \d+/12", part) and "evaluation" not in part]
    assert len(moves) <= 5


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    """Typed at a terminal; and the command that is named goes on to the end, with a line that counts from there."""
    run = tmp_path / "run"
    with PseudoTerminal(words(folder, run, "--max-steps", "100000"), columns=120) as terminal:
        terminal.expect("tokens/s")
        terminal.send(CTRL_C)
        terminal.expect("stopping after this step; Ctrl-C again stops at once, without a checkpoint")
        terminal.expect("interrupted after step ")
        step = int(terminal.expect("; saved "))
        command = re.search(r"Go on with: slothcore (.*)", CONTROL.sub("", terminal.expect("latest") + "latest"))[1]
        assert terminal.finish() == 130
    assert (run / f"checkpoint-{step}" / "state.json").is_file()
    assert "Traceback" not in terminal.seen
    total = step + 6
    with PseudoTerminal([*command.split(), "--max-steps", str(total)], columns=120) as terminal:
        assert terminal.finish() == 0
    lines = [line for line in drawn(terminal.seen) if f"/{total}" in line]
    assert f"step {step}/{total}" in lines[0]
    assert f"step {total}/{total}" in lines[-1]
    left = [int(text) for line in lines for text in re.findall(r"(\d+) s left", line)]
    assert left
    assert max(left) < 60, "six steps of milliseconds, whatever was done before"
