"""Learning rates equal transformers' to the last bit."""

import pytest
import torch
from transformers import get_scheduler

from slothcore.training.schedule import learning_rate_factor, resolve_warmup_steps


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_factor_equals_transformers(name, warmup_steps) -> None:
    total = 23
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total,
    )
    for step in range(total + 3):
        ours = 3e-4 * learning_rate_factor(name, step, warmup_steps=warmup_steps, total_steps=total)
        assert ours == reference.get_last_lr()[0], step
        optimizer.step()
        reference.step()


def test_warmup_as_a_share_is_rounded_up() -> None:
    assert resolve_warmup_steps(warmup_steps=0, warmup_ratio=0.1, total_steps=23) == 3
    assert resolve_warmup_steps(warmup_steps=5, warmup_ratio=0.0, total_steps=23) == 5
