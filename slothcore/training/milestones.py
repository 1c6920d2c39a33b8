"""What happens between two steps of a run: evaluations, what follows from them, and samples."""

import math
from collections.abc import Callable
from typing import Any

from slothcore.training.best import count_evaluation, early_end, has_stopped_improving
from slothcore.training.config import TrainConfig
from slothcore.training.evaluation import EvalResult
from slothcore.training.progress import say
from slothcore.training.report import most_memory
from slothcore.training.run_state import RunState
from slothcore.training.samples import Samples
from slothcore.training.training_log import TrainingLog


class Milestones:
    """Evaluates and asks for samples when it is time.

    Args:
        evaluate: gives the loss on the evaluation data; None if there are none.
    Attributes:
        evaluated: what the newest evaluation gave.
        is_new_best: whether the newest step was evaluated, with the lowest loss yet.
        stopped_early: whether the evaluations say that the run is to end.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: RunState,
        log: TrainingLog,
        *,
        evaluate: Callable[[], EvalResult] | None,
        samples: Samples,
    ) -> None:
        self.config, self.state, self.log = config, state, log
        self.evaluate, self.samples = evaluate, samples
        self.evaluated: EvalResult | None = None
        self.is_new_best = False
        # A run that was killed after its last evaluation has nothing left to do.
        self.stopped_early = has_stopped_improving(state, config)
        if self.stopped_early:
            say(f"{early_end(state, config)}; to go on, raise early_stopping_patience")

    def before_training(self) -> None:
        """What a fresh run begins with; a resumed one has done it."""
        if self.state.step > 0:
            return
        if self.config.eval_on_start:
            self._evaluate()
        if self.samples:
            self._sample()

    def after_step(self, *, last: bool) -> None:
        """Do what is due after the newest step; `last` if none is to follow."""
        config, step = self.config, self.state.step
        self.is_new_best = False
        evaluates = self.evaluate is not None and (last or is_due(step, config.eval_steps))
        if evaluates:
            loss = self._evaluate()
            self.is_new_best = count_evaluation(self.state, loss, threshold=config.early_stopping_threshold)
            if not last and has_stopped_improving(self.state, config):
                self.stopped_early = True
                say(early_end(self.state, config))
        samples_due = evaluates if config.sample_steps is None else is_due(step, config.sample_steps)
        if self.samples and (samples_due or last or self.stopped_early):
            self._sample()

    def needs_checkpoint(self, *, finished: bool) -> bool:
        """Whether the newest step is to be saved: at its interval, at the end, and where the best yet must be kept."""
        config = self.config
        at_interval = config.save_steps > 0 and (finished or is_due(self.state.step, config.save_steps))
        return at_interval or (self.is_new_best and config.load_best_model_at_end)

    def _evaluate(self) -> float:
        assert self.evaluate is not None
        with self.log.paused():
            result = self.evaluated = self.evaluate()
        perplexity = result.perplexity if math.isfinite(result.perplexity) else None
        record: dict[str, Any] = {"step": self.state.step, "eval_loss": result.loss, "eval_perplexity": perplexity}
        self.log.report.log({**record, **most_memory(self.log.meter.device)})
        return result.loss

    def _sample(self) -> None:
        with self.log.paused():
            lines = self.samples.ask(self.state.step)
        record = self.log.report.record
        if record is not None:
            record.samples_written(lines)


def is_due(step: int, interval: int | None) -> bool:
    """Whether something is done after this step that is done every so many; None: never."""
    return interval is not None and step % interval == 0
