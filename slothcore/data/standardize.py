"""Any records to messages."""

from collections.abc import Iterable
from typing import Any

from slothcore.data.dataset import open_dataset
from slothcore.data.formats import INSTRUCTIONS, Record, TextExample, format_example, plain_record
from slothcore.data.values import text_value


def standardize(records: Iterable[Record], format: str = "auto", *, text_field: str = "text") -> list[dict[str, Any]]:
    """Conversations in the spelling of OpenAI, whatever the layout of the records (`formats.LAYOUTS`).

    A question and its answer become a turn of the user and one of the assistant, without a template's words around
    them; what explains the question follows it after an empty line. A text becomes the assistant's only turn. Answers
    that were rejected or judged bad, and empty ones, are left out.

    Args:
        records: mappings; all of one layout or each of its own.
    Returns: for each record {"messages": [{"role", "content", ...}, ...]}, and "tools" where it has some.
    Raises: ValueError with the number of the record, what is wrong with it and the remedy.
    """
    dataset = open_dataset(records, format, text_field=text_field)
    return [
        _conversation(record, part.reading.format, text_field, where)
        for part in dataset.parts
        for where, record in part.chosen()
    ]


def _conversation(record: Record, format: str, text_field: str, where: str) -> dict[str, Any]:
    name, record = plain_record(record, format=format, text_field=text_field, where=where)
    if name in INSTRUCTIONS:
        question, answer, context = INSTRUCTIONS[name]
        turns = [
            _turn("user", text_value(record, question, where)),
            _turn("assistant", text_value(record, answer, where)),
        ]
        more = record.get(context) if context else None
        if isinstance(more, str) and more.strip():
            turns[0]["content"] += f"\n\n{more}"
        return {"messages": [*_system(record), *turns]}
    example = format_example(record, format=name, text_field=text_field, where=where)
    if isinstance(example, TextExample):
        prompt = [*_system(record), _turn("user", example.prompt)] if example.prompt else []
        return {"messages": [*prompt, _turn("assistant", example.completion)]}
    messages = [dict(message) for message in example.messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    for message in answers[: example.prompt_answers]:
        message["weight"] = 0
    return {"messages": messages, **({"tools": list(example.tools)} if example.tools else {})}


def _system(record: Record) -> list[dict[str, Any]]:
    system = record.get("system") or record.get("system_prompt")
    return [_turn("system", system)] if isinstance(system, str) and system.strip() else []


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
