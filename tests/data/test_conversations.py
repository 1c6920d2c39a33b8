"""Conversations in every spelling: who speaks, what is called, and the order in which roles can stand."""

import json

import pytest

from slothcore.data.conversations import CALLS, ROLES, check_turns, read_messages, read_tools

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM, TOOL = {"role": "system", "content": "be"}, {"role": "tool", "content": "4"}


@pytest.mark.parametrize(("spelling", "role"), ROLES.items())
def test_every_spelling_of_a_speaker(spelling: str, role: str) -> None:
    for written in (spelling, spelling.capitalize()):
        assert read_messages([{"from": written, "value": "a"}], where="x") == ({"role": role, "content": "a"},)


def test_openai_roles_that_templates_tell_apart_stay() -> None:
    for role in ("developer", "tool", "function", "ipython"):
        message = {"role": role, "content": "a", "name": "f"}
        assert read_messages([message], where="x") == (message,)
    assert read_messages([{"role": "model", "content": "a"}], where="x")[0]["role"] == "assistant"


def test_what_a_message_holds_beside_its_words_passes_through() -> None:
    """Of ShareGPT's messages, too: templates write thoughts and calls."""
    beside = {"reasoning_content": "Hm.", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    expected = ({**ASSISTANT, **beside},)
    assert read_messages([{**ASSISTANT, **beside}], where="x") == expected
    assert read_messages([{"from": "gpt", "value": "ho", **beside}], where="x") == expected


def test_each_message_says_which_spelling_it_has() -> None:
    mixed = [{"from": "human", "value": "hi"}, ASSISTANT]
    assert read_messages(mixed, where="x") == (USER, ASSISTANT)
    assert read_messages(json.dumps(mixed), where="x") == (USER, ASSISTANT)


def test_the_records_system_prompt_comes_first_unless_there_is_one() -> None:
    assert read_messages([USER], where="x", system="be") == (SYSTEM, USER)
    assert read_messages([SYSTEM, USER], where="x", system="other") == (SYSTEM, USER)
    assert read_messages([USER], where="x", system=" ") == (USER,)


@pytest.mark.parametrize("speaker", sorted(CALLS))
def test_a_call_that_is_a_turn_becomes_a_tool_call(speaker: str) -> None:
    value = json.dumps({"name": "add", "arguments": {"a": 2}})
    (message,) = read_messages([{"from": speaker, "value": value}], where="x")
    assert message["role"] == "assistant"
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    with pytest.raises(ValueError, match="message 1: a function call must be JSON such as"):
        read_messages([{"from": speaker, "value": "add(2)"}], where="x")


def test_a_call_in_the_older_spelling_is_not_lost() -> None:
    """No template writes it, so beside some words it was left out in silence."""
    call = {"role": "assistant", "content": "I look.", "function_call": {"name": "f", "arguments": "{}"}}
    with pytest.raises(
        ValueError, match=r"x, message 1: 'function_call' is not read; write it as 'tool_calls': \[\{'t"
    ):
        read_messages([call], where="x")
    assert read_messages([{**call, "function_call": None}], where="x")[0]["content"] == "I look."


def test_keys_that_parquet_fills_with_null_are_dropped() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    (message,) = read_messages([call], where="x")
    assert message == {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert "content" in read_messages([{"role": "assistant", "tool_calls": [{}]}], where="x")[0]


def test_tools_are_a_list_or_its_json() -> None:
    assert read_tools('[{"name": "f"}]', "x") == ({"name": "f"},)
    described = {"name": "f", "description": "Does it.", "parameters": {"type": "object", "properties": {}}}
    wrapped = {"type": "function", "function": described}
    # As in ShareGPT, in OpenAI's newer and in its usual way of writing: a model is asked with the last.
    assert read_tools([described, {"type": "function", **described}, wrapped], "x") == (wrapped, wrapped, wrapped)
    other = {"type": "retrieval", "name": "f", "parameters": {}}
    assert read_tools([other], "x") == (other,)
    assert read_tools(['{"name": "f"}'], "x") == ({"name": "f"},)
    assert read_tools(None, "x") is read_tools([], "x") is read_tools("", "x") is None
    with pytest.raises(ValueError, match="'tools' must be a list of objects, got str 'f'; write it as JSON"):
        read_tools("f", "x")


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
        [USER, ASSISTANT, USER],
        [USER, ASSISTANT, TOOL, TOOL, ASSISTANT, USER, ASSISTANT],
        [{"role": "developer", "content": "be"}, USER, ASSISTANT],
    ],
)
def test_orders_that_conversations_have(messages: list[dict]) -> None:
    check_turns(messages, "x")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([USER, USER, ASSISTANT], "x, message 2: 'user' speaks twice in a row; join the two messages, or add"),
        ([USER, ASSISTANT, ASSISTANT], "x, message 3: 'assistant' speaks twice in a row"),
        ([ASSISTANT, USER], "x, message 1: the conversation begins with 'assistant'; put the user's turn before it"),
        ([SYSTEM, ASSISTANT], "x, message 2: the conversation begins with 'assistant'"),
        ([USER, SYSTEM, ASSISTANT], "x, message 2: a system prompt stands after 'user'; move it to the beginning"),
        ([USER, TOOL, ASSISTANT], "x, message 2: the result of a tool follows 'user'"),
        ([SYSTEM, USER], "x: nobody answers in this conversation; add the assistant's turn, or drop the row"),
    ],
)
def test_orders_that_they_have_not(messages: list[dict], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_turns(messages, "x")
