"""Token ids that come one by one, as text that may be shown: whole characters that no later token changes."""

import re
from collections.abc import Iterator, Sequence

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.endings import Endings

# What decoding writes for bytes that are no character, or not one yet.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# How vocabularies of sentencepiece spell a byte that no token stands for.
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Of a long answer the end alone is decoded again: so many tokens, and before them some that show how it joins on.
LONGEST_END, JOINT = 48, 16


def joint_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """What tells a decoder that words stand before those to come: the last whole character's token, or nothing.

    Decoders as sentencepiece's leave out the space that begins a text. What goes on with words begins none; what
    follows a control token does.
    """
    for token in reversed(prompt):
        if token in tokenizer.special_token_ids:
            break
        if INCOMPLETE not in tokenizer.decode([token]):
            return [token]
    return []


def text_behind(tokenizer: Tokenizer, joint: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they follow `joint`, which `joint_of` gave."""
    return tokenizer.decode([*joint, *ids])[len(tokenizer.decode(joint)) :]


class TextPieces:
    """Takes the tokens of an answer and gives its text in pieces; joined, they are the decoded and cut text.

    A character of several bytes may be spread over tokens, so what ends in an incomplete one waits; where bytes are
    tokens of their own, the whole run of them waits, because one that does not fit spoils the characters before it.
    What may begin a stop string waits until it is one or is not.

    Args:
        behind: the tokens of a text that goes on with these; an answer to a question is a text of its own.
    Attributes:
        text: all that was given out.
        ended: whether the answer came to its end, by a token or a string that ends it; nothing comes behind it.
    """

    def __init__(self, tokenizer: Tokenizer, endings: Endings, *, behind: Sequence[int] = ()) -> None:
        self.tokenizer, self.endings = tokenizer, endings
        self.text = ""
        self.ended = False
        self._ids = joint_of(tokenizer, behind)
        self._first = len(self._ids)
        # The text of the first `_kept` ids, and what the last of these decode to where they begin a text.
        self._before, self._kept, self._joint, self._joint_from = "", self._first, tokenizer.decode(self._ids), 0

    def take(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of an answer as its tokens come, no piece empty; takes no token behind the one that ends it."""
        for token in tokens:
            if piece := self.add(token):
                yield piece
            if self.ended:
                return
        if piece := self.finish():
            yield piece

    def add(self, token: int) -> str:
        """The text that may be shown now; empty if it has to wait."""
        if token in self.endings.eos_ids:
            piece = self.finish()
            self.ended = True
            return piece
        self._ids.append(token)
        whole = self._decoded(self._settled()).rstrip(INCOMPLETE)
        shown = self.endings.cut(whole)
        self.ended = shown != whole
        if not self.ended:
            shown = whole[: len(whole) - self.endings.begun(whole)]
        return self._give(shown)

    def finish(self) -> str:
        """What had to wait, now that no token comes any more."""
        return "" if self.ended else self._give(self.endings.cut(self._decoded(len(self._ids))))

    def _decoded(self, count: int) -> str:
        """The text of the first `count` ids, of which the earliest are not decoded again where there are many."""
        if count < self._kept:  # a run of bytes that reaches back
            return text_behind(self.tokenizer, self._ids[: self._first], self._ids[self._first : count])
        end = self.tokenizer.decode(self._ids[self._joint_from : count])
        text = self._before + end[len(self._joint) :]
        if count - self._kept > LONGEST_END and not text.endswith(INCOMPLETE):
            start = max(0, count - JOINT)
            joint = self.tokenizer.decode(self._ids[start:count])
            # Decoders may leave out the space that begins a text, so there has to be more than that.
            if joint.strip():
                self._before, self._kept, self._joint, self._joint_from = text, count, joint, start
        return text

    def _settled(self) -> int:
        """How many of the ids stand before the run of bytes at the end; what has no text does not end a run."""
        settled = len(self._ids)
        while settled > self._first:
            token = self._ids[settled - 1]
            text = self.tokenizer.token_text(token)
            has_text = text is not None and token not in self.tokenizer.special_token_ids
            if has_text and not BYTE_TOKEN.fullmatch(text or ""):
                break
            settled -= 1
        return settled

    def _give(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece
