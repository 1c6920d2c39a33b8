"""The engine on a thread of its own, spoken to from an event loop."""

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from slothcore.inference.engine import Engine, Event, Request
from slothcore.serve.errors import ApiError


@dataclass(eq=False)
class Ticket:
    """Requests of one client, whose events come together.

    Attributes:
        numbers: of the requests, in their order; empty until the engine has taken them.
        events: what happens to them, or why nothing will.
    """

    numbers: list[int] = field(default_factory=list)
    events: "asyncio.Queue[Event | ApiError]" = field(default_factory=asyncio.Queue)

    async def some(self) -> list[Event]:
        """All events that are there, at least one. Raises: ApiError if the engine has ended."""
        found = [await self.events.get()]
        while not self.events.empty():
            found.append(self.events.get_nowait())
        for event in found:
            if isinstance(event, ApiError):
                raise event
        return [event for event in found if isinstance(event, Event)]


class EngineThread:
    """Steps the engine while there is work, and sleeps where there is none.

    Tickets live on the event loop; the engine is touched by its own thread alone. What one tells the other goes through
    a queue, or through the loop's own, so that neither ever waits for the other's work.

    Attributes:
        failure: what ended the engine, if anything did.
    """

    def __init__(self, engine: Engine, device: torch.device, *, on_failure: Callable[[], None]) -> None:
        """
        Args:
            device: of its model.
            on_failure: called on the event loop when the engine has ended by an error.
        """
        self._engine, self._device, self._on_failure = engine, device, on_failure
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._thread = threading.Thread(target=self._run, name="slothcore engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_ended = False
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin, on the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End after the step under way; clients whose answers are not complete are told so."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)
        self._end()

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue requests. Raises: ApiError if the engine has ended; ValueError if it does not take one of them."""
        if self._has_ended:
            raise self._why_ended()
        assert self._loop is not None
        ticket, taken = Ticket(), self._loop.create_future()
        self._waiting.add(taken)
        self._orders.put(lambda: self._add(requests, ticket, taken))
        try:
            await taken
        except asyncio.CancelledError:
            # Where the engine has not taken them yet, `_taken` will see that nobody waits.
            self.forget(ticket)
            raise
        finally:
            self._waiting.discard(taken)
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Nobody waits for these any more; those at their end have cost nothing more anyway."""
        running = [number for number in ticket.numbers if self._tickets.pop(number, None) is not None]
        if running:
            self._orders.put(lambda: self._cancel(running))

    # On the engine's thread.

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with torch.no_grad():
                while self._obey():
                    self._step()
        except BaseException as error:
            self.failure = error
            traceback.print_exc()
            self._tell(self._fail)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except torch.OutOfMemoryError:
            # The engine has given up what was under way, and takes new requests.
            traceback.print_exc()
            full = "the GPU's memory is full; ask for less at once, or give the server a lower --cache-tokens"
            self._tell(lambda: self._lose(ApiError(500, full, code="out_of_memory")))
            return
        if events:
            self._tell(lambda: self._deliver(events))

    def _obey(self) -> bool:
        """Do what was asked; waits while there is nothing else to do. Whether the engine goes on."""
        while True:
            try:
                order = self._orders.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _add(self, requests: Sequence[Request], ticket: Ticket, taken: "asyncio.Future[None]") -> None:
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self._engine.add(request))
        except ValueError as error:
            self._cancel(numbers)
            self._tell(partial(self._refused, error, taken))
        else:
            # Before any event of theirs, which the loop gets behind this.
            self._tell(lambda: self._taken(numbers, ticket, taken))

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._engine.cancel(number)

    def _tell(self, what: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:  # the loop is closed, and with it everyone who would want to know
            self._orders.put(None)

    # On the event loop.

    def _taken(self, numbers: list[int], ticket: Ticket, taken: "asyncio.Future[None]") -> None:
        ticket.numbers = numbers
        self._tickets.update(dict.fromkeys(numbers, ticket))
        if taken.done():
            self.forget(ticket)
        else:
            taken.set_result(None)

    def _refused(self, error: ValueError, taken: "asyncio.Future[None]") -> None:
        if not taken.done():
            taken.set_exception(error)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            ticket = self._tickets.get(event.id)
            if ticket is not None:
                ticket.events.put_nowait(event)
                if event.finished:
                    del self._tickets[event.id]

    def _fail(self) -> None:
        self._end()
        self._on_failure()

    def _end(self) -> None:
        self._has_ended = True
        self._lose(self._why_ended())
        for taken in self._waiting:
            if not taken.done():
                taken.set_exception(self._why_ended())

    def _lose(self, why: ApiError) -> None:
        """Tell everyone who waits for an event that there will be none."""
        for ticket in set(self._tickets.values()):
            ticket.events.put_nowait(why)
        self._tickets.clear()

    def _why_ended(self) -> ApiError:
        """What a client is told whose answer will not come."""
        if self.failure is not None:
            return ApiError(500, "the engine has failed; the server's own output says why", code="engine_failed")
        return ApiError(503, "the server is shutting down; ask again when it is back", code="shutting_down")
