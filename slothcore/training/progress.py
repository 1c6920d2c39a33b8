"""What a run says: lines, and below them in a terminal one that moves: how far it is, what it has come to, how long."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from tqdm.std import Bar  # type: ignore[attr-defined]

# A bar with fewer characters says less than the percentage beside it, and one with more takes the eye from the figures.
SHORTEST_BAR, LONGEST_BAR = 8, 32
# What the line does without first where the terminal is narrow.
LEAST_WANTED = ("bar", "memory", "skipped", "speed", "percent", "left", "loss")


def say(text: str) -> None:
    """One line to the user, above the progress bar if there is one; where nobody can read it, to nobody.

    A run does not end because its terminal has gone, or the `tee` behind it, which the Ctrl-C that asks for a
    checkpoint ends first; nor because an output of another encoding lacks a character of an answer.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left to flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


def is_terminal() -> bool:
    """Whether standard error can show a line that moves."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class TimeLeft:
    """How long a run will still take, by the clock on the wall: pauses for evaluation and saving will come again.

    What was done before a checkpoint, on another day and maybe another machine, does not count.
    """

    def __init__(self, step: int, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._total, self._clock = step, total_steps, clock
        self._started = clock()

    def at(self, step: int) -> float | None:
        """Seconds from now to the end, after `step` steps; None before the first one."""
        done = step - self._first
        if done < 1:
            return None
        return (self._clock() - self._started) / done * (self._total - step)


class ProgressLine(tqdm):  # type: ignore[type-arg]
    """A tqdm whose line leaves out what the terminal has no room for, instead of being cut off.

    Attributes:
        figures: texts by kind, of `LEAST_WANTED`.
    """

    def __init__(self, *, step: int, total_steps: int, disable: bool) -> None:
        self.figures: dict[str, str] = {}
        self.time_left = TimeLeft(step, total_steps)
        super().__init__(initial=step, total=total_steps, disable=disable, dynamic_ncols=True)

    def show(self, figures: dict[str, str]) -> None:
        """Change what stands there of these kinds, and draw."""
        self.figures = figures
        self.refresh()

    def __str__(self) -> str:
        width = self.format_dict["ncols"] or 80
        step, total = int(self.n), int(self.total or 0)
        return line_of(step, total, self.figures, self.time_left.at(step), width=width, is_ascii=bool(self.ascii))


def line_of(
    step: int, total_steps: int, figures: dict[str, str], left: float | None, *, width: int, is_ascii: bool = False
) -> str:
    """The line for a terminal of `width` columns: all figures and a bar, or as many of them as there is room for."""
    share = step / max(1, total_steps)
    parts: dict[str, str] = {"percent": f"{share:4.0%}", "bar": "", "step": f"step {step}/{total_steps}", **figures}
    if left is not None and step < total_steps:
        parts["left"] = f"{in_words(left)} left"
    order = ("percent", "bar", "step", "loss", "speed", "left", "memory", "skipped")
    dropped = iter(LEAST_WANTED)
    while True:
        shown = [kind for kind in order if kind in parts]
        line = "  ".join(parts[kind] for kind in shown)
        # A terminal may begin a new line once its last column is written.
        room = width - 1 - len(line)
        if "bar" in parts and room >= SHORTEST_BAR:
            bar = Bar(share, min(room, LONGEST_BAR), charset=Bar.ASCII if is_ascii else Bar.UTF)
            parts["bar"] = f"{bar}"
            return "  ".join(parts[kind] for kind in shown)
        if "bar" not in parts and (room >= 0 or len(parts) == 1):
            return line[: max(1, width - 1)]
        parts.pop(next(kind for kind in dropped if kind in parts))


def in_words(seconds: float) -> str:
    """A time as people say it, to about a hundredth: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        whole = round(seconds / 600) * 10
        return f"{whole // 60} h {whole % 60} min" if whole % 60 else f"{whole // 60} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def figures_of(record: dict[str, Any]) -> dict[str, str]:
    """What a line of the log has for the moving line."""
    shown = {"loss": f"loss {record['loss']:.4f}", "speed": f"{record['tokens_per_second']:,.0f} tokens/s"}
    memory = record.get("memory_gib", record.get("host_memory_gib"))
    if memory is not None:
        shown["memory"] = f"{memory:.1f} GiB"
    if record.get("skipped_steps"):
        shown["skipped"] = f"{record['skipped_steps']} skipped"
    return shown
