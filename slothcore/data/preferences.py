"""Preference data as data to imitate: of two answers the chosen one, of judged answers the good ones.

Paired (DPO): `chosen` and `rejected`, each an answer (text, or one message), or a whole conversation, beside any of the
layouts that hold a question. Judged (KTO): any layout with an answer, and `label` or `kto_tag`, true or false.
"""

from collections.abc import Mapping
from typing import Any

from slothcore.data.conversations import as_prompt
from slothcore.data.values import Record, boolean, field_names, parsed

VERDICTS = ("label", "kto_tag")
CONVERSATIONS = ("messages", "conversations", "conversation")
# The field of a question, and the one of its answer in the same layout.
ANSWERS = {
    "instruction": "output",
    "prompt": "completion",
    "question": "answer",
    "query": "response",
    "input": "output",
}


def verdict(record: Record) -> bool | None:
    """Whether the record's answer was judged good; None if nothing was judged."""
    for field in VERDICTS:
        if (found := boolean(record.get(field))) is not None:
            return found
    return None


def judged_record(record: Record) -> Record:
    """The record without its verdict."""
    return {key: value for key, value in record.items() if key not in VERDICTS}


def chosen_record(record: Record, where: str) -> Record:
    """The record of a plain layout that the chosen answer makes.

    Raises: ValueError if the chosen answer is neither text nor messages.
    """
    chosen = parsed(record["chosen"])
    rest = {key: value for key, value in record.items() if key not in ("chosen", "rejected")}
    earlier = next((parsed(rest[field]) for field in (*CONVERSATIONS, "prompt") if field in rest), None)
    if isinstance(chosen, str):
        if isinstance(earlier, list):
            return _conversation(rest, [*as_prompt(earlier), {"role": "assistant", "content": chosen}])
        question = next((field for field in ANSWERS if field in rest), None)
        if question is None:
            return {"text": chosen}  # the whole dialogue is written out twice, as in Anthropic's hh-rlhf
        fields = ("instruction", "input", "context", "system", "system_prompt", question)
        return {**{field: rest[field] for field in fields if field in rest}, ANSWERS[question]: chosen}
    turns = [chosen] if isinstance(chosen, Mapping) else chosen
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(
            f"{where}: 'chosen' must be an answer or a list of messages, got {type(chosen).__name__} "
            f"beside {field_names(rest)}; write the chosen answer as text"
        )
    if isinstance(earlier, list):
        answers = turns[len(earlier) :] if turns[: len(earlier)] == earlier else turns
        return _conversation(rest, [*as_prompt(earlier), *answers])
    if isinstance(earlier, str) and _speaker(turns[0]) in ("assistant", "gpt"):
        return _conversation(rest, [{"role": "user", "content": earlier}, *turns])
    return _conversation(rest, turns)


def _conversation(rest: Record, messages: list[Any]) -> Record:
    kept = {field: rest[field] for field in ("tools", "system") if field in rest}
    return {**kept, "messages": messages}


def _speaker(message: Mapping[str, Any]) -> str:
    return str(message.get("role", message.get("from", ""))).lower()
