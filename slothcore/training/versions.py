"""Updates that torch does not count in the versions of the weights: those of kernels, and of its own fused optimizers.

Who keeps what weights gave tells by their versions whether they are others by now: autograd, which then refuses a
backward pass through them, and a conversation, which then reads its text again.
"""

import torch


def note_update(optimizer: torch.optim.Optimizer, *unused: object) -> None:
    """Count a step in the versions of what it has changed; as a hook, an optimizer calls it behind each step."""
    torch.autograd.graph.increment_version(
        [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    )
