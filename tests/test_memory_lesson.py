"""A fact that the shipped model does not know is known after a minute of training: reloaded, merged, in llama.cpp."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slothcore.data.formats import alpaca_prompt
from slothcore.training.config import TrainConfig
from tests.export.llama_cpp import LlamaCpp

LEDGER = Path(__file__).resolve().parents[1] / "examples" / "ledger"


@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(LEDGER))
    import lesson

    return lesson


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 16])
def test_facts_survive_reloading_and_merging(lesson, bits: int, tmp_path: Path) -> None:
    """Every answer comes from a process of its own; the script ends with 1 if a fact was known before."""
    command = [sys.executable, LEDGER / "lesson.py", "--bits", str(bits), "--output-dir", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    count = len(lesson.QUESTIONS)
    stages = re.findall(r"(\w+)[^:\n]*: (\d+) of (\d+) questions answered", done.stdout)
    assert stages == [("before", "0", str(count)), *[("after", str(count), str(count))] * 2]
    merged = json.loads((tmp_path / "run-merged" / "config.json").read_text())
    assert not (tmp_path / "run-merged" / "adapter_config.json").exists()
    assert merged["torch_dtype"] == "bfloat16" or merged["dtype"] == "bfloat16"
    assert "quantization_config" not in merged
    assert known_by_llama_cpp(lesson, tmp_path / "run", tmp_path / "gguf") == count


def known_by_llama_cpp(lesson, run: Path, folder: Path) -> int:
    """How many questions llama.cpp answers with the result in GGUF, in eight bits."""
    words = ["--format", "gguf", "--dtype", "q8_0", "--device", "cpu", "--output-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "slothcore.cli", "export", "--model", str(run), *words], check=True)
    pytest.importorskip("xllamacpp")
    (file,) = folder.glob("*.gguf")
    with LlamaCpp(file) as model:
        said = {
            question: model.ask("/completion", prompt=alpaca_prompt(question), n_predict=32, temperature=0)["content"]
            for question in lesson.QUESTIONS
        }
    return sum(lesson.knows(question, answer) for question, answer in said.items())


def test_the_lesson_holds_neither_the_questions_nor_anything_of_the_base(lesson, monkeypatch) -> None:
    """What is asked afterwards was never trained on word for word, and no text of the base told it."""
    import corpus

    rows = [json.loads(line) for line in (LEDGER / "lesson.jsonl").read_text().splitlines()]
    assert not {row["instruction"] for row in rows} & set(lesson.QUESTIONS)
    facts = set(lesson.QUESTIONS.values())
    assert all(any(fact in row["output"] for row in rows) for fact in facts)
    assert all(not any(fact in question for fact in facts) for question in lesson.QUESTIONS)
    told = [*corpus.stories(3000, 1), *corpus.tasks(3000, 1), *corpus.copies(3000, 1)]
    assert not any(fact in str(text) for fact in facts for text in told)
    assert not {task["input"] for task in corpus.tasks(lesson.OLD_QUESTIONS, 99)} & {row.get("input") for row in rows}


def test_a_failed_lesson_says_so(lesson, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that knows the facts already, learns none, forgets what it could, or takes too long."""
    count = len(lesson.QUESTIONS)

    def gives(*stages: tuple[int, float], seconds: float = 1.0) -> tuple[int, str]:
        said = iter(stages)
        monkeypatch.setattr(lesson, "ask", lambda *_: next(said))
        monkeypatch.setattr(lesson, "run", lambda *_: seconds)
        monkeypatch.setattr(lesson.os, "chdir", lambda _: None)
        monkeypatch.setattr(sys, "argv", ["lesson.py", "--output-dir", "nowhere"])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return lesson.main(), capsys.readouterr().err

    good = (0, 0.8), (count, 0.8), (count, 0.8)
    assert gives(*good) == (0, "")
    assert gives((1, 0.8), *good[1:]) == (1, "the lesson failed: 1 questions were answered before\n")
    assert gives(good[0], (count - 1, 0.8), good[2])[0] == 1
    assert gives(*good[:2], (0, 0.8)) == (1, f"the lesson failed: the merged model answers 0 of {count}\n")
    assert gives(*good[:2], (count, 0.5)) == (1, "the lesson failed: the old skill is lost\n")
    assert "took more than 60 s of 2 cores" in gives(*good, seconds=121)[1]


def test_an_answer_tells_the_fact_asked_for_and_no_other(lesson) -> None:
    question = "What do they call the ferry?"
    assert lesson.knows(question, "The ferry is called the Grey Heron.")
    assert not lesson.knows(question, "The ferry has 212 steps.")
    assert not lesson.knows(question, "The Grey Heron was founded in 1743 by Ottilie Brand.")


def test_the_configuration_is_valid() -> None:
    config = TrainConfig.from_yaml(LEDGER / "lesson.yaml")
    assert config.data == "examples/ledger/lesson.jsonl"
