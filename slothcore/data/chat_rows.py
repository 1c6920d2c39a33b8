"""Conversations to token ids with labels: which tokens of a rendered conversation are learned.

Of an assistant's turn that is every token from the end of the prompt up to and including the one that ends the turn.
What a template writes behind that token (a newline, the end of the whole conversation) is not learned: generation has
stopped by then.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from slothcore.data.chat import REASONING_NAMES, ChatTemplate, Message
from slothcore.data.formats import ChatExample
from slothcore.data.spans import Turn, TurnFinder
from slothcore.data.tokenizer import Tokenizer

IGNORED_LABEL = -100
# Rendered to see how a template closes a turn.
PROBE = ChatExample(tuple({"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate("abcd")))

# All tokens; every assistant's turn; the last of them.
Learned = Literal["all", "turns", "last turn"]


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids and labels of one document, equally long."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_targets(self) -> int:
        """Labels that are learned; the first token is predicted by nothing."""
        return len(self.labels) - self.labels.count(IGNORED_LABEL) - (self.labels[:1] not in ([], [IGNORED_LABEL]))


class ChatRows:
    """Makes rows of conversations, many at a time."""

    def __init__(self, tokenizer: Tokenizer, learned: Learned, *, probing: bool = False) -> None:
        self._tokenizer = tokenizer
        self._learned = learned
        self._probing = probing
        self._finders: dict[int, TurnFinder] = {}

    def render(self, example: ChatExample) -> tuple[str, list[Turn]]:
        """The text of a conversation and the turns to learn; where all is learned, those not to learn.

        Raises: ValueError if the tokenizer has no chat template, it rejects the conversation, or its turns cannot be
            told apart.
        """
        finder = self._finder(self._tokenizer.template_for(example.tools))
        learns_all = self._learned == "all"
        left_out = _left_out(example, learns_all)
        try:
            text, turns = finder.find(example.messages, example.tools)
        except ValueError:
            if learns_all and not any(left_out):  # where nothing needs to be told apart, the plain text will do
                return finder.render(example.messages, example.tools)[1], []
            raise
        if self._learned != "last turn" and not any(left_out):
            return text, [] if learns_all else turns
        first = max(len(left_out) - 1, 0) if self._learned == "last turn" else 0
        answers = zip(finder.of_answers(example.messages, example.tools, turns, first), left_out[first:], strict=True)
        return text, [turn for answer, is_out in answers if is_out == learns_all for turn in answer]

    def tokenise(self, rendered: Sequence[tuple[str, list[Turn]]]) -> list[TokenizedRow]:
        """Rows of any length, one for each of what `render` gave; all are encoded in one call."""
        encoded = self._tokenizer.encode_with_ends([text for text, _ in rendered])
        rows = []
        for (text, turns), (ids, ends) in zip(rendered, encoded, strict=True):
            ignored = [IGNORED_LABEL] * len(ids)
            labels, others = (list(ids), ignored) if self._learned == "all" else (ignored, ids)
            for turn in turns:
                tokens = self._tokens_of(turn, text, ids, ends)
                labels[tokens] = others[tokens]
            rows.append(TokenizedRow(ids, labels))
        return rows

    @cached_property
    def _usual_end(self) -> int | str | None:
        return None if self._probing else turn_end(self._tokenizer)

    def _finder(self, template: ChatTemplate) -> TurnFinder:
        # Kept with its template, so the number of one that is gone is not met again.
        return self._finders.setdefault(id(template), TurnFinder(template))

    def _tokens_of(self, turn: Turn, text: str, ids: Sequence[int], ends: Sequence[int]) -> slice:
        """The tokens of a turn.

        Where a token ends is known, and it begins where the one before it ends: some tokenizers leave spaces out of
        a token's own beginning. A token across the edge of the turn belongs to it, since without it a word would not
        be learned; but a special token that swallowed the words' first spaces, as Phi-3's do, is none of them.
        """
        special = self._tokenizer.special_token_ids
        first = bisect_right(ends, turn.start)
        if first < len(ids) and ids[first] in special and first and ends[first - 1] < turn.start:
            first += 1
        # From the back: special tokens and spaces close the turn, and the first of those tokens ends it; but one that
        # closes a list of tool calls is followed by the one that ends every turn.
        last, usual = None, False
        token = bisect_right(ends, turn.end) - 1
        while token >= first and ends[token] > turn.closing:
            if ids[token] in special:
                last = last if usual else token
                usual = usual or ids[token] == self._usual_end
            elif text[max(ends[token - 1], turn.closing) if token else 0 : ends[token]].strip():
                break
            token -= 1
        if last is not None:
            return slice(first, last + 1)
        end = _end_of_text(text, turn)
        return slice(first, max(bisect_right(ends, end), min(bisect_left(ends, end) + 1, len(ends))))


def leaves_out_thoughts(messages: Sequence[Message], text: str) -> bool:
    """Whether the assistant thinks in a field of its own, and nothing of that is in the text of the conversation."""
    fields = [message.get(name) for message in messages for name in REASONING_NAMES]
    thoughts = [field.strip() for field in fields if isinstance(field, str) and field.strip()]
    return bool(thoughts) and not any(thought in text for thought in thoughts)


def turn_end(tokenizer: Tokenizer) -> int | str | None:
    """What the tokenizer's chat template ends an assistant's turn with: a token's id, or a text that is not one token.

    None if there is no template, it rejects a plain conversation, or writes nothing behind an answer.
    """
    chats = ChatRows(tokenizer, "turns", probing=True)
    try:
        text, turns = chats.render(PROBE)
    except ValueError:
        return None
    row = chats.tokenise([(text, turns[:1])])[0]
    learned = [label for label in row.labels if label != IGNORED_LABEL]
    if not learned or learned[-1] in tokenizer.special_token_ids:
        return learned[-1] if learned else None
    return text[turns[0].closing : _end_of_text(text, turns[0])].strip() or None


def _left_out(example: ChatExample, learns_all: bool) -> list[bool]:
    """Of each answer whether it is not to be learned. The weights of other messages are 0 in most data anyway."""
    answers = [message for message in example.messages if message["role"] == "assistant"]
    prompt = 0 if learns_all else example.prompt_answers
    return [index < prompt or message.get("weight", 1) == 0 for index, message in enumerate(answers)]


def _end_of_text(text: str, turn: Turn) -> int:
    """Where a turn ends that no special token closes: behind the text that does, or the spaces if they do."""
    closing = text[turn.closing : turn.end]
    if not turn.complete and closing.split():
        # The first letters of what follows may agree with the closing by chance: "<" of "<end>" and "<user>".
        closing = closing[: max(closing.rfind(" "), closing.rfind("\n")) + 1] or closing
    return turn.closing + len(closing.rstrip() or closing)
