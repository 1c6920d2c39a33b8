"""The README's tables come from the code, and its first Python example runs."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from slothcore.cli import COMMANDS, build_parser, main
from slothcore.training.report import read_log
from tests.guides import serving
from tests.training.tiny import write_model, write_records

ROOT = Path(__file__).resolve().parents[1]


def test_generated_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/update_readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def code_blocks(language: str) -> list[str]:
    """The fenced blocks of README.md in a language, and the indented ones, each as one text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if language:
        return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)
    return [re.sub(r"(?m)^    ", "", block) for block in re.findall(r"(?:^    .*\n)+", readme, re.MULTILINE)]


def test_the_first_lines_run(tmp_path, monkeypatch, capsys) -> None:
    """As they stand, but for the name of the model, and fewer steps."""
    write_model(tmp_path / "model", max_position_embeddings=2048)
    write_records(tmp_path / "data.jsonl")
    code = code_blocks("python")[0]
    for old, new in (("meta-llama/Llama-3.1-8B", "model"), ("max_steps=200", "max_steps=2")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert (tmp_path / "run" / "log.jsonl").is_file()


def commands() -> list[str]:
    return [line for block in code_blocks("") for line in block.splitlines() if line.startswith("slothcore ")]


def test_every_command_is_one_that_the_program_knows() -> None:
    assert {line.split()[1] for line in commands()} == set(COMMANDS)
    for line in commands():
        assert build_parser().parse_known_args(shlex.split(line, comments=True)[1:])[1] == [], line


def test_the_commands_run(tmp_path, monkeypatch, capsys) -> None:
    """One after the other as they stand, but for the name of the model, and fewer steps."""
    write_model(tmp_path / "model", max_position_embeddings=2048)
    write_records(tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n/quit\n")))
    for line in commands():
        line = line.replace("meta-llama/Llama-3.1-8B", "model")
        line = line.replace("--max-steps 200", "--max-steps 2").replace("--max-steps 300", "--max-steps 3")
        if line.startswith("slothcore serve"):
            with serving(line) as shown:
                assert "serving run at http://127.0.0.1:" in shown
            continue
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
        assert capsys.readouterr().out, line
    losses = [[line.get("loss") for line in read_log(tmp_path / run / "log.jsonl")] for run in ("run", "run-again")]
    assert losses[0][0] == losses[1][0]
    assert (tmp_path / "compared.html").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()


def test_every_relative_link_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is absent"
