"""Supervised fine-tuning: the loop.

The loss of an optimizer step is the sum over all its target tokens divided by their number, whatever the cut into
micro-batches, so gradient accumulation changes memory and time but not the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import counted
from slothcore.models.decoder import Decoder
from slothcore.training.batches import RowSet, StepSchedule
from slothcore.training.best import load_best
from slothcore.training.config import TrainConfig
from slothcore.training.decoded import keep_decoded_layers
from slothcore.training.evaluation import EvalResult, evaluate
from slothcore.training.folder_lock import held
from slothcore.training.interruption import Interruption
from slothcore.training.learner import Learner
from slothcore.training.memory import memory_of
from slothcore.training.meter import Meter
from slothcore.training.micro_batches import StepCut
from slothcore.training.milestones import Milestones
from slothcore.training.optimizer import create_optimizer, create_scaler, trainable_parameters
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.preparation import (
    allows_graphs,
    check_evaluation,
    choose_trainable,
    prepare_rows,
    resolve_max_seq_length,
)
from slothcore.training.progress import say
from slothcore.training.readiness import make_ready
from slothcore.training.report import Report, draw_loss
from slothcore.training.resume import how_to_go_on, restore, time_of_run, write_checkpoint
from slothcore.training.run_folder import check_output_dir, claim_output_dir
from slothcore.training.run_record import RunRecord
from slothcore.training.run_state import RunState, model_fingerprint
from slothcore.training.samples import Samples
from slothcore.training.schedule import check_steps, learning_rate_factor, resolve_warmup_steps
from slothcore.training.step_feed import StepFeed
from slothcore.training.trackers import check_trackers
from slothcore.training.training_log import TrainingLog
from slothcore.training.weights import save_result


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    `train_loss` is the mean over all optimizer steps so far; `path` is where the adapter, or the model, was saved
    (the checkpoint, if the run was interrupted). `eval_loss` is the newest one, or with `load_best_model_at_end` that
    of the weights that were saved; `best_step` is the step of the lowest, whether saved or not.
    """

    steps: int
    train_loss: float
    eval_loss: float | None
    eval_perplexity: float | None
    tokens: int
    seconds: float  # of training, without evaluation and saving
    path: Path
    interrupted: bool
    best_step: int | None = None
    stopped_early: bool = False


class SFTTrainer:
    """Supervised fine-tuning of an adapter, or of all weights.

    Args:
        model: from `slothcore.load` or `from_config`, with `add_lora` unless `config.full_finetuning`.
        train_dataset: records (a list, a generator, a `datasets.Dataset`, what `load_dataset` or `open_dataset`
            gives), or rows that are tokenised already.
        eval_dataset: the same, or None.
    Raises: ValueError for a configuration or data that cannot be trained on, before anything is written.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        train_dataset: Iterable[Any],
        eval_dataset: Iterable[Any] | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        config = config or TrainConfig()
        check_output_dir(config)
        check_evaluation(config, has_data=eval_dataset is not None)
        check_trackers(config.report_to)
        self.model, self.tokenizer = model, tokenizer
        self.config = config = replace(config, max_seq_length=resolve_max_seq_length(config, model))
        choose_trainable(model, config)
        self.parameters = trainable_parameters(model)
        self.replays_graphs = allows_graphs(model, config)
        self.optimizer = create_optimizer(model, config)
        self.scaler = create_scaler(model)
        train_dataset = list(train_dataset) if iter(train_dataset) is train_dataset else train_dataset
        self.eval_rows: RowSet | None = None
        with time_of_run(config, tokenizer) as self.rows_made:
            self.train_rows = prepare_rows(train_dataset, tokenizer, config, what="training")
            if eval_dataset is not None:
                rows = self.train_rows
                self.eval_rows = prepare_rows(eval_dataset, tokenizer, config, what="evaluation", learned=rows)
            self.samples = Samples(model, tokenizer, train_dataset, config)
        self.schedule = StepSchedule(
            self.train_rows,
            step_rows=config.step_rows,
            seed=config.seed,
            max_steps=config.max_steps,
            num_train_epochs=config.num_train_epochs,
        )
        self.total_steps = self.schedule.total_steps
        self.cut = StepCut(self.train_rows, config.per_device_train_batch_size, token_budget=None)
        graph_tokens = config.graph_tokens if self.replays_graphs else 0
        self.memory = replace(memory_of(model, optim=config.optim), graph_tokens=graph_tokens)
        self.foreign_bytes = 0  # on the GPU, but not this run's
        self.warmup_steps = resolve_warmup_steps(
            warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio, total_steps=self.total_steps
        )
        check_steps(
            config.lr_scheduler_type,
            config.lr_scheduler_kwargs or {},
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )

    def train(self) -> TrainResult:
        """Run, or go on from `config.resume_from_checkpoint`, and save the result.

        Ctrl-C ends the current step, saves a checkpoint and returns with `interrupted` set.

        Raises: ValueError if the output folder holds another run, or another process trains into it, the checkpoint is
            of another model or other data, or the loss is no longer finite. DoesNotFit, a torch.OutOfMemoryError, if
            a pass or an update does not fit into the GPU.
        """
        with held(Path(self.config.output_dir)):
            try:
                return self._train(self._begin())
            finally:
                self._give_back()

    def _train(self, state: RunState) -> TrainResult:
        config, learner, steps_per_epoch = self.config, self._learner(), self.schedule.steps_per_epoch
        steps = self._make_ready(state)
        output_dir = Path(config.output_dir)
        record = RunRecord.begin(
            self.model,
            config,
            state,
            schedule=self.schedule,
            cut=self.cut,
            memory=self.memory,
            eval_rows=self.eval_rows,
        )
        meter = Meter(
            self.model.device,
            window_loss=state.window_loss,
            window_steps=state.window_steps,
            window_skipped=state.window_skipped,
            elapsed=state.elapsed,
        )
        report = Report(record, step=state.step, total_steps=self.total_steps, disable_tqdm=config.disable_tqdm)
        log = TrainingLog(report, meter, state, steps_per_epoch=steps_per_epoch)
        milestones = Milestones(
            config, state, log, evaluate=self.evaluate if self.eval_rows is not None else None, samples=self.samples
        )
        checkpoint: Path | None = None
        finished, interrupted = milestones.stopped_early or state.step >= self.total_steps, False
        self.model.train()
        feed = StepFeed(self.schedule, self.cut, first_step=state.step)
        with report, log, feed, Interruption() as interruption:
            milestones.before_training()
            while not (finished or interrupted):
                factor = self._factor(state.step)
                plan, loss, grad_norm = steps.run(feed, factor)
                # The line that an earlier step began: the device has this step to do while the host reads it.
                log.write_waiting()
                meter.add(loss, plan.num_tokens, skipped=steps.skipped)
                state.step += 1
                state.tokens += plan.num_tokens
                # What was given up where memory did not suffice.
                state.token_budget, state.decoded_layers = feed.cut.token_budget, steps.decoded_layers
                state.graphs_given_up = steps.graphs_given_up
                report.advance()
                last = state.step == self.total_steps
                if last or state.step % config.logging_steps == 0:
                    log.begin_line(learning_rate=config.learning_rate * factor, grad_norm=grad_norm)
                milestones.after_step(last=last)
                finished = last or milestones.stopped_early
                if finished and meter.steps:
                    # Stopped early, before the window of a line was full.
                    log.begin_line(learning_rate=config.learning_rate * factor, grad_norm=grad_norm)
                interrupted = interruption.requested and not finished
                if interrupted or milestones.needs_checkpoint(finished=finished):
                    with log.paused():
                        checkpoint = write_checkpoint(learner, config, state, meter, steps_per_epoch=steps_per_epoch)
        self.cut, self.memory = feed.cut, self.memory.keeping_decoded(steps.decoded_layers)
        seconds = meter.elapsed()
        evaluated = milestones.evaluated
        if interrupted:
            assert checkpoint is not None
            say(f"interrupted after step {state.step}; saved {checkpoint}. {how_to_go_on(config)}")
            path = checkpoint
        else:
            if config.load_best_model_at_end:
                assert self.eval_rows is not None
                evaluated = load_best(self.model, self.eval_rows, state, config) or evaluated
            path = save_result(self.model, self.tokenizer, output_dir)
            say(f"saved {path}")
        if self.model.device.type == "cuda" and steps.most_passes:
            actual = torch.cuda.max_memory_allocated(self.model.device) - self.foreign_bytes
            say(record.memory_used(self.memory, tokens=steps.most_tokens, passes=steps.most_passes, actual=actual))
        if config.plot:
            say(draw_loss(output_dir))
        record.note_best(state, config, stopped_early=milestones.stopped_early)
        record.end("interrupted" if interrupted else "finished")
        return TrainResult(
            steps=state.step,
            train_loss=(state.logged_loss + meter.loss.item()) / max(1, state.step),
            eval_loss=evaluated.loss if evaluated else None,
            eval_perplexity=evaluated.perplexity if evaluated else None,
            tokens=state.tokens,
            seconds=seconds,
            path=path,
            interrupted=interrupted,
            best_step=state.best_step,
            stopped_early=milestones.stopped_early,
        )

    def evaluate(self) -> EvalResult:
        """Loss per target token and perplexity on the evaluation data. Raises ValueError if there is none."""
        if self.eval_rows is None:
            raise ValueError("there is no evaluation data; pass eval_dataset")
        return evaluate(self.model, self.eval_rows, batch_size=self.config.per_device_eval_batch_size)

    def _begin(self) -> RunState:
        """The state to start from: a fresh one, or that of the checkpoint. Nothing is written before it is valid."""
        # Of an earlier call of `train`: its steps are no part of this run.
        self.optimizer.state.clear()
        self.scaler = create_scaler(self.model)
        state = RunState(
            model_fingerprint=model_fingerprint(self.model),
            data_fingerprint=self.train_rows.fingerprint(),
            eval_fingerprint=self.eval_rows.fingerprint() if self.eval_rows else None,
            config=self.config.to_dict(),
            rows_made=self.rows_made,
        )
        torch.manual_seed(self.config.seed)
        if self.config.resume_from_checkpoint:
            return restore(self._learner(), self.config, state, total_steps=self.total_steps)
        claim_output_dir(self.config)
        say(
            f"training {sum(p.numel() for p in self.parameters.values()):,} weights for "
            f"{counted(self.total_steps, 'step')} of {counted(self.config.step_rows, 'row')}; "
            f"{counted(len(self.train_rows), 'row')} {'makes' if len(self.train_rows) == 1 else 'make'} "
            f"{counted(self.schedule.steps_per_epoch, 'step')}"
        )
        return state

    def _make_ready(self, state: RunState) -> OptimizerStep:
        """What runs the steps, with passes and memory as they were chosen for it."""
        ready = make_ready(
            self._learner(),
            self.config,
            state,
            schedule=self.schedule,
            cut=self.cut,
            memory=self.memory,
            replays_graphs=self.replays_graphs,
        )
        self.cut, self.memory, self.foreign_bytes = ready.cut, ready.memory, ready.foreign_bytes
        return ready.steps

    def _learner(self) -> Learner:
        return Learner(self.model, self.tokenizer, self.parameters, self.optimizer, self.scaler)

    def _give_back(self) -> None:
        """Free what only training needs: what comes next, such as a merge, may need the memory."""
        self.model.disable_graphs()
        self.model.neftune_noise_alpha = None
        keep_decoded_layers(self.model, 0)
        self.optimizer.zero_grad(set_to_none=True)

    def _factor(self, step: int) -> float:
        """What every learning rate is multiplied by."""
        return learning_rate_factor(
            self.config.lr_scheduler_type,
            step,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            learning_rate=self.config.learning_rate,
            kwargs=self.config.lr_scheduler_kwargs,
        )
