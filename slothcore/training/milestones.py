"""What happens between two steps of a run: evaluations, what follows from them, and samples."""

import math
from typing import TYPE_CHECKING, Any

from slothcore.training.best import count_evaluation, early_end, has_stopped_improving
from slothcore.training.evaluation import EvalResult
from slothcore.training.report import Report, most_memory, say
from slothcore.training.run_state import RunState
from slothcore.training.training_log import TrainingLog

if TYPE_CHECKING:
    from slothcore.training.trainer import SFTTrainer


class Milestones:
    """Evaluates and asks for samples when it is time.

    Attributes:
        evaluated: what the newest evaluation gave.
        is_new_best: whether the newest step was evaluated, with the lowest loss yet.
        stopped_early: whether the evaluations say that the run is to end.
    """

    def __init__(self, trainer: "SFTTrainer", state: RunState, report: Report, log: TrainingLog) -> None:
        self.trainer, self.state, self.report, self.log = trainer, state, report, log
        self.evaluated: EvalResult | None = None
        self.is_new_best = False
        # A run that was killed after its last evaluation has nothing left to do.
        self.stopped_early = has_stopped_improving(state, trainer.config)
        if self.stopped_early:
            say(f"{early_end(state, trainer.config)}; to go on, raise early_stopping_patience")

    def before_training(self) -> None:
        """What a fresh run begins with; a resumed one has done it."""
        if self.state.step > 0:
            return
        if self.trainer.config.eval_on_start:
            self._evaluate()
        if self.trainer.samples:
            self._sample()

    def after_step(self, *, last: bool) -> None:
        """Do what is due after the newest step; `last` if none is to follow."""
        config, step = self.trainer.config, self.state.step
        self.is_new_best = False
        evaluates = self.trainer.eval_rows is not None and (last or is_due(step, config.eval_steps))
        if evaluates:
            loss = self._evaluate()
            self.is_new_best = count_evaluation(self.state, loss, threshold=config.early_stopping_threshold)
            if not last and has_stopped_improving(self.state, config):
                self.stopped_early = True
                say(early_end(self.state, config))
        samples_due = evaluates if config.sample_steps is None else is_due(step, config.sample_steps)
        if self.trainer.samples and (samples_due or last or self.stopped_early):
            self._sample()

    def needs_checkpoint(self, *, finished: bool) -> bool:
        """Whether the newest step is to be saved: at its interval, at the end, and where the best yet must be kept."""
        config = self.trainer.config
        at_interval = config.save_steps > 0 and (finished or is_due(self.state.step, config.save_steps))
        return at_interval or (self.is_new_best and config.load_best_model_at_end)

    def _evaluate(self) -> float:
        with self.log.paused():
            result = self.evaluated = self.trainer.evaluate()
        perplexity = result.perplexity if math.isfinite(result.perplexity) else None
        record: dict[str, Any] = {"step": self.state.step, "eval_loss": result.loss, "eval_perplexity": perplexity}
        self.report.log({**record, **most_memory(self.trainer.model.device)})
        return result.loss

    def _sample(self) -> None:
        with self.log.paused():
            lines = self.trainer.samples.ask(self.state.step)
        if self.report.record is not None:
            self.report.record.samples_written(lines)


def is_due(step: int, interval: int | None) -> bool:
    """Whether something is done after this step that is done every so many; None: never."""
    return interval is not None and step % interval == 0
