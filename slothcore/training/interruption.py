"""Ctrl-C between two optimizer steps, never inside one."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

STDERR = 2
# Ctrl-C; what ends a job; a terminal that closes, or a connection to it that breaks, which Windows has no signal for.
ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interruption:
    """While entered, the first SIGINT, SIGTERM or SIGHUP only sets `requested`; a second SIGINT interrupts at once.

    An optimizer step cut in half leaves weights that no number of steps describes. Signals reach the main thread only,
    so in another thread nothing is caught and nothing changes. A signal that is ignored stays so: a script has its
    background jobs ignore the Ctrl-C that is meant for itself, and `nohup` the end of a terminal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.requested = True
        # Whoever reads may have gone: Ctrl-C ends `tee` as well.
        with suppress(OSError):
            # Not by print: the signal may have come in the middle of one.
            os.write(STDERR, b"\nstopping after this step; Ctrl-C again stops at once, without a checkpoint\n")
