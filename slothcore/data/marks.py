"""Conversations rendered with marks: one private-use character at each edge of a message's text.

A mark survives what templates do with a text (join, trim, write as JSON), and nothing else in a conversation looks like
it. Whatever a template does differently because of the marks shows as a difference between the text without them and
the plain rendering; then the marks are not believed.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slothcore.data.chat import ChatTemplate, Message

# Unicode's two planes for private use. No published template or tokenizer gives their characters a meaning.
PLANES = ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
THOUGHTS_END = "</think>"
# Marks of one message: where its text begins, where the text behind its thoughts begins, where all ends.
BEGIN, AFTER_THOUGHTS, END = range(3)
MARKS_EACH = 3
# Whose messages get which marks: the first attempt that leaves the template's text as it is.
ATTEMPTS: tuple[tuple[tuple[str, ...] | None, tuple[int, ...]], ...] = (
    (None, (BEGIN, AFTER_THOUGHTS, END)),
    (("assistant",), (BEGIN, AFTER_THOUGHTS, END)),
    (("assistant",), (END,)),
)
REMEDY = (
    "set completion_only_loss to false, or give a chat_template that writes them between {% generation %} and "
    "{% endgeneration %}"
)


@dataclass(frozen=True)
class Rendering:
    """A text without its marks.

    Attributes:
        places, following: where each mark was, and where the next one was; a mark that was there twice has no place.
        last: the last mark that has a place.
        seen: every mark.
    """

    text: str
    places: Mapping[int, int]
    following: Mapping[int, int]
    last: int | None
    seen: frozenset[int]

    def behind(self, mark: int) -> str:
        """What stands between this mark and the next."""
        return self.text[self.places[mark] : self.following[mark]]

    @property
    def tail(self) -> str:
        """What stands behind the last mark."""
        return self.text if self.last is None else self.text[self.places[self.last] :]


class MarkedConversation:
    """One conversation, rendered whole and marked, and as far as asked."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
    ) -> None:
        self.messages = messages
        self.has_tools = tools is not None
        self._template = template
        self._tools = tools
        self._first, last = _free_plane(text, MARKS_EACH * len(messages))
        self._pattern = re.compile(f"[{chr(self._first)}-{chr(last)}]")
        # A template may look at a text before it writes it, as Qwen3's does for a user's <tool_response> and others for
        # an answer that starts with <think>; then fewer marks are in its way.
        for roles, edges in ATTEMPTS:
            self._marked = [
                _marked(
                    message, [chr(self._first + mark) if mark % MARKS_EACH in edges else "" for mark in marks_of(i)]
                )
                if roles is None or message["role"] in roles
                else message
                for i, message in enumerate(messages)
            ]
            try:
                self.whole = self.rendering(len(messages))
            except ValueError:
                continue
            if self.whole.text == text:
                self._check_that_all_is_written()
                return
        raise ValueError(
            "the chat template does more with the assistant's text than to write it, so its words cannot be told "
            f"apart; {REMEDY}"
        )

    def rendering(self, count: int, *, add_generation_prompt: bool = False) -> Rendering:
        """The first `count` messages."""
        marked = self._template.render(
            self._marked[:count], tools=self._tools, add_generation_prompt=add_generation_prompt
        )
        found = [(ord(m.group()) - self._first, m.start() - i) for i, m in enumerate(self._pattern.finditer(marked))]
        return _rendering(self._pattern.sub("", marked), found)

    def _check_that_all_is_written(self) -> None:
        """Raise if the template silently leaves out a message: such a row would teach an answer to nothing."""
        left_out = self._left_out()
        if left_out is not None and self.messages[-1]["role"] == "assistant":
            self.whole = self._answer_behind_its_prompt()
            left_out = self._left_out()
        if left_out is not None:
            message = self.messages[left_out]
            what = "the tool calls" if message.get("tool_calls") else f"the text (role {message['role']!r})"
            raise ValueError(
                f"the chat template leaves out {what} of message {left_out + 1}; take the message out, or give a "
                "chat_template that writes it"
            )

    def _left_out(self) -> int | None:
        for index, (message, marked) in enumerate(zip(self.messages, self._marked, strict=True)):
            if marked is not message and mark_number(index, END) not in self.whole.seen:
                return index
        return None

    def _answer_behind_its_prompt(self) -> Rendering:
        """The last answer behind the prompt that it answers, which is what the model sees when it is asked.

        The template of Mistral v0.3 writes the system text into the last message only if that is the user's, so
        into prompts, and leaves it out of conversations that end with an answer.
        """
        prompt = self.rendering(len(self.messages) - 1, add_generation_prompt=True)
        at = -1 if prompt.last is None else self.whole.places.get(prompt.last, -1)
        if at < 0 or not self.whole.text.startswith(prompt.tail, at):
            return self.whole
        begin = at + len(prompt.tail)
        shift = len(prompt.text) - begin
        answer = [(mark, place + shift) for mark, place in self.whole.places.items() if place >= begin]
        return _rendering(prompt.text + self.whole.text[begin:], [*prompt.places.items(), *answer])


def _rendering(text: str, found: Sequence[tuple[int, int]]) -> Rendering:
    """`found` are the marks and their places in the text without them, in order."""
    places = single = dict(found)
    if len(places) < len(found):
        times = Counter(mark for mark, _ in found)
        single = {mark: place for mark, place in found if times[mark] == 1}
    following = dict(zip(single, [*single.values(), len(text)][1:], strict=True))
    return Rendering(text, single, following, next(reversed(single), None), frozenset(places))


def marks_of(index: int) -> range:
    return range(MARKS_EACH * index, MARKS_EACH * (index + 1))


def mark_number(index: int, edge: int) -> int:
    """The mark at an edge (`BEGIN`, `AFTER_THOUGHTS`, `END`) of message `index`."""
    return MARKS_EACH * index + edge


def _free_plane(text: str, needed: int) -> tuple[int, int]:
    for first, last in PLANES:
        if needed <= last - first and (text.isascii() or not re.search(f"[{chr(first)}-{chr(last)}]", text)):
            return first, last
    raise ValueError(
        "the conversation has too many messages, or characters of both of Unicode's planes for private use, so its "
        "turns cannot be told apart; split it, or set completion_only_loss to false"
    )


def _marked(message: Message, marks: Sequence[str]) -> Message:
    """The message with marks around its text, inside its margins, which many templates trim.

    Where it calls tools, the name of the last tool is its end. The message itself if there is nothing to mark: a
    template may ask whether there is any text.
    """
    content, calls = message.get("content"), message.get("tool_calls")
    begin, _, end = marks
    if calls and isinstance(calls, Sequence):
        message = {**message, "tool_calls": _marked_calls(calls, end)}
        end = ""
    if isinstance(content, str) and content.strip():
        return {**message, "content": _around(content, begin, marks[1], end)}
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = list(content)
        written = [place for place, part in enumerate(parts) if part["text"].strip()]
        for place in dict.fromkeys(written[:1] + written[-1:]):
            edges = begin if place == written[0] else "", marks[1], end if place == written[-1] else ""
            parts[place] = {**parts[place], "text": _around(parts[place]["text"], *edges)}
        return {**message, "content": parts} if written else message
    return message


def _around(text: str, begin: str, after_thoughts: str, end: str) -> str:
    words = text.strip()
    lead, trail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    thoughts, tag, answer = words.rpartition(THOUGHTS_END)
    if tag and answer.strip():
        space = answer[: len(answer) - len(answer.lstrip())]
        words = f"{thoughts}{tag}{space}{after_thoughts}{answer.lstrip()}"
    return f"{lead}{begin}{words}{end}{trail}"


def _marked_calls(calls: Sequence[Any], mark: str) -> Sequence[Any]:
    """The calls with a mark behind the name of the last."""
    last = calls[-1]
    if not isinstance(last, Mapping):
        return calls
    if isinstance(last.get("function"), Mapping):
        return [*calls[:-1], {**last, "function": _marked_calls([last["function"]], mark)[0]}]
    return [*calls[:-1], {**last, "name": f"{last['name']}{mark}"}] if isinstance(last.get("name"), str) else calls
