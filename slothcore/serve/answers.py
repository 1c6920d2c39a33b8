"""The answers of one reply, from the engine's events to what is sent."""

from collections.abc import AsyncIterator, Sequence

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from slothcore.serve.choices import Choice, Piece
from slothcore.serve.engine_thread import EngineThread, Ticket
from slothcore.serve.errors import ApiError
from slothcore.serve.replies import Reply, Usage, as_event


class Answer:
    """The choices of one reply, as the engine makes them. Whoever has one closes it."""

    def __init__(self, engine: EngineThread, ticket: Ticket, choices: Sequence[Choice], *, prompt_tokens: int) -> None:
        self._engine, self._ticket, self._choices, self._prompt_tokens = engine, ticket, choices, prompt_tokens

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Number of a choice and what has become known of it, until all have ended."""
        by_number = dict(zip(self._ticket.numbers, self._choices, strict=True))
        while any(choice.finished is None for choice in self._choices):
            events = await self._ticket.some()
            for number in dict.fromkeys(event.id for event in events):
                choice = by_number[number]
                if choice.finished is None and (piece := choice.add(e for e in events if e.id == number)):
                    yield choice.index, piece
                    if choice.finished:
                        self._engine.forget(Ticket([number]))

    def close(self) -> None:
        """End what is still under way: nobody listens any more."""
        self._engine.forget(self._ticket)

    async def whole(self) -> list[Piece]:
        """Each choice at once."""
        found = [Piece() for _ in self._choices]
        async for index, piece in self.pieces():
            found[index].text += piece.text
            found[index].logprobs += piece.logprobs
            found[index].finished = piece.finished
        return found


class AnswerStream(StreamingResponse):
    """A reply as server-sent events; the answer ends with it, also where the client has gone before the first one."""

    def __init__(self, answer: Answer, reply: Reply, *, tells_usage: bool) -> None:
        self._answer = answer
        events = events_of(answer, reply, tells_usage=tells_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def events_of(answer: Answer, reply: Reply, *, tells_usage: bool) -> AsyncIterator[bytes]:
    """A reply as server-sent events."""
    begun: set[int] = set()
    try:
        async for index, piece in answer.pieces():
            opening = b"" if index in begun else reply.opening(index)
            begun.add(index)
            yield opening + reply.chunk(index, piece)
        yield reply.ending(answer.usage if tells_usage else None)
    except ApiError as error:  # the status has been sent long ago
        yield as_event(error.as_json())
