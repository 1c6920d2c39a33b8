"""Progress and log of a run: what is shown and written of each line, the log read back, the drawing of the loss."""

import importlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from slothcore.report.saved_run import LOG_FILE
from slothcore.report.writing import replace_text, writing
from slothcore.training.progress import ProgressLine, figures_of, in_words, is_terminal, say
from slothcore.training.run_folder import PLOT_FILE
from slothcore.training.run_record import RunRecord

# Windows has no such module.
resource = importlib.import_module("resource") if os.name == "posix" else None


def most_memory(device: torch.device) -> dict[str, float]:
    """The field of a record for the most memory until now: allocated on the GPU, or on a CPU the process's own."""
    if device.type == "cuda":
        return {"memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}
    if resource is None:
        return {}
    # macOS counts in bytes, Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"host_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}


class Report:
    """Progress and log of one run, from `step` on.

    In a terminal a line moves, see `progress.py`. Elsewhere, where it would draw itself anew without end, each line of
    the log is said in words. A line of the log is flushed as it is written: a killed run keeps it.

    Args:
        run: hears of each line, so that it may draw the run anew, and of an error that ends the run; or a folder alone.
    """

    def __init__(
        self,
        run: RunRecord | Path,
        *,
        step: int,
        total_steps: int,
        disable_tqdm: bool,
    ) -> None:
        self.total_steps = total_steps
        self.record = None if isinstance(run, Path) else run
        self.path = (run if isinstance(run, Path) else run.folder) / LOG_FILE
        self.file = self.path.open("a", encoding="utf-8")
        self.bar = ProgressLine(step=step, total_steps=total_steps, disable=disable_tqdm or not is_terminal())

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        with suppress(OSError):  # which was raised when the line was written
            self.file.close()
        if self.record is not None and kind is not None:
            self.record.end("interrupted" if kind is KeyboardInterrupt else "failed", error)

    def advance(self) -> None:
        """One optimizer step is done."""
        self.bar.update()

    def log(self, record: dict[str, Any]) -> None:
        """Write a line of the log and show its figures."""
        with writing(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.record is not None:
            self.record.line_written(record)
        if "eval_loss" in record:
            perplexity = "infinite" if record["eval_perplexity"] is None else f"{record['eval_perplexity']:.4g}"
            say(f"step {record['step']}: evaluation loss {record['eval_loss']:.4f}, perplexity {perplexity}")
        if "loss" not in record:
            return
        figures, step = figures_of(record), record["step"]
        if not self.bar.disable:
            self.bar.show(figures)
            return
        left = self.bar.time_left.at(step)
        if left is not None and step < self.total_steps:
            figures["left"] = f"{in_words(left)} left"
        say(f"step {step}/{self.total_steps}: {', '.join(figures.values())}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a killed process left unfinished is dropped."""
    records = []
    if path.is_file():
        # Not by splitlines: a text may hold characters that end a line elsewhere.
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def rewind_log(source: Path, target: Path, step: int) -> None:
    """Write to `target` the records of `source` up to `step`, so that a resumed run repeats no line."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in read_log(source) if record["step"] <= step]
    replace_text(target, "".join(lines))


def draw_loss(output_dir: Path) -> str:
    """Draw `loss.png` from the log and say where it is, or why there is none."""
    try:
        # Figure draws without pyplot, whose choice of a window system belongs to the user's own program.
        from matplotlib.figure import Figure
    except ImportError:
        return f"{PLOT_FILE} was not drawn: matplotlib is not installed (pip install 'slothcore[plots]')"
    records = read_log(output_dir / LOG_FILE)
    if not records:
        return f"{PLOT_FILE} was not drawn: the log has no line yet"
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    losses = [record[key] for record in records for key in ("loss", "eval_loss") if key in record]
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "evaluation", "o")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel="optimizer step", ylabel="loss per target token")
    if 0 < min(losses) < max(losses) / 20:
        # A loss that falls this far would lie flat on the axis for most of the run.
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(output_dir / PLOT_FILE, dpi=120)
    except OSError as error:
        # The result is saved by now; a half-drawn picture is of no use.
        (output_dir / PLOT_FILE).unlink(missing_ok=True)
        return f"{PLOT_FILE} was not drawn: {error}"
    return f"the loss is drawn in {output_dir / PLOT_FILE}"
