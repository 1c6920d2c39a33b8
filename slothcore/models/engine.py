"""Continuous batching: requests come and go, and each decode step takes the newest token of all that are under way.

    waiting --- a pass over prompts, packed ---> rows of the cache --- decode steps ---> over
       ^                                               |
       '------ put back, when pages run out -----------'

On a GPU the host is one pass ahead: it launches a pass without knowing what the one before has chosen, and reads those
tokens while the new pass runs. A request that ended with them has one token too many by then, which is dropped.

What a request gets does not depend on the ones beside it: tokens attend to their own row alone, and draws come from its
own seed. In 16 bits other numbers of rows are other orders of sums, as everywhere.
"""

from collections import deque
from collections.abc import Sequence

import torch

from slothcore.layers.kv_cache import KvCache
from slothcore.models.cache_room import cache_room
from slothcore.models.decode_steps import DecodeSteps
from slothcore.models.generation_mode import GenerationMode
from slothcore.models.graph_runs import CudaRecorder, Recorder
from slothcore.models.language_model import LanguageModel
from slothcore.models.prompt_passes import PromptPasses
from slothcore.models.requests import Adapters, Event, Request
from slothcore.models.row_state import Chosen, RowState, StepKind
from slothcore.models.tasks import Flight, Line, Task, keeps_its_turns, lengths_read_again

PREFILL_TOKENS = 8192
"""Most tokens of a pass over prompts: enough for products at their full rate."""
TURN = 16
"""Passes for one set of factors before another one that waits comes to its turn."""


class Engine:
    """Continues prompts; synchronous, on one thread.

        engine = Engine(model)
        number = engine.add(Request(prompt_ids=ids, max_new_tokens=64))
        while engine.has_work:
            for event in engine.step():
                ...

    While there is work, the model is in eval mode, and none of its weights may be changed; afterwards all is as before.

    Attributes:
        capacity: most tokens of one request, prompt and continuation.
        prompts: runs the passes over prompts.
        steps: runs the decode steps.
    """

    @torch.inference_mode(False)  # whose tensors may never be written to outside of it
    def __init__(
        self,
        model: LanguageModel,
        *,
        max_rows: int = 128,
        capacity: int | None = None,
        cache_tokens: int | None = None,
        graphs: bool = True,
        prefill_tokens: int = PREFILL_TOKENS,
        adapters: Adapters | None = None,
        recorder: Recorder | None = None,
        ahead: bool | None = None,
    ) -> None:
        """
        Args:
            max_rows: most requests that are decoded together; others wait.
            capacity: most tokens of one request, prompt and continuation; default: `model.max_seq_length`, or what
                the cache holds.
            cache_tokens: tokens that the cache has room for; None: what memory allows, at most max_rows * capacity.
            graphs: replay decode steps and passes over few prompts as CUDA graphs, where there is a GPU.
            prefill_tokens: most tokens of one pass over prompts; a longer prompt is a pass of its own.
            adapters: what the requests' `adapter` names. Requests of one set are decoded together; sets take turns.
            recorder: takes the place of CUDA graphs, on any device.
            ahead: launch a pass before the tokens of the one before are read; default: on a GPU. Events are the same,
                one call of `step` later.
        Raises: ValueError for numbers that do not fit.
        """
        for name, value in (("max_rows", max_rows), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        device = model.device
        if recorder is None and graphs and device.type == "cuda":
            recorder = CudaRecorder(device)
        room = cache_room(
            model,
            max_rows,
            capacity=capacity,
            cache_tokens=cache_tokens,
            prefill_tokens=prefill_tokens,
            graphs=recorder is not None,
        )
        # One row more, which never has a text, and so no page.
        rows = max_rows + 1
        self.capacity = room.capacity
        self._model, self._prefill_tokens, self._adapters = model, prefill_tokens, adapters
        self._cache = KvCache(rows=rows, capacity=room.capacity, pages=room.pages, **room.options)
        self._state = RowState(rows, model.config.vocab_size, device)
        self.prompts = PromptPasses(model, self._cache, recorder=recorder)
        self.steps = DecodeSteps(model, self._cache, self._state, idle_row=max_rows, recorder=recorder)
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._mode = GenerationMode(model, recorder=recorder)
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._tasks: dict[int, Task] = {}
        self._waiting: dict[str | None, deque[Task]] = {}
        self._running: list[Task] = []  # in the order in which they began: the youngest is the last
        self._flying: deque[Flight] = deque()
        self._line = Line()
        self._added = 0
        self._has_just_read = False
        self._adapter: str | None = None
        self._turn = 0
        self._rereads_at, self._never_again = lengths_read_again(model.config), keeps_its_turns(model.config)

    def add(self, request: Request) -> int:
        """Queue a request. Returns: its number, by which events and `cancel` name it.

        Raises: ValueError if prompt and continuation are longer than `capacity`, a token is outside the vocabulary, or
            there is no such adapter.
        """
        length, vocab_size = len(request.prompt_ids) + request.max_new_tokens, self._model.config.vocab_size
        if length > self.capacity:
            raise ValueError(
                f"the prompt has {len(request.prompt_ids)} tokens and may get {request.max_new_tokens} more, but a "
                f"request may have {self.capacity} in all; shorten it, or ask for fewer"
            )
        low, high = min(request.prompt_ids), max(request.prompt_ids)
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"prompt_ids must lie in 0..{vocab_size - 1} (the vocabulary), got {wrong}")
        if request.adapter is not None and (self._adapters is None or request.adapter not in self._adapters):
            raise ValueError(f"there is no adapter {request.adapter!r}; load it first, or leave it out")
        task = Task(self._added, request, request.random_key())
        self._added += 1
        self._tasks[task.number] = task
        self._waiting.setdefault(request.adapter, deque()).append(task)
        return task.number

    def cancel(self, number: int) -> None:
        """Forget a request: nothing of it is reported any more. One that is unknown, or at its end, is no error."""
        if number in self._tasks:
            self._end(self._tasks[number])
            if not self.has_work:
                self.close()

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or under way."""
        return bool(self._tasks)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Do one pass, and report the tokens that are there by now; may be none though there is work.

        Raises: what the pass raises; the requests under way are lost then, and the engine is fit for new ones.
        """
        events: list[Event] = []
        if not self.has_work:
            return events
        try:
            if not self._mode.is_on:
                self._use(self._adapter)
                self._mode.enter()
                if self.steps.refresh():
                    self.prompts.forget()
                    self._mode.factors.forget()
            # Where nothing was launched, nothing runs meanwhile either.
            with self._mode.passes():
                left = 1 if self._launch() and self._ahead else 0
            while len(self._flying) > left:
                for task, event in self._flying.popleft().land():
                    events.append(event)
                    if event.finished is not None:
                        self._end(task)
        except BaseException:
            self.close()
            raise
        if not self.has_work:
            self.close()
        return events

    def close(self) -> None:
        """Give up all requests, and put the model back into the mode in which it was; `add` begins anew."""
        for task in list(self._tasks.values()):
            self._end(task)
        self._waiting.clear()
        self._flying.clear()
        self._mode.leave()

    def _launch(self) -> bool:
        """Begin the next pass, if there is anything that one could do."""
        turns = list(dict.fromkeys([*(task.request.adapter for task in self._running), *self._waiting]))
        if self._adapter in turns:
            place = turns.index(self._adapter) + (self._turn >= TURN)
            turns = turns[place:] + turns[:place]
        for adapter in turns:
            reads = self._admitted(adapter)
            ready = [] if reads else self._ready(adapter)
            if not reads and not ready:
                continue
            self._turn = self._turn + 1 if adapter == self._adapter and self._turn < TURN else 1
            self._use(adapter)
            tasks = reads or ready
            chosen = self._read(reads) if reads else self._decode(ready)
            self._flying.append(Flight(tasks, chosen))
            for task in tasks:
                task.chosen += 1
                if task.is_complete:
                    # Nothing behind this pass reads the row, whatever the token may be.
                    self._leave_row(task)
            self._has_just_read = bool(reads)
            return True
        return False

    def _use(self, adapter: str | None) -> None:
        """Put a set of factors in place."""
        if self._adapters is not None:
            self._adapters.use(adapter)
            if adapter != self._adapter:
                self._mode.refresh_factors()
        self._adapter = adapter

    def _admitted(self, adapter: str | None) -> list[Task]:
        """Requests whose texts are read now, with rows of their own; after such a pass this set decodes first."""
        admitted: list[Task] = []
        waiting, tokens = self._waiting.get(adapter), 0
        if adapter == self._adapter and self._has_just_read and self._running:
            return admitted
        while waiting:
            task = waiting[0]
            if task.is_over:
                waiting.popleft()
                continue
            full = bool(admitted) and tokens + task.length > self._prefill_tokens
            if full or not task.can_be_read or self._line.holds_back(task):
                break
            # And for the token that comes next, or the row might have to go at once.
            length = task.longest if self._never_again else min(task.length + 1, self._cache.capacity)
            if not self._free_rows or not self._cache.room_for(self._free_rows[-1], length):
                self._line.note(task)
                break
            self._line.forget(task)
            task.row = self._free_rows.pop()
            self._cache.reserve(task.row, length)
            tokens += task.length
            admitted.append(waiting.popleft())
        if waiting is not None and not waiting:
            del self._waiting[adapter]
        self._running += admitted
        return admitted

    def _read(self, tasks: Sequence[Task]) -> Chosen:
        """A pass over whole texts, each into its row; chooses the token that follows each."""
        rows = [task.row for task in tasks if task.row is not None]
        requests = [task.request for task in tasks]
        # What follows is launched while the pass runs.
        hidden = self.prompts.read(rows, [task.text for task in tasks])
        self._state.begin(rows, requests, [task.key for task in tasks], [task.tokens for task in tasks])
        places, counts = self._state.sent(torch.tensor([rows, [task.chosen for task in tasks]], device="cpu"))
        return self._state.choose(self._model.logits(hidden), places, counts, StepKind.of(requests))

    def _ready(self, adapter: str | None) -> list[Task]:
        """Requests whose next token is decoded now, with room for it in the cache."""
        if self._rereads_at:
            # Their keys were turned by the short factors; transformers' Phi-3 drops its cache at this token too.
            for task in [task for task in self._running if task.length in self._rereads_at]:
                self._put_back(task)
        for task in [task for task in self._running if task.request.adapter == adapter]:
            while task.row is not None and not self._cache.room_for(task.row, task.length):
                self._put_back(self._running[-1])
            if task.row is not None:
                self._cache.reserve(task.row, task.length)
        return [task for task in self._running if task.request.adapter == adapter]

    def _decode(self, tasks: Sequence[Task]) -> Chosen:
        rows = [task.row for task in tasks if task.row is not None]
        return self.steps.run(rows, [task.chosen for task in tasks], StepKind.of([task.request for task in tasks]))

    def _put_back(self, task: Task) -> None:
        """Give up the row of a request; its text is read again when there is room, before any other."""
        self._leave_row(task)
        self._waiting.setdefault(task.request.adapter, deque()).appendleft(task)

    def _leave_row(self, task: Task) -> None:
        assert task.row is not None
        self._cache.release(task.row)
        self._free_rows.append(task.row)
        self._running.remove(task)
        task.row = None

    def _end(self, task: Task) -> None:
        task.is_over = True
        del self._tasks[task.number]
        if task.row is not None:
            self._leave_row(task)
