"""A program at a terminal of its own: what a person types and sees, Ctrl-C and the width of the window included."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CTRL_C, CTRL_D = "\x03", "\x04"
# Seconds until what is expected must have come; a busy machine takes its time to import torch.
PATIENCE = 120
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class PseudoTerminal:
    """Runs `slothcore` with `words`. Use as a context manager, so that no process stays.

    Attributes:
        seen: everything that the terminal has received, control sequences included.
    """

    def __init__(self, words: list[str], *, columns: int = 80, rows: int = 24, cwd: Path = ROOT) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}

        def own_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self._process = subprocess.Popen(
            [sys.executable, "-m", "slothcore.cli", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=own_terminal,
            env={**environment, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=cwd,
        )
        os.close(slave)
        self.seen = ""
        self._bytes, self._looked_at = b"", 0

    def __enter__(self) -> "PseudoTerminal":
        return self

    def __exit__(self, *unused: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def send(self, text: str) -> None:
        """Type it."""
        if text == CTRL_C:
            # What was typed before may have been echoed and readline not yet be waiting for more; it notices a signal
            # that comes in between with the next key only. A person is not as fast.
            time.sleep(0.3)
        os.write(self._master, text.encode())

    def expect(self, text: str) -> str:
        """Wait for `text` behind what was expected before; gives what stands in between, without control sequences."""
        deadline = time.monotonic() + PATIENCE
        while (place := self.seen.find(text, self._looked_at)) < 0:
            assert time.monotonic() < deadline, f"{text!r} did not come; there is {self.seen[self._looked_at :]!r}"
            assert self._receive(), f"the program ended without {text!r}: {self.seen[self._looked_at :]!r}"
        between = self.seen[self._looked_at : place]
        self._looked_at = place + len(text)
        return CONTROL.sub("", between)

    def finish(self) -> int:
        """Wait for the end of the program; gives its exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._receive():
            assert time.monotonic() < deadline, f"it goes on: {self.seen[self._looked_at :]!r}"
        return self._process.wait(timeout=PATIENCE)

    def _receive(self) -> bool:
        """Take what has come within a second; whether more may come."""
        if not select.select([self._master], [], [], 1)[0]:
            return True
        try:
            received = os.read(self._master, 2**16)
        except OSError:  # Linux says so when the last program at the terminal has ended
            received = b""
        self._bytes += received
        self.seen = self._bytes.decode("utf-8", errors="replace")
        return bool(received)
