"""Which characters of a rendered conversation the assistant says.

A template that marks them, with `{% generation %}` blocks, is believed. Elsewhere they are found by rendering, never by
looking for the strings of a known format:

    1. The conversation is rendered as it is, and again with a private-use character (a mark) at the edges of each
       message's text. Without its marks the second must equal the first, or the marks are not used.
    2. A turn begins where the conversation before it, rendered with a generation prompt, would end: what that rendering
       writes behind its last mark stands behind the same mark of the whole. So a template may move text between
       messages, as Mistral's moves the system text to the last user's turn.
    3. What closes a turn is what the conversation up to it, and the whole, both write behind the turn's last mark.

What stands between two marks belongs to the template, so its split into closing and header is remembered: a
conversation of many turns, and a file of many conversations, costs two renderings each and a few more in all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from slothcore.data.chat import ChatTemplate, Message
from slothcore.data.marks import AFTER_THOUGHTS, BEGIN, END, REMEDY, MarkedConversation, mark_number

Tools = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Turn:
    """Characters of one assistant's turn in the rendered text.

    Attributes:
        start: where the assistant begins to write: behind the generation prompt.
        closing: no character before it closes the turn; the closing lies within [closing, end).
        end: where the template goes on with something else.
        complete: whether a conversation could end exactly here; else [closing, end) may hold the first characters of
            what follows.
    """

    start: int
    closing: int
    end: int
    complete: bool = True


class TurnFinder:
    """Finds the assistant's turns in conversations that one template renders."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._headers: dict[tuple[Any, ...], int] = {}
        self._closings: dict[tuple[Any, ...], tuple[int, bool]] = {}

    def render(self, messages: Sequence[Message], tools: Tools = None) -> tuple[Sequence[Message], str]:
        """The messages as the template can read them, and their text.

        Content in parts is given as it is to a template that reads parts, and as one text to one that does not.

        Raises: ValueError if the template rejects the conversation, or a part is no text.
        """
        if all(isinstance(message.get("content"), str | None) for message in messages):
            return messages, self._template.render(messages, tools=tools)
        messages = [_with_text_parts(message, index) for index, message in enumerate(messages)]
        joined = [{**m, "content": _joined(m["content"])} if m.get("content") is not None else m for m in messages]
        try:
            text = self._template.render(messages, tools=tools)
        except ValueError:
            return joined, self._template.render(joined, tools=tools)
        # A template that expects text writes a list in Python's notation.
        if any(isinstance(m.get("content"), list) and str(m["content"]) in text for m in messages):
            return joined, self._template.render(joined, tools=tools)
        # One that leaves the parts out here, as Mistral's does with a system text, may write them into the prompt.
        return (joined if self._renders(joined, tools) == text else messages), text

    def _renders(self, messages: Sequence[Message], tools: Tools) -> str | None:
        try:
            return self._template.render(messages, tools=tools)
        except ValueError:
            return None

    def find(self, messages: Sequence[Message], tools: Tools = None) -> tuple[str, list[Turn]]:
        """The rendered conversation, and the assistant's turns in it, in order.

        Raises: ValueError if the template rejects the conversation, or nothing tells its turns apart.
        """
        messages, text = self.render(messages, tools)
        if self._template.marks_generation:
            text, spans = self._template.render_generated(messages, tools=tools)
            return text, [Turn(start, end, end) for start, end in spans if start < end]
        if not any(message["role"] == "assistant" for message in messages):
            return text, []
        conversation = MarkedConversation(self._template, messages, tools, text)
        return conversation.whole.text, [
            self._turn(conversation, index) for index, message in enumerate(messages) if message["role"] == "assistant"
        ]

    def of_answers(self, messages: Sequence[Message], tools: Tools, turns: list[Turn], first: int) -> list[list[Turn]]:
        """What `find` gave, answer by answer from number `first` on.

        A template may write an answer in several `{% generation %}` blocks, or in none; which are its is seen where
        the conversation ends before it.

        Raises: ValueError if the blocks before it are others then.
        """
        if not self._template.marks_generation:
            return [[turn] for turn in turns[first:]]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        begins = [self._num_before(messages[:index], tools, turns) for index in answers[first:]]
        return [turns[begin:end] for begin, end in pairwise([*begins, len(turns)])]

    def _num_before(self, messages: Sequence[Message], tools: Tools, turns: list[Turn]) -> int:
        """How many of the turns stand in the first messages."""
        before = self.find(messages, tools)[1] if any(m["role"] == "assistant" for m in messages) else []
        if before != turns[: len(before)]:
            raise ValueError(
                "the chat template marks other words as the assistant's once other messages follow, so it is not clear "
                "which are whose; choose another chat_template, or drop the row"
            )
        return len(before)

    def _turn(self, conversation: MarkedConversation, index: int) -> Turn:
        start = self._start(conversation, index)
        end, complete = self._end(conversation, index)
        closing = max(start, conversation.whole.places.get(mark_number(index, END), start))
        if not start <= closing <= end:
            raise ValueError(
                f"the chat template does not write message {index + 1} in one piece behind the messages before it, so "
                f"the assistant's words cannot be told apart; {REMEDY}"
            )
        return Turn(start, closing, end, complete)

    def _start(self, conversation: MarkedConversation, index: int) -> int:
        whole = conversation.whole
        edges = (mark_number(index, edge) for edge in (BEGIN, AFTER_THOUGHTS))
        own = [whole.places[mark] for mark in edges if mark in whole.places]
        if index == 0:
            # Nothing can be rendered before the first message, so there is no prompt to compare with.
            if not own:
                raise ValueError(f"the conversation begins with an assistant's turn without text; {REMEDY}")
            return own[0]
        previous = mark_number(index - 1, END)
        key = None
        if previous in whole.places:
            key = (conversation.messages[index - 1]["role"], conversation.has_tools, whole.behind(previous))
            if key in self._headers:
                return whole.places[previous] + self._headers[key]
        try:
            prompt = conversation.rendering(index, add_generation_prompt=True)
        except ValueError:  # the template may refuse to stop here
            if own:
                return own[0]
            raise
        at = 0 if prompt.last is None else whole.places.get(prompt.last, -1)
        if at >= 0 and whole.text.startswith(prompt.tail, at):
            if key is not None and prompt.last == previous:
                self._headers[key] = len(prompt.tail)
            return at + len(prompt.tail)
        # The prompt goes on otherwise than the turn, such as with an open <think>; the words themselves are known.
        if own:
            return own[0]
        raise ValueError(
            f"the chat template writes message {index + 1} otherwise once other messages follow, so the assistant's "
            f"words cannot be told apart; {REMEDY}"
        )

    def _end(self, conversation: MarkedConversation, index: int) -> tuple[int, bool]:
        whole = conversation.whole
        if index == len(conversation.messages) - 1:
            return len(whole.text), True
        own = mark_number(index, END)
        key = None
        if own in whole.places:
            key = (conversation.messages[index + 1]["role"], conversation.has_tools, whole.behind(own))
            if key in self._closings:
                length, complete = self._closings[key]
                return whole.places[own] + length, complete
        part = conversation.rendering(index + 1)
        at = 0 if part.last is None else whole.places.get(part.last, -1)
        if at < 0:
            raise ValueError(f"the chat template repeats the text of message {index + 1}; {REMEDY}")
        length = _common_length(part.tail, whole.text, at)
        complete = length == len(part.tail)
        if key is not None and part.last == own:
            self._closings[key] = length, complete
        return at + length, complete


def _with_text_parts(message: Message, index: int) -> Message:
    """The message with every part as an object with `text`. Raises ValueError for a part that is something else."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"message {index + 1} has a part of type {kind}; only text can be learned from, take it out"
            )
    return {**message, "content": parts}


def _joined(content: Any) -> Any:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _common_length(tail: str, text: str, at: int) -> int:
    """How many characters `tail` shares with `text` from `at` on."""
    if text.startswith(tail, at):
        return len(tail)
    for index, (a, b) in enumerate(zip(tail, text[at : at + len(tail)], strict=False)):
        if a != b:
            return index
    return min(len(tail), len(text) - at)
