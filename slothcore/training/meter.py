"""Loss, norm, tokens and seconds of the steps between two lines of the log, measured without stopping the device.

A device works through what it is asked for in order, and the host runs ahead of it. So the figures of a line are sent
to the host as a part of that work, with a mark behind them; the host reads them when the mark has been passed, and may
ask for the next step before. The clock counts from mark to mark: the time that the device took, not that the host did.
"""

import math
import time
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor


class Mark:
    """A point in the work of a device, set when it is made. On a CPU, where work is done when asked for, a time."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def passed(self) -> bool:
        """Whether the device has got there."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Return when the device has got there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """What the device took from there to here; both have been passed."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


@dataclass(frozen=True)
class Figures:
    """Of the steps between two lines of the log.

    Attributes:
        loss: of all of them, summed.
        grad_norm: of the last, before clipping; None where it is not finite, as in float16 now and then.
        skipped: how many were, because their gradient overflowed in float16.
        tokens_per_second, elapsed: of these steps, and seconds of the whole run until here.
    """

    loss: float
    steps: int
    grad_norm: float | None
    tokens_per_second: float
    elapsed: float
    skipped: int = 0


@dataclass(frozen=True)
class Reading:
    """Figures on their way to the host, valid behind the mark: `values` [3] float64, losses, norm and skipped steps."""

    values: Tensor
    steps: int
    tokens: int
    mark: Mark


class Meter:
    """Loss, tokens and seconds, per line of the log and in all.

    While entered (`with meter:`), the clock stands still; evaluation and saving are no training time. Entering waits
    for the device, because the steps that it still has to do are.

    Args:
        window_loss, window_steps, window_skipped: of the line that is begun already, as a checkpoint has them.
        elapsed: seconds of the run before.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        window_loss: float,
        window_steps: int,
        elapsed: float,
        window_skipped: int = 0,
    ) -> None:
        self.device = device
        self.skipped = torch.tensor(float(window_skipped), dtype=torch.float64, device=device)
        self.loss = torch.tensor(window_loss, dtype=torch.float64, device=device)
        self.steps = window_steps
        self.tokens = 0
        self._elapsed = self._window_start = elapsed  # until the mark
        self._mark: Mark | None = Mark(device)  # None while the clock stands still

    def add(self, loss: Tensor, tokens: int, *, skipped: Tensor | None = None) -> None:
        """Count one optimizer step; `skipped`: whether its update was."""
        self.loss += loss
        if skipped is not None:
            self.skipped += skipped
        self.steps += 1
        self.tokens += tokens

    def close_window(self, grad_norm: Tensor) -> Reading:
        """Begin the next line of the log. What the line before has to say is read with `read`, best one step later."""
        figures = torch.stack([self.loss, grad_norm.to(self.loss), self.skipped])
        # Into pinned memory, or the copy would wait for the device.
        values = torch.empty(3, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        values.copy_(figures, non_blocking=True)
        reading = Reading(values, self.steps, self.tokens, Mark(self.device))
        self.loss.zero_()
        self.skipped.zero_()
        self.steps = self.tokens = 0
        return reading

    def read(self, reading: Reading) -> Figures:
        """The figures of a line, when the device has got there; lines are read in their order, before the next pause.

        Raises: ValueError if the loss or the gradient was not finite.
        """
        reading.mark.wait()
        self._advance(reading.mark)
        seconds, self._window_start = self._elapsed - self._window_start, self._elapsed
        loss, norm, skipped = reading.values.tolist()
        return Figures(
            loss=_checked(loss),
            steps=reading.steps,
            grad_norm=norm if math.isfinite(norm) else None,
            tokens_per_second=reading.tokens / max(seconds, 1e-9),
            elapsed=self._elapsed,
            skipped=int(skipped),
        )

    def read_loss(self) -> float:
        """The losses of the line that is begun, summed; waits for the device. Raises ValueError as `read` does."""
        return _checked(self.loss.item())

    def read_skipped(self) -> int:
        """Skipped steps of the line that is begun; waits for the device."""
        return int(self.skipped.item())

    def elapsed(self) -> float:
        """Seconds of training so far; waits for the device."""
        if self._mark is not None:
            now = Mark(self.device)
            now.wait()
            self._advance(now)
        return self._elapsed

    def __enter__(self) -> "Meter":
        self.elapsed()
        self._mark = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark = Mark(self.device)

    def _advance(self, mark: Mark) -> None:
        assert self._mark is not None, "the clock stands still"
        self._elapsed += mark.seconds_since(self._mark)
        self._mark = mark


def _checked(loss: float) -> float:
    if not math.isfinite(loss):
        raise ValueError(
            "the loss or its gradient is no longer finite; lower learning_rate, raise warmup_steps, "
            "or train in bfloat16 or float32"
        )
    return loss
