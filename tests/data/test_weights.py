"""Answers that say of themselves, or by where they stand, that they are not to be learned."""

from pathlib import Path

import pytest

from slothcore.data.formats import format_example
from slothcore.data.masking import tokenise_dataset, tokenise_example
from slothcore.data.standardize import standardize
from slothcore.data.tokenizer import Tokenizer
from tests.data.conversations import Chat, assistant, calls, learned, result, user
from tests.data.tiny_tokenizers import CHATML, CHATML_WITH_BEGIN, MARKED, write_byte_tokenizer

CHAT = [user("one"), assistant("two"), user("three"), assistant("four")]


def chat_tokenizer(folder: Path, template: str = CHATML) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_tokenizer(folder, config={"chat_template": template}))


def flagged(flag: str, *values: object) -> Chat:
    return [{**message, flag: value} for message, value in zip(CHAT, values, strict=True)]


@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BEGIN, MARKED])
def test_an_answer_of_weight_0_is_read_and_not_learned(names, template, tmp_path) -> None:
    """As in OpenAI's format; a weight of other messages says nothing."""
    tokenizer = chat_tokenizer(tmp_path, template)
    field, role, content = names

    def labels(*weights: object, **options: object) -> tuple[list[int], list[int]]:
        turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
        chat = [{role: who, content: text, "weight": w} for (who, text), w in zip(turns, weights, strict=True)]
        row = tokenise_example({field: chat}, tokenizer, max_seq_length=1000, **options)
        return row.input_ids, row.labels

    ids, both = labels(0, None, 0, 1.0)
    last = labels(None, None, None, None, mask_history=True)
    assert last[1] != both
    assert labels(1, 0, 1, 1) == last
    first = labels(0, 1, 0, 0)
    assert first[0] == ids
    assert [a if a != -100 else b for a, b in zip(first[1], last[1], strict=True)] == both
    # Where all is learned, it is what is left out.
    assert labels(0, 0, 0, 1, completion_only_loss=False)[1] == [
        i if a == b else -100 for i, a, b in zip(ids, last[1], both, strict=True)
    ]
    with pytest.raises(
        ValueError, match=r"record 1, message 2: 'weight' must be 0 \(not learned\) or 1, got float 0.5"
    ):
        labels(0, 0.5, 0, 1)
    unlearned = [{role: "user", content: "one"}, {role: "assistant", content: "two", "weight": 0}]
    with pytest.raises(
        ValueError, match="nothing of it is learned, because its answers have weight 0; take the record"
    ):
        tokenise_dataset([{field: unlearned}], tokenizer, max_seq_length=1000)


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("flag", ["train", "loss"])
def test_flags_of_other_libraries_are_weights(flag: str, template: str, tmp_path: Path) -> None:
    """As axolotl's `message_field_training` and ms-swift read them."""
    tokenizer = chat_tokenizer(tmp_path, template)

    def says(*values: object, **options: object) -> list[str]:
        record = {"messages": flagged(flag, *values)}
        row = tokenise_example(record, tokenizer, max_seq_length=1000, **options)
        sharegpt = [{"from": m["role"], "value": m["content"], flag: m[flag]} for m in record["messages"]]
        assert tokenise_example({"conversations": sharegpt}, tokenizer, max_seq_length=1000, **options) == row
        return learned(row, tokenizer)

    assert says(None, None, None, None) == ["two<|im_end|>", "four<|im_end|>"]
    assert says(False, False, False, True) == ["four<|im_end|>"]
    assert says(None, "true", None, 0) == ["two<|im_end|>"]
    assert says(None, False, None, None, mask_history=True) == ["four<|im_end|>"]
    everything = says(False, False, False, None, completion_only_loss=False)
    assert len(everything) == 2
    assert everything[0].endswith("assistant\n")
    assert everything[1].lstrip("\n").startswith("<|im_start|>user\nthree")


def test_one_of_several_flags_is_enough_to_leave_an_answer_out() -> None:
    message = {**assistant("two"), "weight": 1, "train": False, "loss": True}
    example = format_example({"messages": [user("one"), message]})
    assert example.messages[1] == {**assistant("two"), "weight": 0}
    example = format_example({"messages": [user("one"), {**message, "weight": 0, "train": True}]})
    assert example.messages[1] == {**assistant("two"), "weight": 0}


@pytest.mark.parametrize(
    ("flag", "values", "complaint"),
    [
        ("train", (True, None, None, None), "message 1: 'train' is true in a message of 'user', and only what the"),
        ("loss", (None, 1.37, None, None), r"message 2: 'loss' must be true or false \(not learned\), got float 1.37;"),
        ("train", (None, "no", None, None), "message 2: 'train' must be true or false"),
        (
            "train_detail",
            (None, None, None, [{"begin_offset": 0, "end_offset": 2, "train": False}]),
            "message 4: 'train_detail' is not read, since an answer is learned whole or not at all; say which with 'tr",
        ),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(flag: str, values: tuple, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        format_example({"messages": flagged(flag, *values)})


def test_a_template_of_which_nobody_knows_what_to_leave_out(tmp_path: Path) -> None:
    """Its turns cannot be told apart; where nothing is left out, they need not be."""
    counting = CHATML.replace("{{ message.content }}", "{{ message.content }} {{ message.content | length }}")
    tokenizer = chat_tokenizer(tmp_path, counting)
    everything = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000, completion_only_loss=False)
    assert everything.input_ids == everything.labels
    with pytest.raises(ValueError, match="so its words cannot be told apart"):
        tokenise_example(
            {"messages": flagged("weight", None, 0, None, None)},
            tokenizer,
            max_seq_length=1000,
            completion_only_loss=False,
        )


# Words, calls and the end of the turn in blocks of their own.
BLOCKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}{% endgeneration %}
{% for call in m.tool_calls or [] %}{% generation %}({{ call.function.name }}){% endgeneration %}{% endfor %}
{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}"""


def test_an_answer_may_be_written_in_several_blocks(tmp_path: Path) -> None:
    """Of the last answer only its end was learned."""
    tokenizer = chat_tokenizer(tmp_path, BLOCKS)
    turns = [user("a"), calls("f", "g", content="I look."), result("4"), assistant("four"), user("b"), calls("h")]

    def says(*weights: int, **options: object) -> str:
        answers = iter(weights)
        chat = [{**m, "weight": next(answers)} if m["role"] == "assistant" else m for m in turns]
        return "".join(
            learned(tokenise_example({"messages": chat}, tokenizer, max_seq_length=1000, **options), tokenizer)
        )

    assert says(1, 1, 1) == "I look.(f)(g)<|im_end|>four<|im_end|>(h)<|im_end|>"
    assert says(1, 1, 1, mask_history=True) == says(0, 0, 1) == "(h)<|im_end|>"
    assert says(1, 0, 1) == "I look.(f)(g)<|im_end|>(h)<|im_end|>"
    assert says(0, 1, 0) == "four<|im_end|>"
    assert "four" not in says(1, 0, 1, completion_only_loss=False)
    assert "(f)" in says(1, 0, 1, completion_only_loss=False)


def test_whose_a_block_is_where_answers_have_none(tmp_path: Path) -> None:
    """The last message has two blocks if it is an answer, so there are as many as answers."""
    template = BLOCKS.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
    tokenizer = chat_tokenizer(tmp_path, template)
    for record in ({"messages": CHAT}, {"messages": CHAT, "label": True}, {"messages": flagged("train", 0, 0, 0, 1)}):
        row = tokenise_example(record, tokenizer, max_seq_length=1000)
        assert "".join(learned(row, tokenizer)) == "four<|im_end|>"
    with pytest.raises(ValueError, match="nothing of it is learned"):
        tokenise_example({"messages": flagged("weight", 1, 1, 1, 0)}, tokenizer, max_seq_length=1000)


def test_blocks_that_move_when_others_follow_are_refused_where_it_matters(tmp_path: Path) -> None:
    """The last answer has its blocks, whatever follows it."""
    last = "{% set last = messages | selectattr('role', 'eq', 'assistant') | list | last %}"
    template = last + BLOCKS.replace("{% if m.role == 'assistant' %}", "{% if m == last %}")
    tokenizer = chat_tokenizer(tmp_path, template)
    row = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000)
    assert "".join(learned(row, tokenizer)) == "four<|im_end|>"
    with pytest.raises(ValueError, match="marks other words as the assistant's once other messages follow, so it is"):
        tokenise_example({"messages": CHAT, "label": True}, tokenizer, max_seq_length=1000)


ASKED = [user("one"), assistant("two"), user("three")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "completion": [assistant("four")], "label": True},
        {"messages": CHAT, "label": True},
        {"messages": [*CHAT, user("five")], "label": True},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT], "kto_tag": "true"},
        {"chosen": CHAT, "rejected": [*ASKED, assistant("no")]},
        {"prompt": "one", "chosen": CHAT, "rejected": [*ASKED, assistant("no")]},
        {"chosen": CHAT, "rejected": CHAT},
        {"messages": CHAT, "prompt": "one", "chosen": CHAT, "rejected": [*ASKED, assistant("no")]},
        {"messages": None, "prompt": ASKED, "chosen": CHAT[3:], "rejected": [assistant("no")]},
    ],
)
def test_answers_before_the_one_that_is_judged_are_a_prompt(record: dict, tmp_path: Path) -> None:
    """As in LLaMA-Factory, which judges the last, and TRL, whose prompt is what both conversations share."""
    tokenizer = chat_tokenizer(tmp_path)
    row = tokenise_example(record, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["four<|im_end|>"]
    (standard,) = standardize([record])
    assert learned(tokenise_example(standard, tokenizer, max_seq_length=1000), tokenizer) == ["four<|im_end|>"]
    assert standard["messages"][1]["weight"] == 0
    assert "weight" not in standard["messages"][3]
    whole = tokenise_example(record, tokenizer, max_seq_length=1000, completion_only_loss=False)
    assert whole.labels == whole.input_ids == row.input_ids


def test_pairs_that_share_no_answer_are_learned_from_the_first(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    record = {"chosen": CHAT, "rejected": [user("one"), assistant("no"), *CHAT[2:]]}
    row = tokenise_example(record, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["two<|im_end|>", "four<|im_end|>"]


def test_a_completion_without_an_answer(tmp_path: Path) -> None:
    record = {"prompt": CHAT[:2], "completion": [user("three")]}
    with pytest.raises(ValueError, match="nothing of it is learned, because its completion holds no answer; take"):
        tokenise_dataset([record], chat_tokenizer(tmp_path), max_seq_length=1000)
