"""Any records to messages."""

from pathlib import Path

import pytest

from slothcore.data.files import load_dataset
from slothcore.data.standardize import standardize

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
PLAIN = {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize(
    ("record", "conversation"),
    [
        ({"prompt": "hi", "completion": "ho"}, PLAIN),
        ({"question": "hi", "answer": "ho"}, PLAIN),
        ({"instruction": "hi", "input": "", "output": "ho"}, PLAIN),
        ({"instruction": "hi", "chosen": "ho", "rejected": "no", "output": "no"}, PLAIN),
        ({"prompt": "hi", "completion": "ho", "label": True}, PLAIN),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "id": 1}, PLAIN),
        (
            {"instruction": "hi", "context": "you", "response": "ho"},
            {"messages": [{"role": "user", "content": "hi\n\nyou"}, ASSISTANT]},
        ),
        (
            {"system": "be", "query": "hi", "response": "ho"},
            {"messages": [{"role": "system", "content": "be"}, USER, ASSISTANT]},
        ),
        ({"text": "ho"}, {"messages": [ASSISTANT]}),
        ({**PLAIN, "tools": [{"name": "f"}]}, {**PLAIN, "tools": [{"name": "f"}]}),
    ],
)
def test_layouts(record: dict, conversation: dict) -> None:
    assert standardize([record]) == [conversation]


def test_records_may_have_layouts_of_their_own_and_come_once() -> None:
    records = iter([{"prompt": "hi", "completion": "ho"}, {"messages": [USER, ASSISTANT]}])
    assert standardize(records) == [PLAIN, PLAIN]


def test_bad_answers_are_left_out_and_wrong_records_refused() -> None:
    judged = [{"prompt": "hi", "completion": "ho", "label": label} for label in (False, True)]
    assert standardize(judged) == [PLAIN]
    with pytest.raises(ValueError, match="record 2 has the fields 'a'"):
        standardize([PLAIN, {"a": 1}])


def test_published_datasets(shared_data: Path) -> None:
    for file in sorted((shared_data / "datasets").iterdir()):
        for conversation in standardize(load_dataset(file)):
            assert conversation["messages"][-1]["content"].strip() or conversation["messages"][-1].get("tool_calls")
            assert {message["role"] for message in conversation["messages"]} <= {"system", "user", "assistant"}
