"""The lines of the log about training: begun when a step is asked for, written when the device has done it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from torch import Tensor

from slothcore.training.meter import Meter, Reading
from slothcore.training.report import Report, most_memory
from slothcore.training.run_state import RunState

# Scales in float16 begin at 2^16. After as many halvings no gradient overflows that is a number before it is scaled.
MOST_SKIPPED = 60


class TrainingLog:
    """Writes each line one step late at most, so that the device has its next step while the host reads the last one.

    Lines come in their order, with what they would have held at once. Leaving it writes the line that is waiting,
    whatever ended the run.
    """

    def __init__(self, report: Report, meter: Meter, state: RunState, *, steps_per_epoch: int) -> None:
        self.report, self.meter, self.state, self.steps_per_epoch = report, meter, state, steps_per_epoch
        self._waiting: tuple[dict[str, Any], Reading] | None = None
        self._skipped_in_a_row = 0

    def begin_line(self, *, learning_rate: float, grad_norm: Tensor) -> None:
        """A line about the steps since the last one, `state.step` being the newest."""
        self.write_waiting()
        record = {
            "step": self.state.step,
            "epoch": self.state.step / self.steps_per_epoch,
            "loss": None,
            "learning_rate": learning_rate,
            "grad_norm": None,
            "tokens": self.state.tokens,
            "tokens_per_second": None,
            "elapsed": None,
            **most_memory(self.meter.device),
        }
        self._waiting = record, self.meter.close_window(grad_norm)
        if self._waiting[1].mark.passed():
            self.write_waiting()

    def write_waiting(self) -> None:
        """Write the line that was begun, if there is one; waits for its step.

        Raises: ValueError if the loss or the gradient was not finite; the line is then not written. And, behind the
            line, if so many steps in a row were skipped that no scale will do.
        """
        if self._waiting is None:
            return
        (record, reading), self._waiting = self._waiting, None
        figures = self.meter.read(reading)
        self.state.logged_loss += figures.loss
        self.report.log(
            {
                **record,
                "loss": figures.loss / figures.steps,
                "grad_norm": figures.grad_norm,
                "tokens_per_second": figures.tokens_per_second,
                "elapsed": figures.elapsed,
                **({"skipped_steps": figures.skipped} if figures.skipped else {}),
            }
        )
        self._skipped_in_a_row = self._skipped_in_a_row + figures.steps if figures.skipped == figures.steps else 0
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise ValueError(
                "the gradients of this model do not fit into float16 at any scale: "
                f"{self._skipped_in_a_row} steps in a row were skipped; train in bfloat16 or float32"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation and saving: they find all lines written, and their time is not counted.

        Raises: ValueError if the loss or the gradient was not finite, in the line that is begun as in those before:
            there is nothing then to evaluate or to save.
        """
        self.write_waiting()
        self.meter.read_loss()
        with self.meter:
            yield

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.write_waiting()
        else:
            # What ended the run is what the user must learn, not what became of the line.
            with suppress(Exception):
                self.write_waiting()
