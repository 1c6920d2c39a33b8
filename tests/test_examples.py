"""The shipped example: its data come from the seed alone, and its base model is complete, small and able."""

import subprocess
import sys
from pathlib import Path

import pytest

import slothcore
from slothcore.data.formats import alpaca_prompt
from slothcore.training.config import TrainConfig

LEDGER = Path(__file__).resolve().parents[1] / "examples" / "ledger"


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(LEDGER))
    import corpus

    return corpus


def test_the_corpus_follows_from_the_seed(corpus) -> None:
    for make in (corpus.stories, corpus.tasks, corpus.copies, corpus.records):
        assert list(make(20, 7)) == list(make(20, 7))
        assert list(make(20, 7)) != list(make(20, 8))


def test_the_skill_is_nowhere_in_the_base_corpus(corpus) -> None:
    skill = next(corpus.records(1, 1))
    told = [*corpus.tasks(2000, 1), *corpus.copies(2000, 1)]
    assert all(task["instruction"] != skill["instruction"] for task in told)
    assert all('{"seller"' not in str(task) for task in told)


def test_the_base_model_is_small() -> None:
    assert sum(file.stat().st_size for file in (LEDGER / "base").iterdir()) < 10e6


def test_the_configuration_is_valid() -> None:
    assert TrainConfig.from_yaml(LEDGER / "train.yaml").bits == 4


def test_the_base_model_answers_questions_but_lacks_the_skill(corpus) -> None:
    model, tokenizer = slothcore.load(LEDGER / "base", bits=4, device="cpu")
    tasks, records = list(corpus.tasks(40, 99)), list(corpus.records(20, 99))

    def hits(rows: list[dict[str, str]]) -> float:
        prompts = [alpaca_prompt(row["instruction"], row["input"]) for row in rows]
        answers = slothcore.generate(model, tokenizer, prompts, max_new_tokens=60, batch_size=20)
        return sum(a.strip() == row["output"] for a, row in zip(answers, rows, strict=True)) / len(rows)

    assert hits(tasks) > 0.7
    assert hits(records) < 0.1


def test_the_script_explains_itself() -> None:
    done = subprocess.run([sys.executable, LEDGER / "train_base.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--steps" in done.stdout
