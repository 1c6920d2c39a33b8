"""run.json, what a run is made of and what became of it, and report.html, which is drawn from it and the log.

Both are for people: nothing of them is read to resume, and where they cannot be written the run goes on without.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from slothcore.models.decoder import Decoder
from slothcore.report.page import LivePage
from slothcore.report.saved_run import NOTES_FILE
from slothcore.report.writing import replace_text
from slothcore.training.batches import RowSet, StepSchedule
from slothcore.training.best import early_end
from slothcore.training.config import TrainConfig
from slothcore.training.memory_plan import MemoryPlan
from slothcore.training.micro_batches import StepCut, compare, sample_passes
from slothcore.training.progress import say
from slothcore.training.run_facts import (
    file_facts,
    machine_facts,
    memory_facts,
    model_facts,
    option_facts,
    row_facts,
    version_facts,
)
from slothcore.training.run_state import RunState
from slothcore.training.trackers import Trackers

Status = Literal["running", "finished", "interrupted", "failed"]


class RunRecord:
    """The notes of one run and its page.

    Args:
        notes: plain values.
        page: None: no page is drawn.
        trackers: who else hears of each line.
    """

    def __init__(
        self, folder: Path, notes: dict[str, Any], *, page: LivePage | None, trackers: Trackers | None = None
    ) -> None:
        self.folder, self.notes, self.page, self.trackers = folder, notes, page, trackers
        self._given_up = False

    @classmethod
    def begin(
        cls,
        model: Decoder,
        config: TrainConfig,
        state: RunState,
        *,
        schedule: StepSchedule,
        cut: StepCut,
        memory: MemoryPlan,
        eval_rows: RowSet | None,
    ) -> "RunRecord":
        """Note what the run is made of; its first step is `state.step`."""
        folder = Path(config.output_dir)
        rows = {"training": schedule.rows, "evaluation": eval_rows}
        notes: dict[str, Any] = {
            "status": "running",
            "started": time.time(),
            "first_step": state.step,
            "total_steps": schedule.total_steps,
            "model": model_facts(model, config.source),
            "machine": machine_facts(model.device),
            "versions": version_facts(),
            "files": file_facts(config),
            "rows": {use: row_facts(some) for use, some in rows.items() if some is not None},
            "data_fingerprint": state.data_fingerprint,
            "options": option_facts(config),
        }
        if model.device.type == "cuda":
            sample = sample_passes(cut, schedule, first_step=state.step)
            notes["memory"] = memory_facts(memory, tokens=sample.most_tokens, passes=sample.most)
        page = LivePage(folder) if config.report else None
        record = cls(folder, notes, page=page, trackers=Trackers(config, state))
        record._write()
        return record

    def line_written(self, line: dict[str, Any]) -> None:
        """The log has grown: tell the trackers, and draw the page anew, if it is time."""
        if self.trackers is not None:
            self.trackers.log(line)
        if self.page is not None:
            self._guarded(self.page.refresh)

    def samples_written(self, lines: Sequence[dict[str, Any]]) -> None:
        """What the model said at a step stands in samples.jsonl."""
        if self.trackers is not None:
            self.trackers.show_samples(lines)

    def note_best(self, state: RunState, config: TrainConfig, *, stopped_early: bool) -> None:
        """Note which evaluation was the best, whether the result is of that step, and why the run ended early."""
        if state.best_step is not None:
            self.notes |= {"best_step": state.best_step, "best_is_saved": config.load_best_model_at_end}
        if stopped_early:
            self.notes["early_stop"] = early_end(state, config)

    def memory_used(self, plan: MemoryPlan, *, tokens: int, passes: int, actual: int) -> str:
        """Note what was predicted for the largest pass that there was, and what it took; gives both in one line."""
        self.notes["memory"] = {**memory_facts(plan, tokens=tokens, passes=passes), "actual": actual}
        return compare(plan, tokens=tokens, passes=passes, actual=actual)

    def end(self, status: Status, error: BaseException | None = None) -> None:
        """The run is over. Says where the page is, if there is one."""
        self.notes |= {"status": status, "ended": time.time(), "error": " ".join(str(error).split()) if error else None}
        self._write()
        if self.trackers is not None:
            self.trackers.finish(failed=status == "failed")
        page = self.page
        if page is not None and self._guarded(lambda: page.refresh(now=True)):
            say(f"the run is drawn in {page.path}")

    def _write(self) -> None:
        text = json.dumps(self.notes, indent=2, default=str) + "\n"
        self._guarded(lambda: replace_text(self.folder / NOTES_FILE, text))

    def _guarded(self, write: Callable[[], object]) -> bool:
        """Whether it was written. Of whatever goes wrong here, nothing is worth the loss of a day's training."""
        if self._given_up:
            return False
        try:
            write()
        except Exception as error:
            say(f"note: the report is not written any more ({error}); training goes on without")
            self._given_up = True
            return False
        return True
