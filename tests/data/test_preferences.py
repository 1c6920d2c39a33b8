"""Preference data: the chosen answer in every shape, and judged answers."""

import json
from pathlib import Path

import pytest

from slothcore.data.dataset import open_dataset
from slothcore.data.formats import ChatExample, TextExample, alpaca_prompt, detect_format, format_example, plain_record
from slothcore.data.masking import IGNORED_LABEL, tokenise_dataset
from slothcore.data.preferences import verdict
from slothcore.data.standardize import standardize
from slothcore.data.tokenizer import Tokenizer
from tests.training.tiny import write_tokenizer

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
        ({"prompt": '["a", "b"]', "chosen": '{"a": 1}', "rejected": "no"}, TextExample('["a", "b"]', '{"a": 1}')),
        ({"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}, CHAT),
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


ASKED = [USER, {"role": "assistant", "content": "first"}, {"role": "user", "content": "more"}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "completion": [GOOD]},
        {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": ASKED, "chosen": "ho", "rejected": "no"},
        {"messages": ASKED, "chosen": GOOD, "rejected": BAD},
        {"messages": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {
            "conversations": [{"from": ("human", "gpt")[n % 2], "value": m["content"]} for n, m in enumerate(ASKED)],
            "chosen": {"from": "gpt", "value": "ho"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ],
)
def test_answers_in_a_prompt_are_not_learned(tmp_path: Path, record: dict) -> None:
    """As of a prompt in text, and in TRL, whose loss begins behind the prompt."""
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    tokenizer.use_chat_template("vicuna")

    def learned(**options: object) -> str:
        (row,), _ = tokenise_dataset([record], tokenizer, max_seq_length=1000, **options)
        return tokenizer.decode([label for label in row.labels if label != IGNORED_LABEL])

    assert learned().strip() == "ho"
    assert "first" in learned(completion_only_loss=False)
    (standard,) = standardize([record])
    assert [message.get("weight", 1) for message in standard["messages"]] == [1, 0, 1, 1]


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


def test_a_label_beside_a_text_is_a_class_whatever_the_field_of_the_text(tmp_path: Path) -> None:
    records = [{"body": "some text", "label": label} for label in (False, True)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for data in (records, tmp_path / "a.json"):
        assert [*open_dataset(data, text_field="body")] == records
    with pytest.raises(ValueError, match=r"^record 3 has the fields 'other', 'label'"):
        open_dataset([*records, {"other": "text", "label": False}], text_field="body")


def test_answers_whose_prompt_has_another_name_are_said() -> None:
    """A text alone is a whole dialogue, as in hh-rlhf; beside other texts it may be the answer to one of them."""
    pair = {"chosen": "ho", "rejected": "no"}
    notes = open_dataset(
        [{**pair, "trajectory": [{"from": "user", "value": "hi"}], "score": 4, "source": " "}, pair]
    ).notes
    assert notes[-1] == (
        "the dataset: 1 row with a chosen answer and no prompt, so the answer is learned as a text of its own; "
        "if 'trajectory' is the prompt, name it so"
    )
    for record in (pair, {**pair, "score": 4}, {**pair, "prompt": "hi", "source": "web"}):
        assert not any("no prompt" in note for note in open_dataset([record]).notes)


def test_a_chosen_answer_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match="'chosen' must be an answer or a list of messages, got int beside 'prompt'"):
        format_example({"prompt": "hi", "chosen": 4, "rejected": "no"})
