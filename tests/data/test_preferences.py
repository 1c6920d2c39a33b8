"""Preference data: the chosen answer in every shape, and judged answers."""

import pytest

from slothcore.data.formats import ChatExample, TextExample, alpaca_prompt, detect_format, format_example, plain_record
from slothcore.data.preferences import verdict

USER, GOOD = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
BAD = {"role": "assistant", "content": "no"}
CHAT = ChatExample((USER, GOOD))


@pytest.mark.parametrize(
    ("record", "example"),
    [
        ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, TextExample("hi", "ho")),
        ({"chosen": "H: hi A: ho", "rejected": "H: hi A: no"}, TextExample("", "H: hi A: ho")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHAT),
        ({"prompt": [USER], "chosen": "ho", "rejected": "no"}, CHAT),
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, CHAT),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
        ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, CHAT),
        ({"messages": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "ho"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            CHAT,
        ),
        (
            {"instruction": "add", "input": "1 1", "output": "3", "chosen": "2", "rejected": "3"},
            TextExample(alpaca_prompt("add", "1 1"), "2"),
        ),
        (
            {"system": "Be.", "question": "1 + 1", "chosen": "2", "rejected": "3"},
            TextExample("Be.\n\n" + alpaca_prompt("1 + 1"), "2"),
        ),
    ],
)
def test_the_chosen_answer(record: dict, example: TextExample | ChatExample) -> None:
    assert detect_format(record) == "preference"
    assert format_example(record) == format_example(record, format="dpo") == example


def test_judged_answers() -> None:
    good = {"prompt": "hi", "completion": "ho", "label": True}
    assert detect_format(good) == "kto"
    assert format_example(good) == TextExample("hi", "ho")
    assert format_example({"messages": [USER, GOOD], "kto_tag": "True"}) == CHAT
    assert plain_record(good) == ("prompt", {"prompt": "hi", "completion": "ho"})
    with pytest.raises(ValueError, match="the record: 'label' says that the answer is bad"):
        format_example({**good, "label": False})
    with pytest.raises(ValueError, match="'label' must be true or false"):
        format_example({**good, "label": "fine"}, format="kto")


@pytest.mark.parametrize(
    ("label", "judged"), [(True, True), ("false", False), (" TRUE ", True), (1, None), ("x", None)]
)
def test_what_is_a_verdict(label: object, judged: bool | None) -> None:
    assert verdict({"label": label}) is judged


def test_a_chosen_answer_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match="'chosen' must be an answer or a list of messages, got int beside 'prompt'"):
        format_example({"prompt": "hi", "chosen": 4, "rejected": "no"})
