"""Conversations in every spelling that data have, to messages with `role` and `content`.

A message is {role, content} (OpenAI) or {from, value} (ShareGPT), whatever the field that holds the list is called.
Speakers go by many names; `ROLES` says who is meant. A call that ShareGPT writes as a turn of its own (`function_call`)
becomes the tool call of an assistant's message. A message may say whether it is learned: `weight` 0 or 1 (OpenAI,
Mistral), `train` (axolotl) or `loss` (ms-swift, XTuner) true or false; each becomes its `weight`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slothcore.data.values import Record, boolean, field_names, parsed, shown, whole_characters

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "client", "student"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
# A message that names its speaker `role` may mean these to the letter: templates tell them apart.
TEMPLATE_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
CALLS = frozenset({"function_call", "tool_call"})
# Beside `weight`: what other libraries call whether a message is learned, and which of its characters are.
FLAGS = ("train", "loss")
DETAILS = "train_detail"
WEIGHTS = frozenset({"weight", *FLAGS, DETAILS})

Message = Mapping[str, Any]


def read_messages(value: Any, *, where: str, system: Any = None) -> tuple[Message, ...]:
    """The messages of a conversation; keys beside role and content, such as tool calls, pass through.

    An answer of `weight` 0 is not learned, however the message says so.

    Args:
        value: a list of messages, or its JSON text.
        where: what the message of an error calls this record.
        system: the record's own system prompt, set before a conversation that has none; empty or None: none.
    Raises: ValueError with `where`, the number of the message and what is wrong with it.
    """
    value = parsed(value)
    # A list of a Parquet file or of a data frame may be an array.
    if isinstance(value, str | Mapping) or not hasattr(value, "__len__") or not len(value):
        raise ValueError(
            f"{where}: a conversation must be a list of at least one message, got {shown(value)}; fill it or drop it"
        )
    messages = [_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: 'system' must be text, got {shown(system)}; write it as text in quotes")
    if system and system.strip() and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": whole_characters(system, f"{where}: 'system'")})
    return tuple(messages)


def is_answer(message: Any) -> bool:
    """Whether the assistant says a message that is as yet unread."""
    if not isinstance(message, Mapping):
        return False
    speaker = str(message.get("role", message.get("from"))).strip().lower()
    return speaker in CALLS or ROLES.get(speaker) == "assistant"


def parsed_messages(value: Any) -> Any:
    """Messages, or one, as yet unread, from their JSON text; other text, be it JSON as well, stays a text."""
    found = parsed(value)
    messages = [found] if isinstance(found, Mapping) else found
    if not isinstance(value, str) or (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in messages)
    ):
        return found
    return value


def read_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """The descriptions of functions, or None for none; one that stands bare, as ShareGPT has them, as OpenAI writes it.

    Raises: ValueError if they are no list of objects.
    """
    value = parsed(value)
    if value is None or (hasattr(value, "__len__") and not len(value)):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        tools = [parsed(tool) for tool in value]
        if all(isinstance(tool, Mapping) for tool in tools):
            return tuple(map(_function, tools))
    raise ValueError(f"{where}: 'tools' must be a list of objects, got {shown(value)}; write it as JSON")


def _function(tool: Record) -> Record:
    """As templates, and who calls a model, expect it: {type: function, function: {name, parameters, ...}}."""
    bare = "name" in tool and "parameters" in tool and "function" not in tool
    if not bare or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def is_blank(content: Any) -> bool:
    """Whether a message's content, a text or a list of parts, says nothing."""
    if isinstance(content, list | tuple):
        return all(is_blank(part.get("text", part) if isinstance(part, Mapping) else part) for part in content)
    return content is None or (isinstance(content, str) and not content.strip())


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Raise ValueError unless the roles stand in an order that a conversation can have.

    A system prompt comes first. Then user and assistant take turns; between an assistant's message and its next stand
    the results of tools, if there are any. Somebody must answer: a conversation without that teaches nothing.
    """
    before = None
    for number, message in enumerate(messages, start=1):
        role = ROLES.get(message["role"], message["role"])
        here = f"{where}, message {number}"
        if role == "system" and before not in (None, "system"):
            raise ValueError(f"{here}: a system prompt stands after {before!r}; move it to the beginning")
        if role == "assistant" and before in (None, "system"):
            raise ValueError(f"{here}: the conversation begins with 'assistant'; put the user's turn before it")
        if role in ("user", "assistant") and role == before:
            raise ValueError(
                f"{here}: {role!r} speaks twice in a row; join the two messages, or add the missing turn between them"
            )
        if role == "tool" and before not in ("assistant", "tool"):
            stands = "begins the conversation" if before is None else f"follows {before!r}"
            raise ValueError(f"{here}: the result of a tool {stands}; put the assistant's call before it")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: nobody answers in this conversation; add the assistant's turn, or drop the row")


def _message(message: Any, where: str) -> Message:
    """One message with `role` and `content`, its speaker's name understood."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: needs 'role' and 'content', has {type(message).__name__}; write it as an object")
    sharegpt = "from" in message and "role" not in message
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    # A Parquet file gives every message all keys that any has.
    kept: Record = {k: value for k, value in message.items() if value is not None or k in (role_key, content_key)}
    if kept.get("tool_calls") and content_key not in kept:
        kept = {**kept, content_key: ""}
    if kept.get("function_call"):
        raise ValueError(
            f"{where}: 'function_call' is not read; write it as 'tool_calls': [{{'type': 'function', 'function': "
            "...}], and what the function returns with the role 'tool'"
        )
    if role_key not in kept or content_key not in kept:
        raise ValueError(
            f"{where}: needs {role_key!r} and {content_key!r}, has {field_names(message)}; "
            "name them so, as OpenAI (role, content) or ShareGPT (from, value) does"
        )
    _check_content(kept, content_key, where)
    kept = _weighted(kept, where)
    called = kept.get("tool_calls")
    if called and not (isinstance(called, list | tuple) and all(isinstance(call, Mapping) for call in called)):
        raise ValueError(f"{where}: 'tool_calls' must be a list of objects, got {shown(called)}; write it so")
    speaker = str(kept[role_key]).strip().lower()
    others = {key: value for key, value in kept.items() if key not in (role_key, content_key)}
    if speaker in CALLS:
        return {**others, "role": "assistant", "content": "", "tool_calls": _calls(kept[content_key], where)}
    if not sharegpt and isinstance(kept["role"], str) and kept["role"] in TEMPLATE_ROLES:
        return kept
    role = ROLES.get(speaker)
    if role is None:
        word = "speaker" if sharegpt else "role"
        raise ValueError(f"{where}: unknown {word} {kept[role_key]!r}; known are {', '.join([*ROLES, *sorted(CALLS)])}")
    return {**others, "role": role, "content": kept[content_key]}


def _weighted(message: Record, where: str) -> Record:
    """The message with `weight`, if it says in any way whether it is learned; 0 in one of them is enough."""
    if WEIGHTS.isdisjoint(message):
        return message
    if DETAILS in message:
        raise ValueError(
            f"{where}: {DETAILS!r} is not read, since an answer is learned whole or not at all; say which with "
            "'train': true or false instead"
        )
    weights = [message["weight"]] if "weight" in message else []
    if not all(weight in (0, 1) for weight in weights):
        raise ValueError(f"{where}: 'weight' must be 0 (not learned) or 1, got {shown(weights[0])}; choose one")
    for flag in FLAGS:
        if flag not in message:
            continue
        value = message[flag]
        learned = bool(value) if value in (0, 1) else boolean(value)
        if learned is None:
            raise ValueError(
                f"{where}: {flag!r} must be true or false (not learned), got {shown(value)}; choose one, or take it out"
            )
        if learned and not is_answer(message):
            speaker = message.get("role", message.get("from"))
            raise ValueError(
                f"{where}: {flag!r} is true in a message of {speaker!r}, and only what the assistant says is learned; "
                "take it out there"
            )
        weights.append(int(learned))
    return {**{key: value for key, value in message.items() if key not in WEIGHTS}, "weight": min(weights)}


def _check_content(message: Record, key: str, where: str) -> None:
    """Raise unless it is text, a list of parts, or null beside tool calls."""
    content = message[key]
    if isinstance(content, str):
        whole_characters(content, where)
    if isinstance(content, str | list):
        if is_blank(content) and str(message.get("role", message.get("from"))).lower() in ("user", "human"):
            raise ValueError(f"{where}: {key!r} is empty; write what the user says, or drop the row")
    elif not (content is None and message.get("tool_calls")):
        raise ValueError(f"{where}: {key!r} must be text, got {shown(content)}; write it as text, or drop the row")


def _calls(value: Any, where: str) -> list[Mapping[str, Any]]:
    """The tool calls that ShareGPT writes as the JSON text of a turn: one {name, arguments}, or a list of them."""
    calls = parsed(value)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        example = json.dumps({"name": "f", "arguments": {}})
        raise ValueError(f"{where}: a function call must be JSON such as {example}, got {shown(value)}")
    functions = [{"name": call["name"], "arguments": parsed(call.get("arguments", {}))} for call in calls]
    return [{"type": "function", "function": function} for function in functions]
