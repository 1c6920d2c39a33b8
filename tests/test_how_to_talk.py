"""The command printed at the end of a run asks in the layout of the run's own records."""

import shlex

import pytest

from slothcore.run import how_to_talk
from slothcore.training.config import TrainConfig

LONG = "word " * 100


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "abc"}, ["--prompt", "Hello"]),
        ({"instruction": "Say it's so.", "output": "So."}, ["--instruction", "Say it's so."]),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, ["--instruction", "Add", "--input", "1, 2"]),
        ({"instruction": "Add", "context": "1", "response": "1"}, ["--instruction", "Add", "--input", "1"]),
        ({"instruction": LONG, "output": "?"}, ["--instruction", "Hello"]),
        ({"question": "Why?", "answer": "So."}, ["--instruction", "Why?"]),
        ({"prompt": "Why? Because", "completion": " so."}, ["--prompt", "Why? Because"]),
        ({"prompt": "- a list", "completion": "x"}, ["--prompt", "Hello"]),
        ({"prompt": "two\nlines", "completion": "x"}, ["--prompt", "Hello"]),
        ({"prompt": LONG, "completion": "x"}, ["--prompt", "Hello"]),
    ],
)
def test_the_record_decides_the_flags(record: dict, expected: list[str]) -> None:
    command = shlex.split(how_to_talk(TrainConfig(output_dir="a run"), record))
    assert command == ["slothcore", "generate", "--model", "a run", *expected]


def test_a_conversation_goes_on_in_chat() -> None:
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    assert how_to_talk(TrainConfig(output_dir="a run"), record) == "slothcore chat --model 'a run'"


def test_own_columns_are_asked_through_their_template() -> None:
    config = TrainConfig(output_dir="run", prompt_template="Of {a}:", completion_template="{b}")
    assert how_to_talk(config, {"a": "1", "b": "2"}) == "slothcore generate --model run --prompt 'Of 1:'"
    config = TrainConfig(output_dir="run", completion_template="{b}")
    assert how_to_talk(config, {"b": "2"}) == "slothcore generate --model run --prompt Hello"
