"""Layouts of training records, and what each becomes.

| format         | fields                                                | becomes                             |
| -------------- | ----------------------------------------------------- | ----------------------------------- |
| text           | text                                                  | a text, every token a target        |
| document       | document                                              | running text, cut into full rows    |
| prompt         | prompt, completion                                    | a prompt and its completion         |
| alpaca         | instruction, output; input optional                   | the same, through Alpaca's template |
| dolly          | instruction, response; context optional               | the same, through Alpaca's template |
| messages       | messages: [{role, content}]; tools optional           | a conversation                      |
| conversations  | conversations: [{from, value}] (ShareGPT); the same   | a conversation                      |

Fields beyond these are ignored. Records are numbered from 1 in messages to the user.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

# Stanford Alpaca's wording, with the newline after "Response:" that its descendants share.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n"
    "### Response:\n"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Layout:
    """The fields that mark a format (all must be there) and those that may be there."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


# In the order of recognition: a record that fits two, fits the first.
LAYOUTS = {
    "messages": Layout(("messages",), ("tools",)),
    "conversations": Layout(("conversations",), ("tools",)),
    "prompt": Layout(("prompt", "completion")),
    "alpaca": Layout(("instruction", "output"), ("input",)),
    "dolly": Layout(("instruction", "response"), ("context",)),
    "text": Layout(("text",)),
    "document": Layout(("document",)),
}
FORMAT_ALIASES = {"sharegpt": "conversations", "chat": "messages", "instruction": "alpaca"}


@dataclass(frozen=True)
class TextExample:
    """A prompt (possibly empty) and the text that follows it.

    `running` text has no beginning or end of its own: it is cut into rows of full length instead of being truncated.
    """

    prompt: str
    completion: str
    running: bool = False


@dataclass(frozen=True)
class ChatExample:
    """A conversation for the tokenizer's chat template: dicts with `role` and `content`."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


Example = TextExample | ChatExample


def detect_format(record: Record, *, text_field: str = "text", where: str = "record 1") -> str:
    """The format whose fields the record has.

    Args:
        text_field: the field that holds the text of the `text` format.
        where: what the message calls this record.
    Raises: ValueError naming the fields found and the ones expected.
    """
    for name in LAYOUTS:
        if all(field in record for field in _layout(name, text_field).required):
            return name
    expected = "; ".join(f"{', '.join(_layout(name, text_field).required)} ({name})" for name in LAYOUTS)
    raise ValueError(f"{where} has the fields {_fields(record)}, but needs those of one format: {expected}")


def check_format_name(name: str) -> str:
    """The format's own name for a name or an alias; "auto" stays "auto".

    Raises: ValueError listing the known names.
    """
    name = FORMAT_ALIASES.get(name, name)
    if name != "auto" and name not in LAYOUTS:
        known = ", ".join(["auto", *LAYOUTS, *FORMAT_ALIASES])
        raise ValueError(f"unknown record format {name!r}; known are {known}")
    return name


def format_example(
    record: Record, *, format: str = "auto", text_field: str = "text", where: str = "the record"
) -> Example:
    """What a record says, whatever its layout.

    Raises: ValueError naming `where`, the fields found and those expected, or the value of the wrong type.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} must be an object with named fields, got {type(record).__name__}")
    name = check_format_name(format)
    if name == "auto":
        name = detect_format(record, text_field=text_field, where=where)
    missing = [field for field in _layout(name, text_field).required if field not in record]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(map(repr, missing))}: it has the fields {_fields(record)}, and the format "
            f"{name} needs {', '.join(_layout(name, text_field).required)}"
        )
    if name in ("messages", "conversations"):
        messages = _messages(record[name], sharegpt=name == "conversations", where=where)
        return ChatExample(messages, _tools(record.get("tools"), where))
    if name == "prompt":
        return TextExample(_text(record, "prompt", where), _text(record, "completion", where))
    if name == "alpaca":
        prompt = alpaca_prompt(_text(record, "instruction", where), _text(record, "input", where))
        return TextExample(prompt, _text(record, "output", where))
    if name == "dolly":
        prompt = alpaca_prompt(_text(record, "instruction", where), _text(record, "context", where))
        return TextExample(prompt, _text(record, "response", where))
    if name == "document":
        return TextExample("", _text(record, "document", where), running=True)
    return TextExample("", _text(record, text_field, where))


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's prompt; the paragraph about the input is left out where there is none."""
    if not input.strip():
        return ALPACA_PROMPT.format(instruction=instruction)
    return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction, input=input)


def _layout(name: str, text_field: str) -> Layout:
    return Layout((text_field,)) if name == "text" else LAYOUTS[name]


def _fields(record: Record) -> str:
    return ", ".join(repr(field) for field in record) or "none"


def _text(record: Record, field: str, where: str) -> str:
    """The text of a field; an absent optional field or a null one is empty."""
    value = record.get(field)
    if value is None and field in ("input", "context"):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # JSON writers leave the quotes off numeric answers
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be text, got {type(value).__name__}")
    return _whole_characters(value, f"{where}: {field!r}")


def _messages(value: Any, *, sharegpt: bool, where: str) -> tuple[Mapping[str, Any], ...]:
    """Messages with `role` and `content`; other keys of a `messages` entry (tool calls) pass through."""
    value = _parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{where}: a conversation must be a list of at least one message")
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    result = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or role_key not in message or content_key not in message:
            found = _fields(message) if isinstance(message, Mapping) else type(message).__name__
            raise ValueError(f"{where}, message {number}: needs {role_key!r} and {content_key!r}, has {found}")
        _check_content(message, content_key, f"{where}, message {number}")
        if not sharegpt:
            result.append(message)
            continue
        role = SHAREGPT_ROLES.get(str(message["from"]))
        if role is None:
            known = ", ".join(_unique(SHAREGPT_ROLES))
            raise ValueError(f"{where}, message {number}: unknown speaker {message['from']!r}; known are {known}")
        result.append({"role": role, "content": message["value"]})
    return tuple(result)


def _check_content(message: Record, key: str, where: str) -> None:
    """Raise unless it is text, a list of parts, or null beside tool calls: templates write null as "None"."""
    content = message[key]
    if isinstance(content, str):
        _whole_characters(content, where)
    elif not (isinstance(content, list) or (content is None and message.get("tool_calls"))):
        raise ValueError(f"{where}: {key!r} must be text, got {type(content).__name__}")


def _whole_characters(text: str, where: str) -> str:
    """The text itself. Raise if it holds half a surrogate pair, which JSON can escape and UTF-8 cannot say."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{where} holds half a character ({broken} at position {error.start}); repair the text"
        ) from None
    return text


def _tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...] | None:
    value = _parsed(value)
    if not value:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError(f"{where}: 'tools' must be a list of objects")
    return tuple(value)


def _parsed(value: Any) -> Any:
    """A list written as JSON text, as in a CSV cell, is read; anything else stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
