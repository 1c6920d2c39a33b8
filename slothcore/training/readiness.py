"""From a run to its first step: graphs, the cut into passes, and weights that are kept decoded."""

from dataclasses import dataclass, replace

import torch

from slothcore.training.batches import StepSchedule
from slothcore.training.config import TrainConfig
from slothcore.training.decoded import choose_decoded_layers, keep_decoded_layers
from slothcore.training.learner import Learner
from slothcore.training.memory_plan import MemoryPlan
from slothcore.training.micro_batches import (
    StepCut,
    choose_token_budget,
    describe,
    longest_pass,
    memory_limit,
    sample_passes,
)
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.progress import say
from slothcore.training.run_state import RunState


@dataclass(frozen=True)
class Readiness:
    """What was chosen before the first step.

    Attributes:
        cut, memory: how steps are divided into passes, and what those are predicted to take.
        foreign_bytes: on the GPU, but not this run's.
    """

    steps: OptimizerStep
    cut: StepCut
    memory: MemoryPlan
    foreign_bytes: int


def make_ready(
    learner: Learner,
    config: TrainConfig,
    state: RunState,
    *,
    schedule: StepSchedule,
    cut: StepCut,
    memory: MemoryPlan,
    replays_graphs: bool,
) -> Readiness:
    """Set the model up for its steps. What that is predicted to take is said.

    The token budget of the passes and the layers that keep decoded weights are chosen here, and noted in `state`,
    unless its checkpoint has them.

    Args:
        cut, memory: as they are before anything is chosen.
        replays_graphs: whether short passes are to replay graphs (`preparation.allows_graphs`).
    """
    model = learner.model
    budget, device = config.memory_budget, model.device
    if budget == "auto" and device.type != "cuda":
        budget = None
    allocated = memory.weights + memory.trained + (memory.optimizer if learner.optimizer.state else 0)
    graphs = flat = None
    model.neftune_noise_alpha = config.neftune_noise_alpha  # which an earlier call of `train` took away
    model.disable_graphs()
    if replays_graphs:
        graphs = model.enable_graphs(max_tokens=config.graph_tokens)
        flat = graphs.flat
        allocated += memory.gradients
        if state.graphs_given_up:
            model.disable_graphs()
    if budget is not None and state.token_budget is None:
        state.token_budget = choose_token_budget(memory, budget, schedule.rows, device, allocated=allocated)
    cut = replace(cut, token_budget=state.token_budget)
    if graphs is not None:
        graphs.expected_tokens = longest_pass(cut, schedule, first_step=state.step, at_most=graphs.max_tokens)
    if state.decoded_layers is None and budget is not None:
        limit = memory_limit(budget, device, allocated=allocated)
        sample = sample_passes(cut, schedule, first_step=state.step)
        state.decoded_layers = choose_decoded_layers(memory, limit, sample)
    decoded_layers = state.decoded_layers or 0
    keep_decoded_layers(model, decoded_layers)
    memory = memory.keeping_decoded(decoded_layers)
    if budget is not None or device.type == "cuda":
        say(describe(memory, cut, schedule, first_step=state.step))
    foreign_bytes = 0
    if device.type == "cuda":
        # Loading may have taken more than training will, and the caller may have tensors of their own.
        torch.cuda.reset_peak_memory_stats(device)
        foreign_bytes = torch.cuda.memory_allocated(device) - allocated - memory.decoded
    steps = OptimizerStep(learner, config, flat=flat, decoded_layers=decoded_layers)
    return Readiness(steps, cut, memory, foreign_bytes)
