"""The passes of an optimizer step: how its rows are divided, and the memory that this is predicted to take.

The loss of a step is a sum over its target tokens, so the division changes memory and time, and of the result only the
rounding. (Dropout draws other numbers, and so does a load-balancing loss, which is taken over the tokens of a pass.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slothcore.training.batches import RowSet, StepSchedule
from slothcore.training.memory_plan import MemoryPlan
from slothcore.training.progress import say

GIB = 2**30
# Share of a GPU that `auto` leaves to the CUDA context, to gaps between tensors and to errors of the prediction.
RESERVE = 0.08
# Steps from which the report tells how many passes one takes.
SAMPLE_STEPS = 64
# Steps that are looked through for the longest pass: half a second.
LONGEST_STEPS = 10_000


@dataclass(frozen=True)
class StepCut:
    """How the rows of a step are divided into passes.

    Attributes:
        rows: all rows.
        size: rows of a pass, without a token budget.
        token_budget: rows are merged up to as many tokens; None: `size` of them go together, whatever their length.
    """

    rows: RowSet
    size: int
    token_budget: int | None

    def passes(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of each pass."""
        if self.token_budget is not None:
            return self.rows.merged(rows, self.token_budget)
        return [list(rows[start : start + self.size]) for start in range(0, len(rows), self.size)]

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens of a pass over these rows."""
        return sum(self.rows.row_tokens[row] for row in rows)


@dataclass(frozen=True)
class PassSample:
    """What the passes of the next steps are like.

    Attributes:
        most_tokens, mean_tokens: of a pass.
        fewest, most: passes of a step.
    """

    most_tokens: int
    mean_tokens: float
    fewest: int
    most: int


def sample_passes(cut: StepCut, schedule: StepSchedule, *, first_step: int) -> PassSample:
    """The passes of up to SAMPLE_STEPS steps from `first_step` on; of the last one if none is left."""
    first_step = min(first_step, schedule.total_steps - 1)
    steps = range(first_step, min(schedule.total_steps, first_step + SAMPLE_STEPS))
    every = [cut.passes(schedule.plan(step).rows) for step in steps]
    tokens = [cut.tokens(rows) for passes in every for rows in passes]
    numbers = [len(passes) for passes in every]
    return PassSample(max(tokens), sum(tokens) / len(tokens), min(numbers), max(numbers))


def longest_pass(cut: StepCut, schedule: StepSchedule, *, first_step: int, at_most: int) -> int:
    """Tokens of the longest pass of up to `at_most` tokens, in LONGEST_STEPS steps from `first_step` on; 0: no such.

    What graphs expect (`StepGraphs.expected_tokens`). A longer one that comes later costs captures, nothing else.
    """
    steps = range(first_step, min(schedule.total_steps, first_step + LONGEST_STEPS))
    every = (cut.tokens(rows) for step in steps for rows in cut.passes(schedule.plan(step).rows))
    return max((tokens for tokens in every if tokens <= at_most), default=0)


def choose_token_budget(
    plan: MemoryPlan, memory_budget: str | float, rows: RowSet, device: torch.device, *, allocated: int
) -> int:
    """The most tokens of a pass that are predicted to fit; 0 if not even one is, and rows then run one by one.

    Args:
        memory_budget: GiB, or "auto".
        allocated: bytes of what the plan counts that are there already.
    """
    limit = memory_limit(memory_budget, device, allocated=allocated)
    token_budget = plan.largest_pass(limit, at_most=sum(rows.row_tokens))
    longest = max(rows.row_tokens)
    if token_budget < longest:
        needed = plan.footprint(longest, passes=2) / GIB
        say(
            f"note: a row of {longest} tokens is predicted to take {needed:.1f} GiB, more than the {limit / GIB:.1f} "
            "of memory_budget; it runs alone. Less memory: gradient_checkpointing, a lower max_seq_length"
        )
    return token_budget


def memory_limit(memory_budget: str | float, device: torch.device, *, allocated: int) -> float:
    """Bytes that a run may have, those that it has already with them.

    "auto" is what the GPU and torch's cache have free, less RESERVE of the whole: 0.92 of a GPU that is empty. The
    prediction has been within 8% of what torch counts, and the CUDA context and gaps between tensors are not in it.

    Args:
        memory_budget: GiB, or "auto".
        allocated: bytes of what the plan counts that are there already.
    """
    if not isinstance(memory_budget, str):
        return memory_budget * GIB
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds and nothing uses is not free to the GPU, but it is to this process.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused + allocated - RESERVE * total


def describe(plan: MemoryPlan, cut: StepCut, schedule: StepSchedule, *, first_step: int) -> str:
    """What the steps from `first_step` on are predicted to take, in one line."""
    sample = sample_passes(cut, schedule, first_step=first_step)
    tokens = sample.most_tokens
    differ = sample.fewest < sample.most
    passes = f"{sample.fewest} to {sample.most} passes" if differ else _count(sample.most)
    parts = {
        "weights": plan.weights + plan.trained,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "activations": plan.activations(tokens),
    }
    if plan.decoded:
        parts["decoded weights"] = plan.decoded
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    peak = plan.peak(tokens, passes=sample.most) / GIB
    beside = ""
    if plan.graph_tokens:
        beside += f", graphs hold {plan.graph_pool(tokens) / GIB:.2f} more"
    if plan.host(tokens):
        beside += f", {plan.host(tokens) / GIB:.2f} wait in host memory"
    return f"memory: {peak:.2f} GiB predicted ({listed}){beside}; a step takes {passes} of at most {tokens:,} tokens"


def compare(plan: MemoryPlan, *, tokens: int, passes: int, actual: int) -> str:
    """Prediction and outcome of a run whose largest pass had `tokens` tokens, in one line."""
    predicted = plan.peak(tokens, passes=passes)
    return (
        f"memory: {predicted / GIB:.2f} GiB predicted, {actual / GIB:.2f} at the peak ({actual / predicted - 1:+.1%}), "
        f"passes of up to {tokens:,} tokens"
    )


def _count(passes: int) -> str:
    return "1 pass" if passes == 1 else f"{passes} passes"
