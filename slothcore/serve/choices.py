"""An answer as it grows: tokens in, text and log-probabilities out, nothing shown that a later token could change."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.endings import Endings
from slothcore.inference.engine import Event, Finished
from slothcore.inference.text_pieces import TextPieces
from slothcore.serve.token_texts import TokenTexts

# What the protocol has for a token that cannot be, JSON having no infinity.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability.

    Attributes:
        text: what it stands for in a text.
        data: its bytes, which may be a part of a character.
        alternatives: the likeliest tokens in its place, in the same form.
    """

    text: str
    data: bytes
    logprob: float
    alternatives: tuple["TokenLogprob", ...] = ()


@dataclass
class Piece:
    """What has become known of an answer since the piece before."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs or self.finished)


class Choice:
    """One answer of a reply.

    Attributes:
        index: its number among them.
        tokens: how many tokens the engine has made for it.
        finished: why it has ended; None: it has not.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, endings: Endings, texts: TokenTexts | None, *, behind: Sequence[int]
    ) -> None:
        """
        Args:
            behind: see `TextPieces`.
            texts: of tokens, where log-probabilities are told.
        """
        self.index, self.tokens = index, 0
        self.finished: Finished | None = None
        self._pieces, self._endings, self._texts = TextPieces(tokenizer, endings, behind=behind), endings, texts
        self._untold: list[TokenLogprob] = []

    def add(self, events: Iterable[Event]) -> Piece:
        """What these events make known; empty if all of it has to wait."""
        piece = Piece()
        for event in events:
            if self.finished is not None:
                break  # the engine had gone on until it heard that a string has ended the answer
            self.tokens += 1
            if self._texts is not None and event.token not in self._endings.eos_ids:
                self._untold.append(_token_logprob(self._texts, event))
            piece.text += self._pieces.add(event.token)
            if self._pieces.ended:
                self.finished = "stop"
            elif event.finished is not None:
                piece.text += self._pieces.finish()
                self.finished = event.finished
        piece.finished = self.finished
        if piece.text or piece.finished:
            piece.logprobs, self._untold = self._untold, []
        return piece


def _token_logprob(texts: TokenTexts, event: Event) -> TokenLogprob:
    def told(token: int, logprob: float) -> TokenLogprob:
        text, data = texts.of(token)
        return TokenLogprob(text, data, max(logprob, LEAST_LOGPROB))

    assert event.logprob is not None
    chosen = told(event.token, event.logprob)
    others = tuple(told(token, logprob) for token, logprob in event.top_logprobs)
    return TokenLogprob(chosen.text, chosen.data, chosen.logprob, others)
