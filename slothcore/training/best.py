"""Which evaluation was the best, when there were enough without a better one, and the way back to the best weights.

Counting is transformers' (`EarlyStoppingCallback`): an evaluation is an improvement if its loss is lower than the
lowest until then by more than the threshold. The lowest itself follows every lower loss, however little lower it is.
"""

import math
import shutil
from pathlib import Path

from slothcore.data.values import counted
from slothcore.models.decoder import Decoder
from slothcore.training.batches import RowSet
from slothcore.training.config import TrainConfig
from slothcore.training.evaluation import EvalResult
from slothcore.training.progress import say
from slothcore.training.run_state import RunState, checkpoint_of, checkpoints, write_folder
from slothcore.training.weights import load_weights


def count_evaluation(state: RunState, loss: float, *, threshold: float) -> bool:
    """Note in `state` what the evaluation after its step gave; says whether that is the lowest loss yet.

    A loss that is no finite number is never the lowest.
    """
    lowest = state.best_eval_loss if state.best_eval_loss is not None else math.inf
    state.evaluations_without_improvement += 1
    # Written so that the first one counts whatever the threshold, and NaN does not.
    if loss < lowest and lowest - loss > threshold:
        state.evaluations_without_improvement = 0
    if not loss < lowest:
        return False
    state.best_step, state.best_eval_loss = state.step, loss
    return True


def has_stopped_improving(state: RunState, config: TrainConfig) -> bool:
    """Whether the run ends here because `early_stopping_patience` evaluations in a row were no improvement."""
    patience = config.early_stopping_patience
    return patience is not None and state.evaluations_without_improvement >= patience


def early_end(state: RunState, config: TrainConfig) -> str:
    """The sentence that says so."""
    number = counted(state.evaluations_without_improvement, "evaluation")
    threshold = config.early_stopping_threshold
    enough = f" of more than {threshold:g}" if threshold else ""
    sentence = f"early stopping after step {state.step}: {number} in a row without an improvement{enough}"
    if state.best_step is None:
        return sentence
    return f"{sentence}; the lowest loss was {state.best_eval_loss:.4g}, at step {state.best_step}"


def best_checkpoint(state: RunState, config: TrainConfig) -> Path | None:
    """The checkpoint that the result will come from, which is kept therefore; None without load_best_model_at_end."""
    if not config.load_best_model_at_end or state.best_step is None:
        return None
    return checkpoint_of(Path(config.output_dir), state.best_step)


def load_best(model: Decoder, eval_rows: RowSet, state: RunState, config: TrainConfig) -> EvalResult | None:
    """Put the weights of the best evaluation into the model; says which they are, and gives what it found.

    None, with a note, if their checkpoint is gone; the model is then left as it is.
    """
    folder = best_checkpoint(state, config)
    if folder is None or folder not in checkpoints(folder.parent):
        say(f"note: the checkpoint of the best evaluation is gone; the result is that of step {state.step}")
        return None
    if state.best_step != state.step:
        load_weights(model, folder)
    say(f"the result is that of step {state.best_step}, whose evaluation loss {state.best_eval_loss:.4g} is the lowest")
    assert state.best_eval_loss is not None
    return EvalResult(state.best_eval_loss, sum(eval_rows.row_targets))


def bring_best_along(state: RunState, config: TrainConfig, source: Path) -> None:
    """When a run goes on from a checkpoint: see that the best one until there is at hand too.

    Args:
        source: the folder that the checkpoint lies in; from one of another run, the best is copied.
    """
    target = best_checkpoint(state, config)
    if target is None or state.best_step is None:
        return
    folder = checkpoint_of(source, state.best_step)
    if folder in checkpoints(source):
        if source.resolve() == target.parent.resolve():
            return
        write_folder(target, lambda partial: shutil.copytree(folder, partial, dirs_exist_ok=True))
        say(f"copied {folder}, which has the lowest evaluation loss until now")
    else:
        say(
            f"note: the checkpoint of step {state.best_step}, with the lowest evaluation loss until now, is gone; "
            "the best is looked for from here on"
        )
        state.best_step = state.best_eval_loss = None
