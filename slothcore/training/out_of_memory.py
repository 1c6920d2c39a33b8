"""What is said where the GPU's memory does not take a pass that is not made smaller, or an update."""

import torch

from slothcore.training.config import TrainConfig

# What takes less memory for its state, of the optimizers that differ in nothing else.
SMALLER_STATE = {
    "adamw": "adamw_8bit",
    "adamw_8bit": "paged_adamw_8bit",
    "paged_adamw": "paged_adamw_8bit",
    "lion": "lion_8bit",
}


class DoesNotFit(torch.OutOfMemoryError):
    """Training cannot go on in this memory. Its text is a sentence for the user, with a remedy."""


def remedy(config: TrainConfig, *, bits: int, rows: int, tokens: int) -> str:
    """A sentence about a pass of so many rows and tokens that does not fit: what would take less memory.

    Args:
        bits: of the model's weights, which need not be those of `config` where the caller loaded it.
    """
    ways = []
    if rows > 1:
        ways.append("set memory_budget to auto")
        ways.append("lower per_device_train_batch_size (and raise gradient_accumulation_steps)")
    stronger = {False: "mlp, offload or true", "mlp": "offload or true"}.get(config.gradient_checkpointing)
    if stronger is not None:
        ways.append(f"set gradient_checkpointing to {stronger}")
    ways.append(f"lower max_seq_length ({config.max_seq_length})")
    if bits != 4 and not config.full_finetuning:
        ways.append("set bits to 4")
    what = "row" if rows == 1 else "rows"
    listed = ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
    return f"the GPU's memory does not take a pass of {rows} {what} with {tokens:,} tokens; {listed}"


def evaluation_remedy(batch_size: int, *, tokens: int) -> str:
    """The same of a batch of evaluation, of so many rows at most."""
    way = f"lower per_device_eval_batch_size ({batch_size})" if batch_size > 1 else "lower max_seq_length"
    return f"the GPU's memory does not take a batch of evaluation with {tokens:,} tokens; {way}"


def update_remedy(config: TrainConfig, *, weights: int) -> str:
    """The same of the first update, which makes the optimizer's state."""
    ways = [f"set optim to {SMALLER_STATE[config.optim]}"] if config.optim in SMALLER_STATE else []
    ways.append("train a LoRA adapter" if config.full_finetuning else "lower r")
    return f"the GPU's memory does not take the update of {weights:,} weights and its state; {', or '.join(ways)}"
