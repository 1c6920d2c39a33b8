"""Replies in OpenAI's form, whole and in pieces."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from slothcore.serve.choices import Piece, TokenLogprob

DONE = b"data: [DONE]\n\n"
# Ends of lines to Unicode and to many clients, though not to the protocol of events; JSON may escape them.
LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class Usage:
    """How many tokens a reply has cost."""

    prompt: int
    completion: int

    def as_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Reply(Protocol):
    """How one kind of reply is written."""

    def opening(self, index: int) -> bytes:
        """What a stream says of a choice before its first piece; may be empty."""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """A piece of a choice, in a stream."""

    def ending(self, usage: Usage | None) -> bytes:
        """The end of a stream, with the count of tokens where it was asked for."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The reply at once: all that is known of each choice."""


@dataclass
class _Written:
    """What both kinds have in common.

    Attributes:
        model: the name that was asked for.
        tells_usage: whether a stream ends with the count of tokens; each piece says null for it then.
    """

    model: str
    tells_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    kind = ""
    piece_kind = ""
    prefix = ""

    def ending(self, usage: Usage | None) -> bytes:
        if usage is None:
            return DONE
        return as_event({**self._head(self.piece_kind), "choices": [], "usage": usage.as_json()}) + DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{self.key}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Mapping[str, Any]) -> bytes:
        usage = {"usage": None} if self.tells_usage else {}
        return as_event({**self._head(self.piece_kind), "choices": [choice], **usage})


class ChatReply(_Written):
    """Answers to a conversation."""

    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunk(self, index: int, piece: Piece) -> bytes:
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk(
            {"index": index, "delta": delta, "logprobs": self._logprobs(piece), "finish_reason": piece.finished}
        )

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finished,
            }
            for index, piece in enumerate(pieces)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage.as_json()}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        content = [
            {**_token(token), "top_logprobs": [_token(other) for other in token.alternatives]}
            for token in piece.logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionReply(_Written):
    """Continued texts.

    Attributes:
        echoed: what each choice begins with.
    """

    kind, piece_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, tells_usage: bool, echoed: Sequence[str]) -> None:
        super().__init__(model, tells_usage)
        self.echoed = echoed
        self._lengths = [0] * len(echoed)

    def opening(self, index: int) -> bytes:
        return self.chunk(index, Piece(self.echoed[index])) if self.echoed[index] else b""

    def chunk(self, index: int, piece: Piece) -> bytes:
        return self._chunk(self._choice(index, piece))

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            self._choice(index, Piece(self.echoed[index] + piece.text, piece.logprobs, piece.finished))
            for index, piece in enumerate(pieces)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage.as_json()}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(index, piece.logprobs),
            "finish_reason": piece.finished,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(token.text)
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_name(other): other.logprob for other in token.alternatives} for token in tokens],
            "text_offset": offsets,
        }


def as_event(value: Mapping[str, Any]) -> bytes:
    """One event of a stream of server-sent events."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(LINE_ENDS)
    return f"data: {text}\n\n".encode()


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


def _name(token: TokenLogprob) -> str:
    """What a token is called where each needs a name of its own: its text, or its bytes where they are no text."""
    if token.text.encode() == token.data:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
