"""Preference data as data to imitate: of two answers the chosen one, of judged answers the good ones.

Paired (DPO): `chosen` and `rejected`, each an answer (text, or one message), or a whole conversation, beside any of the
layouts that hold a question. Judged (KTO): any layout with an answer, and `label` or `kto_tag`, true or false. Of a
conversation the last answer is judged.

What stands before the answer is a prompt, of which nothing is learned; so is what chosen and rejected both begin with.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from slothcore.data.conversations import is_answer, parsed_messages
from slothcore.data.values import Record, boolean, field_names, parsed

VERDICTS = ("label", "kto_tag")
CONVERSATIONS = ("messages", "conversations", "conversation")
# Beside a conversation: how many of its messages are the prompt.
PROMPT_FIELD = "messages of the prompt"
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
    """The record without its verdict; of a conversation all before the last answer is a prompt."""
    rest = {key: value for key, value in record.items() if key not in VERDICTS}
    name = next((field for field in CONVERSATIONS if field in rest), None)
    messages = parsed(rest[name]) if name is not None else None
    answers = _places_of_answers(messages)
    return {**rest, PROMPT_FIELD: answers[-1]} if answers else rest


def prompt_record(record: Record, where: str) -> Record:
    """The conversation that a prompt and a completion in messages are; a record with both in text as it is.

    Raises: ValueError if one is a list of messages and the other text.
    """
    prompt, completion = parsed_messages(record["prompt"]), parsed_messages(record["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(record, completion, prompt)
    for messages, text in (("prompt", "completion"), ("completion", "prompt")):
        value = record[messages]
        if isinstance(value, list) and all(isinstance(m, Mapping) for m in value) and isinstance(record[text], str):
            raise ValueError(
                f"{where}: {messages!r} holds messages and {text!r} text; write both as messages, or both as text"
            )
    return record


def chosen_record(record: Record, where: str) -> Record:
    """The record of a plain layout that the chosen answer makes.

    Raises: ValueError if the chosen answer is neither text nor messages.
    """
    chosen = parsed_messages(record["chosen"])
    rest = {key: value for key, value in record.items() if key not in ("chosen", "rejected")}
    earlier = next((parsed_messages(rest[field]) for field in (*CONVERSATIONS, "prompt") if rest.get(field)), None)
    if isinstance(chosen, str):
        if isinstance(earlier, list):
            return _conversation(rest, [{"role": "assistant", "content": chosen}], earlier)
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
    # Beside `prompt`, `messages` may be the chosen conversation once more, as in ultrafeedback_binarized.
    if isinstance(earlier, list) and earlier[: len(turns)] != turns:
        return _conversation(rest, turns[len(earlier) :] if turns[: len(earlier)] == earlier else turns, earlier)
    if isinstance(earlier, str) and is_answer(turns[0]):
        return _conversation(rest, turns, [{"role": "user", "content": earlier}])
    shared = _num_shared(turns, parsed_messages(record["rejected"]))
    return _conversation(rest, turns[shared:], turns[:shared])


def _conversation(rest: Record, answers: list[Any], prompt: list[Any]) -> Record:
    kept = {field: rest[field] for field in ("tools", "system", "system_prompt") if field in rest}
    return {**kept, "messages": [*prompt, *answers], PROMPT_FIELD: len(prompt)}


def _num_shared(chosen: list[Any], rejected: Any) -> int:
    """How many messages both conversations begin with; the last answer of `chosen` is not among them."""
    most = _places_of_answers(chosen) or [0]
    pairs = zip(chosen[: most[-1]], rejected if isinstance(rejected, list) else (), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _places_of_answers(messages: Any) -> list[int]:
    return [place for place, message in enumerate(messages) if is_answer(message)] if isinstance(messages, list) else []
