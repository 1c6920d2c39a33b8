"""A chat template as Go's text/template, which Ollama uses.

Jinja cannot be translated as such. But nearly every format is made of a few fixed texts: one before the first user's
words, one or two around a system text, one between a user's words and the answer, and one between an answer and the
next words of the user. They are found by rendering marked words, and kept only if they write longer
conversations as the template does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slothcore.data.tokenizer import Tokenizer

Message = Mapping[str, str]
# No template has these words, or does something to them.
SYSTEM, *TURNS = "SystemWordsQ0", "FirstWordsQ1", "SecondWordsQ2", "ThirdWordsQ3", "FourthWordsQ4", "FifthWordsQ5"


@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts of a conversation.

    Attributes:
        begin: before the first user's words, without a system text.
        system: before the system text, and between it and the first user's words; None if it has no place at the
            beginning.
        answer: behind a user's words, where the model goes on.
        lead: between that and an earlier answer; a space, for those who count it to the answer.
        question: between an answer and the next words of the user.
    """

    begin: str
    system: tuple[str, str] | None
    answer: str
    lead: str
    question: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatFormat | None":
        """What the tokenizer's chat template writes; None if it cannot be written so.

        The begin token that the tokenizer adds to every text is left out.
        """

        def render(messages: Sequence[Message]) -> str:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            begin = tokenizer.token_text(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else None
            adds_begin = begin and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
            return text.removeprefix(begin) if begin and adds_begin else text

        plain, with_system = marked_conversation(), marked_conversation(SYSTEM)
        try:
            begin, led, question, answer = _between(render(plain[:3]), TURNS[:3])
        except ValueError:
            return None
        lead = led.removeprefix(answer)
        system: tuple[str, str] | None = None
        try:
            before, behind, *_ = _between(render(with_system[:4]), (SYSTEM, *TURNS[:3]))
            system = before, behind
        except ValueError:
            pass
        found = cls(begin, system, answer, lead, question)
        if not all(found.render(m) == render(m) for m in _lengths(plain)):
            return None
        if system is not None and not all(found.render(m) == render(m) for m in _lengths(with_system)):
            return cls(begin, None, answer, lead, question)
        return found

    def render(self, messages: Sequence[Message]) -> str:
        """The text before the next answer; the roles after an optional system text alternate, the user first."""
        parts = [self.begin]
        if messages[0]["role"] == "system" and self.system is not None:
            before, behind = self.system
            parts = [before, messages[0]["content"], behind]
        is_first = True
        for message in messages:
            if message["role"] == "user":
                parts += ["" if is_first else self.question, message["content"], self.answer]
                is_first = False
            elif message["role"] == "assistant":
                parts += [self.lead, message["content"]]
        return "".join(parts)

    def go_template(self) -> str:
        """`render` in Go, over Ollama's `.System` and `.Messages`."""
        begin = _literal(self.begin)
        if self.system is not None:
            before, behind = map(_literal, self.system)
            begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{begin}{{{{ end }}}}"
        return (
            f"{{{{ $begun := false }}}}{begin}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{{{{ if $begun }}}}{_literal(self.question)}{{{{ end }}}}'
            f"{{{{ $begun = true }}}}{{{{ .Content }}}}{_literal(self.answer)}"
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.lead)}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}'
        )


def marked_conversation(system: str | None = None) -> list[Message]:
    """Five turns of marked words, the user's first, after a system text if one is given."""
    turns: list[Message] = [
        {"role": ("user", "assistant")[index % 2], "content": word} for index, word in enumerate(TURNS)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _lengths(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation up to each of the user's turns."""
    return [list(messages[: index + 1]) for index, message in enumerate(messages) if message["role"] == "user"]


def _between(text: str, words: Sequence[str]) -> list[str]:
    """What stands around the words. Raises: ValueError unless each is there once, in this order."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise ValueError(f"{word} stands in the text {text.count(word)} times")
        part, text = text.split(word)
        parts.append(part)
    return [*parts, text]


def is_read(sign: str) -> bool:
    """Whether Ollama takes a sign of a Modelfile as it is; it passes over those that nobody sees."""
    return sign.isprintable() or sign in "\n\r\t"


def _literal(text: str) -> str:
    """A text that Go and the Modelfile take as it is."""
    # A brace at the end would be one with those of the action behind it.
    if text.endswith("{") or any(s in text for s in ("{{", "}}", '"""')) or not all(map(is_read, text)):
        return f'{{{{ "{"".join(map(_in_go, text))}" }}}}'
    return text


def _in_go(sign: str) -> str:
    """A sign as it stands between quotes in Go."""
    if sign in '"\\':
        return f"\\{sign}"
    if sign.isprintable():
        return sign
    return f"\\u{ord(sign):04x}" if ord(sign) < 2**16 else f"\\U{ord(sign):08x}"
