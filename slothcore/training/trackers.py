"""The log of a run in TensorBoard and in Weights & Biases too, where `report_to` names them.

Neither is needed, and neither is imported unless it is asked for. They get what log.jsonl gets, under the names that
transformers gives: train/loss, eval/loss. What goes wrong there later never ends a run.
"""

import html
import math
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from slothcore.training.config import TrainConfig
from slothcore.training.progress import say
from slothcore.training.run_state import RunState

WANDB_PROJECT = "slothcore"
# Seconds until TensorBoard can see what was logged.
FLUSH_SECONDS = 30


def check_trackers(names: Iterable[str] | None) -> None:
    """Raise ValueError if one of them is not installed; nothing is imported."""
    for name in names or ():
        spec = find_spec(name)
        # A folder of that name, as wandb leaves it, is no package.
        if spec is None or spec.origin is None:
            raise ValueError(f"report_to names {name}, which is not installed: pip install {name}, or leave it out")


class Tracker(Protocol):
    """Somewhere that the figures of a run go."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Figures by name, after `step` steps."""

    def show_samples(self, lines: Sequence[dict[str, Any]], step: int) -> None:
        """What the model said: lines of samples.jsonl."""

    def finish(self, *, failed: bool) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in a folder. What a resumed run does again, hides what an earlier file says of it."""

    def __init__(self, config: TrainConfig, state: RunState) -> None:
        folder = Path(config.logging_dir or Path(config.output_dir) / "tensorboard")
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        purged = state.step + 1 if state.step else 0
        self.writer = writer(str(folder), purge_step=purged, flush_secs=FLUSH_SECONDS)
        if not state.step:
            options = "\n".join(f"    {line}" for line in config.to_yaml().splitlines())
            self.writer.add_text("config", options, 0)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def show_samples(self, lines: Sequence[dict[str, Any]], step: int) -> None:
        # The page of texts renders Markdown, which a model's words are not.
        texts = [f"**{html.escape(line['prompt'])}**\n\n<pre>{html.escape(line['output'])}</pre>" for line in lines]
        self.writer.add_text("samples", "\n\n".join(texts), step)

    def finish(self, *, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb; a resumed run goes on with it. Its project is WANDB_PROJECT, or slothcore."""

    def __init__(self, config: TrainConfig, state: RunState) -> None:
        self.wandb = import_module("wandb")
        folder = Path(config.logging_dir or config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            name=config.run_name or Path(config.output_dir).resolve().name,
            config=config.to_dict(),
            dir=str(folder),
            id=state.wandb_id,
            resume="allow",
        )
        state.wandb_id = self.run.id
        # Steps that are done again after resuming would be dropped if they were wandb's own.
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, figures: dict[str, float], step: int) -> None:
        self.run.log({**figures, "train/global_step": step})

    def show_samples(self, lines: Sequence[dict[str, Any]], step: int) -> None:
        rows = [[step, line["prompt"], line["output"]] for line in lines]
        table = self.wandb.Table(columns=["step", "prompt", "output"], data=rows)
        self.run.log({"samples": table, "train/global_step": step})

    def finish(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


KINDS: dict[str, Callable[[TrainConfig, RunState], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Trackers:
    """All that `report_to` names. One that fails, or cannot be started, is said and left alone from then on."""

    def __init__(self, config: TrainConfig, state: RunState) -> None:
        self._open: dict[str, Tracker] = {}
        for name in config.report_to or ():
            try:
                self._open[name] = KINDS[name](config, state)
            except Exception as error:
                remedy = "run wandb login, or set WANDB_MODE=offline" if name == "wandb" else "check logging_dir"
                reason = " ".join(str(error).split())
                # Not an error: by now the run has claimed its folder.
                say(f"note: {name} cannot be started ({reason}); training goes on without it; next time {remedy}")

    def log(self, record: dict[str, Any]) -> None:
        """A line of log.jsonl."""
        figures = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(figures, record["step"]))

    def show_samples(self, lines: Sequence[dict[str, Any]]) -> None:
        """Lines of samples.jsonl, all of one step."""
        if lines:
            self._each(lambda tracker: tracker.show_samples(lines, lines[0]["step"]))

    def finish(self, *, failed: bool) -> None:
        """The run is over."""
        self._each(lambda tracker: tracker.finish(failed=failed))
        self._open = {}

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:
                say(f"note: {name} is told nothing any more ({' '.join(str(error).split())}); training goes on")
                del self._open[name]
