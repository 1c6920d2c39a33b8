"""Layouts of training records, and what each becomes.

| format        | fields                                                | becomes                                  |
| ------------- | ----------------------------------------------------- | ---------------------------------------- |
| preference    | chosen, rejected; prompt, messages, ... beside them   | what the chosen answer makes of the rest |
| kto           | label or kto_tag beside any layout with an answer     | that layout, if the answer is good       |
| messages      | messages: [{role, content}]; tools, system optional   | a conversation                           |
| conversations | conversations: [{from, value}] (ShareGPT); the same   | a conversation                           |
| conversation  | conversation: either kind of message; the same        | a conversation                           |
| prompt        | prompt, completion; both text, or both messages       | a prompt and its completion              |
| alpaca        | instruction, output; input optional                   | the same, through Alpaca's template      |
| dolly         | instruction, response; context optional               | the same, through Alpaca's template      |
| question      | question, answer (gsm8k)                              | the same, through Alpaca's template      |
| reply         | question, response                                    | the same, through Alpaca's template      |
| query         | query, response                                       | the same, through Alpaca's template      |
| response      | prompt, response                                      | the same, through Alpaca's template      |
| input         | input, output                                         | the same, through Alpaca's template      |
| text          | text                                                  | a text, every token a target             |
| document      | document                                              | running text, cut into full rows         |

Layouts that go through Alpaca's template may have a system prompt (`system`, `system_prompt`), which stands before it.
Of a prompt nothing is learned; of one in messages, none of the answers in it, nor of those before the one that was
chosen or judged. Fields beyond these are ignored. Records are numbered from 1 in messages to the user.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slothcore.data.conversations import is_answer, read_messages, read_tools
from slothcore.data.preferences import (
    CONVERSATIONS,
    PROMPT_FIELD,
    VERDICTS,
    chosen_record,
    judged_record,
    prompt_record,
    verdict,
)
from slothcore.data.values import Record, field_names, parsed, text_value

__all__ = [
    "LAYOUTS",
    "PIECE_FIELD",
    "ChatExample",
    "Example",
    "Record",
    "TextExample",
    "alpaca_prompt",
    "check_format_name",
    "detect_format",
    "format_example",
]

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


@dataclass(frozen=True)
class Layout:
    """The fields that mark a format (all must be there) and those that may be there."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


# In the order of recognition: a record that fits two, fits the first.
LAYOUTS = {
    "preference": Layout(("chosen", "rejected")),
    "kto": Layout(VERDICTS[:1]),
    "messages": Layout(("messages",), ("tools", "system")),
    "conversations": Layout(("conversations",), ("tools", "system")),
    "conversation": Layout(("conversation",), ("tools", "system")),
    "prompt": Layout(("prompt", "completion")),
    "alpaca": Layout(("instruction", "output"), ("input",)),
    "dolly": Layout(("instruction", "response"), ("context",)),
    "question": Layout(("question", "answer")),
    "reply": Layout(("question", "response")),
    "query": Layout(("query", "response")),
    "response": Layout(("prompt", "response")),
    "input": Layout(("input", "output")),
    "text": Layout(("text",)),
    "document": Layout(("document",)),
}
# Beside the document of a piece: which one it is, as the fields of a `TextExample` say it.
PIECE_FIELD = "piece of the document"
FORMAT_ALIASES = {"sharegpt": "conversations", "chat": "messages", "instruction": "alpaca", "dpo": "preference"}
# Layouts of a question and an answer: both fields, and the one that may hold more about the question.
INSTRUCTIONS = {
    "alpaca": ("instruction", "output", "input"),
    "dolly": ("instruction", "response", "context"),
    "question": ("question", "answer", "context"),
    "reply": ("question", "response", "context"),
    "query": ("query", "response", "context"),
    "response": ("prompt", "response", "context"),
    "input": ("input", "output", None),
}


@dataclass(frozen=True)
class TextExample:
    """A prompt (possibly empty) and the text that follows it.

    `running` text has no beginning or end of its own: it is cut into rows of full length instead of being truncated.
    A long one comes in pieces, of which this is number `part`, with the end of the text `before` it.
    """

    prompt: str
    completion: str
    running: bool = False
    part: int = 0
    last: bool = True
    before: str = ""


@dataclass(frozen=True)
class ChatExample:
    """A conversation for the tokenizer's chat template: dicts with `role` and `content`.

    Its first `prompt_answers` answers stand in a prompt, of which nothing is learned unless everything is.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt_answers: int = 0


Example = TextExample | ChatExample


def detect_format(record: Record, *, text_field: str = "text", where: str = "record 1") -> str:
    """The format whose fields the record has.

    Args:
        text_field: the field that holds the text of the `text` format.
        where: what the message calls this record.
    Raises: ValueError naming the fields found and the ones expected.
    """
    plain = _plain_format(record, text_field)
    if "chosen" in record and "rejected" in record:
        return "preference"
    if plain in (None, "text", "document"):
        if plain is None:
            # A verdict is no record by itself: it stands beside the fields of another layout.
            names = [name for name in LAYOUTS if name != "kto"]
            expected = "; ".join(f"{', '.join(_required(name, text_field))} ({name})" for name in names)
            raise ValueError(
                f"{where} has the fields {field_names(record)}, but needs those of one format: {expected}; rename "
                "them, or say with prompt_template and completion_template what they are"
            )
        return plain
    # A label beside an answer judges it; beside a bare text it is a class, and nothing that is trained here.
    return "kto" if verdict(record) is not None else plain


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

    Raises: ValueError naming `where`, the fields found and those expected, or the value of the wrong type; or for an
        answer that was judged bad.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} must be an object with named fields, got {type(record).__name__}")
    name = check_format_name(format)
    if name == "auto":
        name = detect_format(record, text_field=text_field, where=where)
    if name == "kto":
        return _judged_example(record, text_field, where)
    missing = [field for field in _required(name, text_field) if field not in record]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(map(repr, missing))}: it has the fields {field_names(record)}, and the format "
            f"{name} needs {', '.join(_required(name, text_field))}; rename the fields, or choose another format"
        )
    if name == "preference":
        return format_example(chosen_record(record, where), text_field=text_field, where=where)
    if name in CONVERSATIONS:
        return _chat_example(record, name, where)
    if name == "prompt":
        conversation = prompt_record(record, where)
        if conversation is not record:
            return _chat_example(conversation, "messages", where)
        return TextExample(text_value(record, "prompt", where), text_value(record, "completion", where))
    if name in INSTRUCTIONS:
        return _instruction_example(record, *INSTRUCTIONS[name], where=where)
    if name == "document":
        text = text_value(record, "document", where)
        return TextExample("", text, running=True, **record.get(PIECE_FIELD, {}))
    return TextExample("", text_value(record, text_field, where))


def plain_record(
    record: Record, *, format: str = "auto", text_field: str = "text", where: str = "the record"
) -> tuple[str, Record]:
    """The format of a record and the record; of preference data, those that its chosen answer makes.

    A prompt and its completion in messages are a conversation.
    """
    name = check_format_name(format)
    if name == "auto":
        name = detect_format(record, text_field=text_field, where=where)
    if name == "prompt" and "prompt" in record and "completion" in record:
        conversation = prompt_record(record, where)
        return ("prompt", record) if conversation is record else ("messages", conversation)
    if name not in ("preference", "kto"):
        return name, record
    plain = chosen_record(record, where) if name == "preference" else judged_record(record)
    return plain_record(plain, text_field=text_field, where=where)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's prompt; the paragraph about the input is left out where there is none."""
    if not input.strip():
        return ALPACA_PROMPT.format(instruction=instruction)
    return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction, input=input)


def _judged_example(record: Record, text_field: str, where: str) -> Example:
    good = verdict(record)
    if good is None:
        raise ValueError(f"{where}: 'label' must be true or false; say there whether the answer is good")
    if not good:
        raise ValueError(f"{where}: 'label' says that the answer is bad, so it is not to be learned; drop the row")
    return format_example(judged_record(record), text_field=text_field, where=where)


def _chat_example(record: Record, name: str, where: str) -> ChatExample:
    system = _system_field(record)
    messages = read_messages(record[name], where=where, system=record.get(system))
    length = record.get(PROMPT_FIELD, 0)
    answers = sum(map(is_answer, parsed(record[name])[:length])) if length else 0
    return ChatExample(messages, read_tools(record.get("tools"), where), answers)


def _instruction_example(record: Record, question: str, answer: str, context: str | None, *, where: str) -> TextExample:
    more = (
        text_value(record, context, where, optional=True)
        if context and not (context == "context" and _is_table(record.get(context)))
        else ""
    )
    prompt = alpaca_prompt(text_value(record, question, where), more)
    system = _system_field(record)
    if isinstance(record.get(system), str) and record[system].strip():
        prompt = f"{text_value(record, system, where).strip()}\n\n{prompt}"
    return TextExample(prompt, text_value(record, answer, where))


def _system_field(record: Record) -> str:
    """The field of the system prompt: tables may have both, and fill only one."""
    return "system" if record.get("system") or not record.get("system_prompt") else "system_prompt"


def _is_table(value: Any) -> bool:
    """Whether a field that should hold context holds search results or the like, which are no text."""
    return isinstance(value, Mapping | list)


def _plain_format(record: Record, text_field: str) -> str | None:
    """The first layout, verdicts and pairs of answers aside, whose fields the record has."""
    for name in LAYOUTS:
        if name not in ("preference", "kto") and all(field in record for field in _required(name, text_field)):
            return name
    return None


def _required(name: str, text_field: str) -> tuple[str, ...]:
    return (text_field,) if name == "text" else LAYOUTS[name].required
