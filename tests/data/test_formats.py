"""Record layouts: recognised, read, and refused with the fields found and those expected."""

import json

import pytest

from slothcore.data.formats import (
    ChatExample,
    TextExample,
    alpaca_prompt,
    check_format_name,
    detect_format,
    format_example,
)

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Translate.

### Input:
chat

### Response:
"""
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Translate.

### Response:
"""
TURNS = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})


@pytest.mark.parametrize(
    ("record", "name", "example"),
    [
        ({"text": "a"}, "text", TextExample("", "a")),
        ({"document": "a"}, "document", TextExample("", "a", running=True)),
        ({"prompt": "a", "completion": "b"}, "prompt", TextExample("a", "b")),
        ({"prompt": "a", "completion": 4}, "prompt", TextExample("a", "4")),
        ({"prompt": "a", "completion": 10**400}, "prompt", TextExample("a", f"1{'0' * 400}")),
        ({"instruction": "Translate.", "output": "cat"}, "alpaca", TextExample(WITHOUT_INPUT, "cat")),
        ({"instruction": "Translate.", "input": "", "output": "cat"}, "alpaca", TextExample(WITHOUT_INPUT, "cat")),
        ({"instruction": "Translate.", "input": None, "output": "cat"}, "alpaca", TextExample(WITHOUT_INPUT, "cat")),
        ({"instruction": "Translate.", "input": "chat", "output": "cat"}, "alpaca", TextExample(WITH_INPUT, "cat")),
        ({"instruction": "Translate.", "context": "chat", "response": "cat"}, "dolly", TextExample(WITH_INPUT, "cat")),
        ({"messages": list(TURNS), "label": True}, "kto", ChatExample(TURNS)),
        ({"messages": list(TURNS), "label": "sports"}, "messages", ChatExample(TURNS)),
        ({"text": "a", "label": True}, "text", TextExample("", "a")),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "conversations",
            ChatExample(TURNS),
        ),
        # As a CSV cell holds it.
        ({"messages": '[{"role": "user", "content": "hi"}]'}, "messages", ChatExample(TURNS[:1])),
        ({"messages": list(TURNS), "tools": [{"name": "f"}]}, "messages", ChatExample(TURNS, ({"name": "f"},))),
        ({"messages": list(TURNS), "text": "rendered"}, "messages", ChatExample(TURNS)),
        ({"conversation": list(TURNS)}, "conversation", ChatExample(TURNS)),
        ({"prompt": [TURNS[0]], "completion": [TURNS[1]]}, "prompt", ChatExample(TURNS)),
        ({"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])}, "prompt", ChatExample(TURNS)),
        # What a model writes may be messages.
        ({"prompt": "a", "completion": json.dumps(TURNS)}, "prompt", TextExample("a", json.dumps(TURNS))),
        ({"prompt": '[{"a": 1}]', "completion": '[{"b": 2}]'}, "prompt", TextExample('[{"a": 1}]', '[{"b": 2}]')),
        ({"question": "Translate.", "answer": "cat"}, "question", TextExample(WITHOUT_INPUT, "cat")),
        ({"question": "Translate.", "answer": "cat", "context": ["a"]}, "question", TextExample(WITHOUT_INPUT, "cat")),
        ({"question": "Translate.", "response": "cat"}, "reply", TextExample(WITHOUT_INPUT, "cat")),
        ({"query": "Translate.", "response": "cat"}, "query", TextExample(WITHOUT_INPUT, "cat")),
        ({"prompt": "Translate.", "response": "cat"}, "response", TextExample(WITHOUT_INPUT, "cat")),
        ({"input": "Translate.", "output": "cat"}, "input", TextExample(WITHOUT_INPUT, "cat")),
        (
            {"system_prompt": "Be brief.", "question": "Translate.", "response": "cat"},
            "reply",
            TextExample("Be brief.\n\n" + WITHOUT_INPUT, "cat"),
        ),
    ],
)
def test_layouts(record: dict, name: str, example: TextExample | ChatExample) -> None:
    assert detect_format(record) == name
    assert format_example(record) == example
    assert format_example(record, format=name) == example


def test_the_text_may_stand_in_another_field() -> None:
    assert format_example({"body": "a", "title": "t"}, text_field="body") == TextExample("", "a")
    with pytest.raises(ValueError, match=r"the fields 'text', but needs.*; body \(text\)"):
        format_example({"text": "a"}, text_field="body")


def test_braces_in_the_data_are_data() -> None:
    assert "{input} {0}" in alpaca_prompt("{input} {0}", "{instruction}")


@pytest.mark.parametrize(
    ("record", "arguments", "message"),
    [
        (
            {"promt": "a"},
            {"where": "record 7"},
            r"record 7 has the fields 'promt', but needs those of one format: chosen, rejected",
        ),
        ({}, {}, "has the fields none"),
        ({"instruction": "a"}, {"format": "alpaca"}, "lacks 'output': it has the fields 'instruction', and the format"),
        ({"text": 3 * [1]}, {}, "'text' must be text, got list"),
        ({"prompt": None, "completion": "b"}, {}, "'prompt' must be text, got NoneType"),
        (
            {"prompt": [TURNS[0]], "completion": "ho"},
            {},
            "'prompt' holds messages and 'completion' text; write both as messages, or both as text",
        ),
        ({"prompt": "hi", "completion": [TURNS[1]]}, {}, "'completion' holds messages and 'prompt' text"),
        (["a"], {}, "must be an object with named fields, got list"),
        ({"messages": []}, {}, "at least one message"),
        ({"messages": "hi"}, {}, "must be a list"),
        ({"messages": [{"role": "user"}]}, {}, "message 1: needs 'role' and 'content', has 'role'"),
        ({"messages": ["hi"]}, {}, "message 1: needs 'role' and 'content', has str"),
        (
            {"conversations": [{"from": "cat", "value": "miaow"}]},
            {},
            "message 1: unknown speaker 'cat'; known are user, human",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, {}, r"message 1: unknown speaker \['gpt'\]"),
        (
            {"messages": [{"role": ["user"], "content": "a"}]},
            {},
            r"message 1: unknown role \['user'\]; known are user,",
        ),
        ({"conversations": [{"from": "gpt", "value": None}]}, {}, "message 1: 'value' must be text, got NoneType"),
        ({"messages": [{"role": "user", "content": 5}]}, {}, "message 1: 'content' must be text, got int"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, {}, "message 1 holds half a character"),
        ({"messages": list(TURNS), "tools": {"name": "f"}}, {}, "'tools' must be a list of objects"),
        (
            {"text": "a"},
            {"format": "parquet"},
            "unknown record format 'parquet'; known are auto, preference, kto, messages",
        ),
    ],
)
def test_refusals(record: dict, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_example(record, **arguments)


def test_a_message_without_text_has_tool_calls_or_parts() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
    ]
    assert format_example({"messages": turns}) == ChatExample(tuple(turns))


def test_aliases() -> None:
    assert check_format_name("sharegpt") == "conversations"
    assert check_format_name("auto") == "auto"


def test_a_verdict_alone_is_no_layout_to_be_told_of() -> None:
    with pytest.raises(ValueError, match="record 1 has the fields 'a', but needs those of one format") as caught:
        detect_format({"a": 1})
    assert "label" not in str(caught.value)
    assert "instruction, output (alpaca)" in str(caught.value)
