"""A request on its way through the engine, and what a pass has chosen but the host has not read yet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slothcore.models.config import DecoderConfig
from slothcore.models.requests import Event, Finished, Request
from slothcore.models.row_state import Chosen


@dataclass(eq=False)
class Task:
    """A request and how far it is.

    Attributes:
        number: by which the caller knows it.
        key: of its random draws.
        tokens: those that were reported.
        chosen: how many tokens passes have chosen so far; the newest ones may not have been reported yet.
        row: of the cache; None while it waits, and when its last token has been chosen.
        is_over: nothing of it is reported any more.
    """

    number: int
    request: Request
    key: int
    tokens: list[int] = field(default_factory=list)
    chosen: int = 0
    row: int | None = None
    is_over: bool = False

    @property
    def length(self) -> int:
        """Tokens of its text, those chosen included."""
        return len(self.request.prompt_ids) + self.chosen

    @property
    def longest(self) -> int:
        """Tokens that its text may come to have."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def can_be_read(self) -> bool:
        """Whether the host knows all of its text."""
        return self.chosen == len(self.tokens)

    @property
    def text(self) -> list[int]:
        """Prompt and continuation, as far as it was reported."""
        return [*self.request.prompt_ids, *self.tokens]

    @property
    def is_complete(self) -> bool:
        """Whether all that it may have has been chosen."""
        return self.chosen == self.request.max_new_tokens

    def take(self, token: int) -> Finished | None:
        """Note a token; why it is the last, if it is."""
        request = self.request
        self.tokens.append(token)
        if token in request.eos_ids or (request.should_stop is not None and request.should_stop(list(self.tokens))):
            return "stop"
        return "length" if len(self.tokens) == request.max_new_tokens else None


class Line:
    """Holds younger requests for other factors back, where one has found no room, or it might wait for ever."""

    def __init__(self) -> None:
        self._first: Task | None = None

    def note(self, task: Task) -> None:
        """It has found no room."""
        if self._first is None or self._first.is_over or task.number < self._first.number:
            self._first = task

    def forget(self, task: Task) -> None:
        """It has found room."""
        if task is self._first:
            self._first = None

    def holds_back(self, task: Task) -> bool:
        """Whether an older one comes first. Of the same factors they stand in a row of their own."""
        first = self._first
        if first is None or first.is_over:
            return False
        return first.number < task.number and first.request.adapter != task.request.adapter


class Flight:
    """The tokens of one pass on their way to the host."""

    def __init__(self, tasks: Sequence[Task], chosen: Chosen) -> None:
        """The first lanes of `chosen` are those of `tasks`; what comes later in the stream may overwrite it."""
        self.tasks = list(tasks)
        count = len(self.tasks)
        self._parts = [None if part is None else _fetched(part[:count]) for part in chosen.parts()]
        self._arrival: torch.cuda.Event | None = None
        if chosen.tokens.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def land(self) -> Iterator[tuple[Task, Event]]:
        """Wait for the tokens; gives an event for each, with `finished` set where the task is over now."""
        if self._arrival is not None:
            self._arrival.synchronize()
        tokens, logprobs, top_tokens, top_logprobs = (None if p is None else p.tolist() for p in self._parts)
        assert tokens is not None
        for lane, task in enumerate(self.tasks):
            if task.is_over:
                continue
            finished = task.take(tokens[lane])
            if task.is_over:
                continue  # `should_stop` has cancelled it
            # Beside rows that want them; this one may not.
            wanted = task.request.logprobs
            logprob = None if wanted is None or logprobs is None else logprobs[lane]
            top: tuple[tuple[int, float], ...] = ()
            if wanted and top_tokens is not None and top_logprobs is not None:
                top = tuple(zip(top_tokens[lane][:wanted], top_logprobs[lane][:wanted], strict=True))
            yield task, Event(task.number, tokens[lane], logprob, top, finished)


def lengths_read_again(config: DecoderConfig) -> frozenset[int]:
    """With longrope: of texts for which the long factors are used, for their first tokens too."""
    ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
    return frozenset(r.original_max_position_embeddings + 1 for r in ropes if r.rope_type == "longrope")


def keeps_its_turns(config: DecoderConfig) -> bool:
    """Whether keys stay as they were turned though a longer text would turn them otherwise: with dynamic RoPE.

    A text that is read again gets other keys then, so no row may be put back.
    """
    return any(rope is not None and rope.rope_type == "dynamic" for rope in (config.rope, config.local_rope))


def _fetched(values: Tensor) -> Tensor:
    """A copy on the host, complete when the stream has come so far."""
    if not values.is_cuda:
        return values.clone()
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
