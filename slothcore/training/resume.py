"""From a run to a checkpoint and back, to the last bit."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from slothcore.data.tokenizer import Tokenizer
from slothcore.report.saved_run import LOG_FILE, SAMPLES_FILE
from slothcore.training.best import best_checkpoint, bring_best_along
from slothcore.training.config import TrainConfig
from slothcore.training.learner import Learner
from slothcore.training.meter import Meter
from slothcore.training.optimizer import load_optimizer_state, optimizer_state
from slothcore.training.progress import say
from slothcore.training.report import rewind_log
from slothcore.training.run_folder import CONFIG_FILE, check_output_dir, claim_output_dir, has_result
from slothcore.training.run_state import (
    OPTIMIZER_FILE,
    RNG_FILE,
    RunState,
    checkpoints,
    find_checkpoint,
    keep_newest,
    read_safetensors,
    read_state,
    remove_folder,
    restore_generators,
    save_checkpoint,
)
from slothcore.training.weights import load_weights, save_weights

# Options that leave the course of training as it is: where it writes, how often it speaks, where it computes.
WITHOUT_INFLUENCE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "eval_data",
    "eval_on_start",
    "early_stopping_patience",
    "early_stopping_threshold",
    "load_best_model_at_end",
    "sample_prompts",
    "sample_steps",
    "sample_max_new_tokens",
    "report_to",
    "run_name",
    "logging_dir",
    "per_device_eval_batch_size",
    "plot",
    "report",
    "disable_tqdm",
    "device",
    "gradient_checkpointing",
    "local_files_only",
}


@contextmanager
def time_of_run(config: TrainConfig, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Within, chat templates that write the day write that on which the rows of this run were made: before its
    checkpoint, if it goes on from one. Gives that time.

    Raises: FileNotFoundError if there is no such checkpoint, ValueError if it cannot be read.
    """
    moment = datetime.now().isoformat(timespec="seconds")
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(str(config.resume_from_checkpoint), Path(config.output_dir))
        moment = read_state(checkpoint).rows_made or moment
    with tokenizer.clock.held(datetime.fromisoformat(moment)) if tokenizer else nullcontext():
        yield moment


def write_checkpoint(
    learner: Learner, config: TrainConfig, state: RunState, meter: Meter, *, steps_per_epoch: int
) -> Path:
    """Save everything that the next step depends on, and delete the checkpoints beyond the limit."""
    tensors, values = optimizer_state(learner.optimizer, learner.parameters)
    state.epoch, state.position = divmod(state.step, steps_per_epoch)
    state.window_loss, state.window_steps = meter.read_loss(), meter.steps
    state.window_skipped = meter.read_skipped()
    state.elapsed = meter.elapsed()
    state.optimizer_values, state.scaler = values, learner.scaler.state_dict()
    output_dir = Path(config.output_dir)
    path = save_checkpoint(
        output_dir,
        state,
        optimizer_tensors=tensors,
        device=learner.model.device,
        save_weights=lambda folder: save_weights(learner.model, learner.tokenizer, folder),
    )
    keep_newest(output_dir, config.save_total_limit, best=best_checkpoint(state, config))
    return path


def how_to_go_on(config: TrainConfig) -> str:
    """The sentence for the user of a run that was interrupted."""
    if config.source is None:
        return "Go on with TrainConfig(resume_from_checkpoint='latest', ...)"
    file = shlex.quote(str(Path(config.output_dir) / CONFIG_FILE))
    return f"Go on with: slothcore train --config {file} --resume-from-checkpoint latest"


def restore(learner: Learner, config: TrainConfig, fresh: RunState, *, total_steps: int) -> RunState:
    """Put what learns into the state of the checkpoint that the configuration names, and give the run's own.

    Steps are cut into passes as before, so that they round alike, unless `memory_budget` is another now.
    The log is cut at the checkpoint's step and later checkpoints are deleted: the run is rewound, not forked.

    Args:
        fresh: the state that a new run would begin with.
    Raises: FileNotFoundError if there is no checkpoint; ValueError if it is of another model, of other data or
        damaged. Neither changes a file.
    """
    assert isinstance(config.resume_from_checkpoint, str)
    output_dir = Path(config.output_dir)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    if checkpoint.parent.resolve() != output_dir.resolve():
        # Going on in a folder of its own is fine, but not over a third run.
        check_output_dir(replace(config, resume_from_checkpoint=None))
    saved = read_state(checkpoint)
    _check_same_run(fresh, saved, checkpoint, total_steps=total_steps)
    optimizer_tensors = read_safetensors(checkpoint / OPTIMIZER_FILE)
    generators = read_safetensors(checkpoint / RNG_FILE)
    load_weights(learner.model, checkpoint)
    load_optimizer_state(learner.optimizer, learner.parameters, optimizer_tensors, saved.optimizer_values)
    if saved.scaler:
        learner.scaler.load_state_dict(saved.scaler)
    restore_generators(generators, learner.model.device)

    claim_output_dir(config)
    for log in (LOG_FILE, SAMPLES_FILE):
        if (checkpoint.parent / log).is_file():
            rewind_log(checkpoint.parent / log, output_dir / log, saved.step)
    for later in checkpoints(output_dir):
        if later != checkpoint and int(later.name.partition("-")[2]) > saved.step:
            remove_folder(later)
            say(f"deleted {later}, which came after the checkpoint that training goes on from")
    _forget_other_evaluations(saved, fresh)
    bring_best_along(saved, config, checkpoint.parent)
    if checkpoint.parent.resolve() != output_dir.resolve():
        saved.wandb_id = None  # a run of its own, from here on
    say(f"resumed from {checkpoint}: step {saved.step} of {total_steps}")
    if saved.config.get("memory_budget") != fresh.config["memory_budget"]:
        saved.token_budget = saved.decoded_layers = None
        saved.graphs_given_up = False
    saved.config, saved.rows_made = fresh.config, fresh.rows_made
    return saved


def _forget_other_evaluations(saved: RunState, fresh: RunState) -> None:
    """Losses on other data say nothing of which step is the best, or when to stop."""
    if saved.eval_fingerprint not in (None, fresh.eval_fingerprint):
        if saved.best_step is not None:
            say("note: the evaluation data are not those of the checkpoint; which step is the best is told anew")
        saved.best_step = saved.best_eval_loss = None
        saved.evaluations_without_improvement = 0
    saved.eval_fingerprint = fresh.eval_fingerprint


def _check_same_run(fresh: RunState, saved: RunState, checkpoint: Path, *, total_steps: int) -> None:
    """Raise ValueError unless going on from `checkpoint` continues the same training; say what differs in options."""
    if saved.model_fingerprint != fresh.model_fingerprint:
        raise ValueError(
            f"{checkpoint} is of another model: base weights, bits, dtype or adapter shapes differ; "
            "resume with the options that the run began with (its config.yaml), or start a new run"
        )
    if saved.data_fingerprint != fresh.data_fingerprint:
        raise ValueError(
            f"{checkpoint} was trained on other data (or other packing, masking or lengths); "
            "resume with the data and options that the run began with, or start a new run"
        )
    if saved.config["optim"] != fresh.config["optim"]:
        raise ValueError(
            f"{checkpoint} holds the state of optim {saved.config['optim']}, "
            f"and optim is {fresh.config['optim']}; set it back, or start a new run"
        )
    # A run that ended between its last checkpoint and its result has that left to do.
    only_saves = saved.step == total_steps and not has_result(checkpoint)
    if saved.step >= total_steps and not only_saves:
        length = "max_steps" if fresh.config["max_steps"] > 0 else "num_train_epochs"
        raise ValueError(f"{checkpoint} has already done {saved.step} of {total_steps} steps; raise {length} to go on")
    for name, value in fresh.config.items():
        if name not in WITHOUT_INFLUENCE and saved.config.get(name) != value:
            say(f"note: {name} is {value}, and was {saved.config.get(name)} until this checkpoint")
