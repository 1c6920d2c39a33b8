"""The optimizer steps of a run with their micro-batches, each built while the one before is at work."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from slothcore.training.ahead import Ahead
from slothcore.training.batches import MicroBatch, StepPlan, StepSchedule
from slothcore.training.micro_batches import StepCut


@dataclass(frozen=True)
class PreparedStep:
    """What an optimizer step trains on: the rows of each of its passes, and their tokens on the host."""

    plan: StepPlan
    passes: list[tuple[list[int], MicroBatch]]


class StepFeed:
    """The steps from `first_step` on, in order. Enter it, so that its thread ends with the block.

    Attributes:
        cut: how the rows of a step are divided into passes.
    """

    def __init__(self, schedule: StepSchedule, cut: StepCut, *, first_step: int = 0) -> None:
        self.schedule, self.cut = schedule, cut
        self._next_step = first_step
        self._ahead = Ahead(self._prepare(first_step))

    def next(self) -> PreparedStep:
        """The next step. Raises StopIteration after the last."""
        step = next(self._ahead)
        self._next_step += 1
        return step

    def again_smaller(self, too_many: Sequence[int]) -> PreparedStep | None:
        """The step that `next` gave, and from now on all others, without a pass as large as that of these rows.

        Returns: the step; None if its rows cannot be divided: there is one alone, or no token budget to lower.
        """
        if self.cut.token_budget is None or len(too_many) == 1:
            return None
        self.cut = replace(self.cut, token_budget=self.cut.tokens(too_many) // 2)
        self._ahead.close()
        self._next_step -= 1
        self._ahead = Ahead(self._prepare(self._next_step))
        return self.next()

    def _prepare(self, first_step: int) -> Iterator[PreparedStep]:
        cut = self.cut
        for number in range(first_step, self.schedule.total_steps):
            plan = self.schedule.plan(number)
            yield PreparedStep(plan, [(rows, cut.rows.micro_batch(rows)) for rows in cut.passes(plan.rows)])

    def __enter__(self) -> "StepFeed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.close()
