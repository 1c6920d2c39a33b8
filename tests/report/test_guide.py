"""What docs/report.md tells a reader to type does what it says, and its pictures are there."""

import re
import shlex
from pathlib import Path

import pytest

from slothcore.cli import main
from slothcore.training.config import TrainConfig
from tests.report.made_up import write_run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"(?m)^    (slothcore .*)$", GUIDE)]
LARGEST_PICTURE = 200_000


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("r4", "r16", "ledger/run"):
        write_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [words for words in COMMANDS if words[1] == "report"], ids=" ".join)
def test_the_commands_write_the_pages_that_they_name(runs: Path, command: list[str], capsys) -> None:
    assert main(command[1:]) == 0
    page = command[-1] if command[-1].endswith(".html") else f"{command[-1]}/report.html"
    assert capsys.readouterr().out.split() == ["wrote", page]
    assert (runs / page).read_text().startswith("<!doctype html>")


def test_the_training_command_names_a_configuration_that_there_is() -> None:
    (command,) = (words for words in COMMANDS if words[1] == "train")
    assert TrainConfig.from_yaml(ROOT / command[-1]).output_dir == "runs/ledger/run"


def test_the_python_lines_run(runs: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(code, "report.md", "exec"), {})
    assert (runs / "compared.html").is_file()


def test_the_pictures_are_there_and_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\((.*?)\)", GUIDE)
    assert len(pictures) == 3
    for name in pictures:
        content = (ROOT / "docs" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < LARGEST_PICTURE
