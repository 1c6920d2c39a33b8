"""Learning-rate schedules, as transformers defines them.

With w warm-up steps of n in all, the factor at step s (0 for the first step) is s / max(1, w) while s < w, then
linear      (n - s) / max(1, n - w)
cosine      (1 + cos(pi * (s - w) / max(1, n - w))) / 2
constant    1
"""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate_factor(schedule: Schedule, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied by in optimizer step `step`, which counts from 0."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if schedule == "constant":
        return 1.0
    span = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, (total_steps - step) / span)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / span))))


def resolve_warmup_steps(*, warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """The number of warm-up steps when it is given as a count, or as a share of all steps (rounded up)."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)
