"""What is said where a pass does not fit into the GPU's memory, and cannot be made smaller."""

import torch

from slothcore.training.config import TrainConfig


class DoesNotFit(torch.OutOfMemoryError):
    """Training cannot go on in this memory. Its text is a sentence for the user, with a remedy."""


def remedy(config: TrainConfig, *, rows: int, tokens: int) -> str:
    """A sentence about a pass of so many rows and tokens that does not fit: what would take less memory."""
    ways = []
    if rows > 1:
        ways.append("set memory_budget to auto")
        ways.append("lower per_device_train_batch_size (and raise gradient_accumulation_steps)")
    stronger = {False: "mlp, offload or true", "mlp": "offload or true"}.get(config.gradient_checkpointing)
    if stronger is not None:
        ways.append(f"set gradient_checkpointing to {stronger}")
    ways.append(f"lower max_seq_length ({config.max_seq_length})")
    if config.bits != 4 and not config.full_finetuning:
        ways.append("set bits to 4")
    what = "row" if rows == 1 else "rows"
    listed = ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
    return f"the GPU's memory does not take a pass of {rows} {what} with {tokens:,} tokens; {listed}"
