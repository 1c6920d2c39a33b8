"""The two ends of a conversation: a person at a terminal, or a script that pipes questions in."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

QUOTES = '"""'
DIM, BOLD, RESET = "\033[2m", "\033[1m", "\033[0m"


class Terminal:
    """Reads messages from standard input and shows answers on standard output.

    At a terminal there is a prompt, lines can be edited and fetched back with the arrow keys, notes stand in between
    on standard error, and Ctrl-C stops no more than the answer. Where questions are piped in, the answers alone come
    out, what goes wrong ends the session with the number of its line, and Ctrl-C ends it as any other program.
    """

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        self.is_colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._line = 0
        if self.is_interactive:
            # input() edits lines with it; Windows, whose console does that by itself, has none.
            with suppress(ImportError):
                import readline  # noqa: F401

    def note(self, text: str) -> None:
        """Something for a person, which is no part of the conversation."""
        if self.is_interactive:
            self.tell(text)

    def tell(self, text: str) -> None:
        """What somebody asked for, on standard error: a script's, too."""
        self._say(f"{DIM}{text}{RESET}" if self.is_colored else text)

    def complain(self, text: str) -> None:
        """Something went wrong; at a terminal one goes on. Raises: ValueError elsewhere."""
        if not self.is_interactive:
            raise ValueError(f"line {self._line}: {text}")
        self._say(f"slothcore: {text}")

    def read(self) -> str | None:
        """The next message; None at the end of the input. What Ctrl-C interrupts at a terminal is dropped."""
        while True:
            try:
                return self._read_message()
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                self._say("")
                self.note("Ctrl-D leaves")

    def show(self, pieces: Iterator[str]) -> bool:
        """Write an answer as it comes; whether Ctrl-C stopped it."""
        stopped = False
        last = ""
        with _FirstInterrupt(self.is_interactive) as interrupt:
            try:
                for piece in pieces:
                    last = piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    if interrupt.came:
                        stopped = True
                        break
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                stopped = True
            finally:
                close = getattr(pieces, "close", None)
                if close is not None:
                    close()
        if not last.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
        return stopped or interrupt.came

    def _read_message(self) -> str | None:
        """One line; several where the first begins with three quotes or lines end in a backslash."""
        line = self._read_line("> ")
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return self._read_quoted(line.lstrip()[len(QUOTES) :])
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._read_line(". ")
        return "\n".join([*lines, *([] if line is None else [line])])

    def _read_quoted(self, first: str) -> str:
        begun, lines, line = self._line, [], first
        while not line.rstrip().endswith(QUOTES):
            lines.append(line)
            following = self._read_line(". ")
            if following is None:
                self.complain(f"the message that {QUOTES} begins in line {begun} has no end")
                return ""
            line = following
        lines.append(line.rstrip()[: -len(QUOTES)])
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str) -> str | None:
        self._line += 1
        try:
            if not self.is_interactive:
                # Bytes, a line at a time: decoded in larger pieces, a wrong byte would be said to lie elsewhere.
                line = sys.stdin.buffer.readline().decode("utf-8-sig" if self._line == 1 else "utf-8")
                return line.rstrip("\r\n") if line else None
            sys.stdout.flush()
            return input(prompt)
        except EOFError:
            self._say("")
            return None
        except UnicodeDecodeError as error:
            self.complain(f"what was read is not UTF-8 (byte {error.object[error.start]:#04x}); write it as UTF-8")
            return ""

    def _say(self, text: str) -> None:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)


class _FirstInterrupt:
    """While entered at a terminal, the first Ctrl-C only sets `came`, so that no token is left half read."""

    def __init__(self, is_wanted: bool) -> None:
        self.came, self._is_wanted = False, is_wanted
        self._previous: Any = None

    def __enter__(self) -> "_FirstInterrupt":
        if self._is_wanted:
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *unused: object) -> None:
        if self._is_wanted:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
