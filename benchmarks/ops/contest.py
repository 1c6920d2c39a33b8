"""Operations timed beside their peers: what one is, how all are checked, and how they take turns on the GPU.

The host is no part of these times: a batch of calls is queued behind work that keeps the GPU busy until all of them
are issued. Operands change from call to call, so that nothing is found in a cache that a step would not find there. And
all that are compared take turns, batch by batch, because a GPU's clock drifts as it warms.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import targets
from benchmarks.harness import quantiles
from benchmarks.ops.case import TOLERANCE

OWN = "slothcore"
ROUNDS = 5
BATCH_MS = 4.0
FEWEST_CALLS, MOST_CALLS = 2, 24
# Cycles of a millisecond at the highest clock; at a lower one the GPU waits longer, which does no harm.
CYCLES_A_MS = 2_000_000
LONGEST_WAIT_MS = 60.0
# Operands that together are larger than any second-level cache.
CACHE_BYTES = 150 * 2**20
T = TypeVar("T")
Call = Callable[[], object]


@dataclass(frozen=True)
class Entry:
    """One way to do the operation.

    Attributes:
        run: what is timed.
        result: what it yields from fresh operands, to be checked.
        tolerance: largest relative error; 0 asks for equal bits.
    """

    run: Call
    result: Callable[[], Sequence[Tensor]]
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Score:
    """A figure that the times give, and the target that it is held against.

    Attributes:
        target: its name among `targets.OPERATIONS`.
        figure: from the milliseconds of each entry and the milliseconds of the floor.
    """

    target: str
    figure: Callable[[dict[str, float], float], float | None]


@dataclass(frozen=True)
class Contest:
    """One operation at one shape.

    Attributes:
        op, shape: names for the table.
        entries: whoever takes part; if slothcore does, it is the first.
        expected: what all of them must yield.
        bytes, flops: least traffic with the memory and least arithmetic; the longer of the two is the floor.
        scores: what is held against targets.
        weigh_memory: whether to measure what the own entry allocates.
    """

    op: str
    shape: str
    entries: dict[str, Entry]
    expected: Callable[[], Sequence[Tensor]]
    bytes: int = 0
    flops: int = 0
    scores: tuple[Score, ...] = ()
    weigh_memory: bool = False


@dataclass
class Outcome:
    """What became of a contest.

    Attributes:
        milliseconds: (median, 20% and 80% quantile) of each entry whose result was right.
        problems: of the others, and of entries whose times are the host's.
        floor_ms: of the machine it ran on; 0 if the contest has none.
        extra_mib: what the own entry allocates, where it was weighed.
    """

    contest: Contest
    milliseconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    floor_ms: float = 0.0
    extra_mib: float | None = None

    @property
    def refused(self) -> bool:
        """Whether slothcore's own result was wrong."""
        return OWN in self.contest.entries and OWN not in self.milliseconds

    def verdicts(self) -> list[tuple[targets.Target, float | None]]:
        """Each target of this contest with its figure."""
        medians = {name: times[0] for name, times in self.milliseconds.items()}
        found: list[tuple[targets.Target, float | None]] = [
            (targets.OPERATIONS[score.target], None if self.refused else score.figure(medians, self.floor_ms))
            for score in self.contest.scores
        ]
        if self.contest.weigh_memory:
            found.append((targets.OPERATIONS["head, memory"], self.extra_mib))
        return found


def share_of_floor(target: str) -> Score:
    return Score(target, lambda times, floor: floor / times[OWN])


def times_of(target: str, peer: str) -> Score:
    """Own time over the peer's."""
    return Score(target, lambda times, floor: times[OWN] / times[peer] if peer in times else None)


def faster_than(target: str, peer: str) -> Score:
    """The peer's time over the own."""
    return Score(target, lambda times, floor: times[peer] / times[OWN] if peer in times else None)


def faster_than_all(target: str) -> Score:
    """The best peer's time over the own."""

    def figure(times: dict[str, float], floor: float) -> float | None:
        others = [time for name, time in times.items() if name != OWN]
        return min(others) / times[OWN] if others else None

    return Score(target, figure)


def plain(run: Callable[[], Tensor | tuple[Tensor, ...]], tolerance: float = TOLERANCE) -> Entry:
    """An entry whose every call yields the result anew."""

    def result() -> Sequence[Tensor]:
        found = run()
        return (found,) if isinstance(found, Tensor) else found

    return Entry(run, result, tolerance)


def rotating(function: Callable[[T], Any], operands: Sequence[T]) -> Callable[[], Any]:
    """A call that takes the next of the operands each time."""
    endless = cycle(operands)
    return lambda: function(next(endless))


def copies_beyond_cache(nbytes: int) -> int:
    """How many operands of this size no cache holds together; at least 2."""
    return max(2, -(-CACHE_BYTES // max(nbytes, 1)))


def hold(contest: Contest, *, device: str, floor_ms: float) -> Outcome:
    """Check all entries and time those whose result is right."""
    outcome = Outcome(contest, floor_ms=floor_ms)
    expected = list(contest.expected())
    right: dict[str, Call] = {}
    for name, entry in contest.entries.items():
        try:
            problem = difference(entry.result(), expected, entry.tolerance)
        except Exception as error:
            # A peer of another version must not end the run, and an own failure is a refusal.
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if problem:
            outcome.problems.append(f"{name}: {problem}")
        else:
            right[name] = entry.run
    del expected
    if not right or (OWN in contest.entries and OWN not in right):
        return outcome
    if contest.weigh_memory and device == "cuda":
        outcome.extra_mib = extra_mib(right[OWN])
    times, waiting = take_turns(right, device)
    outcome.milliseconds = {name: quantiles(values) for name, values in times.items()}
    outcome.problems += [f"{name}: the GPU waited for the host" for name in waiting]
    return outcome


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str:
    """What is wrong with a result; "" if nothing is."""
    if len(found) != len(expected):
        return f"{len(found)} results, expected {len(expected)}"
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"result {number} has shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        error = relative_error(ours.detach(), theirs.detach())
        # Written so that NaN is wrong too.
        if not error <= tolerance:
            return f"result {number} is off by {error:.2e}, allowed is {tolerance:g}"
    return ""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`, where they are: the large ones take long to copy to the host."""
    if torch.equal(found, expected):
        return 0.0
    exact = expected.float()
    return float((found.float() - exact).norm() / exact.norm())


def take_turns(calls: dict[str, Call], device: str) -> tuple[dict[str, list[float]], list[str]]:
    """Milliseconds of a call of each, batch by batch in turns; and those for which the GPU had to wait."""
    batches = {name: Batch(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        # Every other round backwards, so that nobody always follows the same one.
        for name in calls if number % 2 == 0 else reversed(calls):
            times[name].append(batches[name].milliseconds())
    return times, [name for name, batch in batches.items() if batch.waited]


class Batch:
    """Calls that are timed together, as many as take `BATCH_MS`."""

    def __init__(self, call: Call, device: str) -> None:
        self.call, self.device = call, device
        self.waited = False
        for _ in range(2):
            call()
        self._synchronize()
        start = time.perf_counter()
        call()
        host_ms = 1e3 * (time.perf_counter() - start)
        self._synchronize()
        whole_ms = 1e3 * (time.perf_counter() - start)
        self.calls = max(FEWEST_CALLS, min(MOST_CALLS, round(BATCH_MS / whole_ms)))
        # Also where this call was issued in good time: the next may not be, and 25 us would be 50.
        self.lead_in_ms = min(LONGEST_WAIT_MS, 2.0 * host_ms * self.calls + 0.2)

    def milliseconds(self) -> float:
        """Of one call."""
        if self.device == "cpu":
            start = time.perf_counter()
            self.call()
            return 1e3 * (time.perf_counter() - start)
        while True:
            taken, self.waited = self._queued()
            if not self.waited or self.lead_in_ms >= LONGEST_WAIT_MS:
                return taken
            self.lead_in_ms = min(LONGEST_WAIT_MS, 4 * self.lead_in_ms)

    def _queued(self) -> tuple[float, bool]:
        """Milliseconds of a call, and whether the GPU may have waited for the host in between."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CYCLES_A_MS * self.lead_in_ms))
        first.record()
        for _ in range(self.calls):
            self.call()
        # Had the GPU come to the first call already, it may have caught up with the host.
        waited = first.query()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / self.calls, waited

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def extra_mib(call: Call) -> float:
    """What a call has allocated at most, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20
