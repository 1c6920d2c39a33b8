"""Rows of data frames: lists are arrays in them, and single values numpy's own."""

from typing import Any

import numpy as np
import pytest
import torch

from slothcore.data.dataset import open_dataset
from slothcore.data.formats import Example

ASKED = {"role": "user", "content": "hi"}
CALLS = [{"type": "function", "function": {"name": name, "arguments": {"a": 1}}} for name in "fg"]
GOOD = {"role": "assistant", "content": "ho", "tool_calls": CALLS}
BAD = {"role": "assistant", "content": "no"}


def framed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: framed(item) for key, item in value.items()}
    if isinstance(value, list):
        return np.array([*map(framed, value), None], dtype=object)[:-1]
    return np.array([value])[0] if isinstance(value, bool | int) else value


def read(*records: Any) -> tuple[tuple[str, ...], list[Example]]:
    dataset = open_dataset(records)
    return dataset.notes, [example for _, example in dataset.examples()]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, {**GOOD, "weight": 0}, ASKED, GOOD]},
        {"messages": [ASKED, BAD, ASKED, GOOD], "label": True},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "completion": [GOOD], "tools": [{"name": "f"}]},
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]},
        {"question": "hi", "answer": 4},
    ],
)
def test_they_are_read_as_lists_and_numbers(record: dict) -> None:
    assert framed(record).keys() == record.keys()
    assert read(framed(record)) == read(record)


def test_tables_as_they_are_give_no_rows() -> None:
    table = pytest.importorskip("pyarrow").table({"text": ["a", "b"]})
    with pytest.raises(
        ValueError, match=r"^the dataset is a Table, which gives columns and no rows; give its rows, as"
    ):
        open_dataset(table)
    assert [*open_dataset(table.to_pylist())] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("false", [np.False_, np.array(False), torch.tensor(False)])
def test_a_bad_answer_is_not_taken_for_one_that_nobody_judged(false: object) -> None:
    good, bad = ({"prompt": "hi", "completion": word, "label": label} for word, label in (("ho", True), ("no", False)))
    assert read(good, {**bad, "label": false}) == read(good, bad)


def test_what_a_table_fills_in_is_no_argument_of_a_call() -> None:
    """Their file has it, too: each call gets the arguments of all functions, null."""
    filled = {**GOOD, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}]}
    _, (example,) = read(framed({"messages": [ASKED, filled]}))
    assert [*example.messages] == [ASKED, {**GOOD, "tool_calls": CALLS[:1]}]
