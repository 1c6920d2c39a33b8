"""From a trainer to its first step: graphs, the cut into passes, and weights that are kept decoded."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from slothcore.training.decoded import choose_decoded_layers, keep_decoded_layers
from slothcore.training.micro_batches import (
    choose_token_budget,
    describe,
    longest_pass,
    memory_limit,
    sample_passes,
)
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.report import say
from slothcore.training.run_state import RunState

if TYPE_CHECKING:
    from slothcore.training.trainer import SFTTrainer


def make_ready(trainer: "SFTTrainer", state: RunState) -> OptimizerStep:
    """Set the trainer's model up for its steps, and the trainer's cut and memory plan to what was chosen.

    Cut and weights are decided here unless the checkpoint has them; what that is predicted to take is said.
    """
    config, model, schedule = trainer.config, trainer.model, trainer.schedule
    budget, device = config.memory_budget, model.device
    if budget == "auto" and device.type != "cuda":
        budget = None
    memory = trainer.memory
    allocated = memory.weights + memory.trained + (memory.optimizer if trainer.optimizer.state else 0)
    graphs = flat = None
    model.neftune_noise_alpha = config.neftune_noise_alpha  # which an earlier call of `train` took away
    model.disable_graphs()
    if trainer.replays_graphs:
        graphs = model.enable_graphs(max_tokens=config.graph_tokens)
        flat = graphs.flat
        allocated += memory.gradients
        if state.graphs_given_up:
            model.disable_graphs()
    if budget is not None and state.token_budget is None:
        state.token_budget = choose_token_budget(memory, budget, trainer.train_rows, device, allocated=allocated)
    trainer.cut = replace(trainer.cut, token_budget=state.token_budget)
    if graphs is not None:
        graphs.expected_tokens = longest_pass(trainer.cut, schedule, first_step=state.step, at_most=graphs.max_tokens)
    if state.decoded_layers is None and budget is not None:
        limit = memory_limit(budget, device, allocated=allocated)
        sample = sample_passes(trainer.cut, schedule, first_step=state.step)
        state.decoded_layers = choose_decoded_layers(memory, limit, sample)
    decoded_layers = state.decoded_layers or 0
    keep_decoded_layers(model, decoded_layers)
    trainer.memory = memory = memory.keeping_decoded(decoded_layers)
    if budget is not None or device.type == "cuda":
        say(describe(memory, trainer.cut, schedule, first_step=state.step))
    if device.type == "cuda":
        # Loading may have taken more than training will, and the caller may have tensors of their own.
        torch.cuda.reset_peak_memory_stats(device)
        trainer.foreign_bytes = torch.cuda.memory_allocated(device) - allocated - memory.decoded
    return OptimizerStep(
        model,
        trainer.parameters,
        trainer.optimizer,
        trainer.scaler,
        config,
        flat=flat,
        decoded_layers=decoded_layers,
    )
