"""Memory plans as a table for people, and as figures for programs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slothcore.commands.planning import MOST_TOKENS, Plans, longest_pass
from slothcore.training.memory_plan import MemoryPlan
from slothcore.training.micro_batches import GIB, RESERVE

GPUS_GIB = (8, 12, 16, 24, 48, 80)
COLUMN, FIRST_COLUMN = 12, 36

# What a row of the first table says of a plan, for a pass of so many tokens in a step of so many passes: bytes.
PARTS: dict[str, Callable[[MemoryPlan, int, int], float]] = {
    "weights": lambda plan, tokens, passes: plan.weights,
    "trained": lambda plan, tokens, passes: plan.trained,
    "gradients": lambda plan, tokens, passes: plan.gradients,
    "optimizer": lambda plan, tokens, passes: plan.optimizer,
    "activations": lambda plan, tokens, passes: plan.activations(tokens),
    "peak": lambda plan, tokens, passes: plan.peak(tokens, passes=passes),
    "graphs": lambda plan, tokens, passes: plan.graph_pool(tokens),
    "host": lambda plan, tokens, passes: plan.host(tokens),
}


def as_text(plans: Plans) -> str:
    """The parts of a step, then how long a document may be on GPUs of several sizes."""
    config, passes = plans.config, plans.config.gradient_accumulation_steps
    dtype = str(plans.dtype).removeprefix("torch.")
    what = "all weights" if config.full_finetuning else "a LoRA adapter"
    names = {
        "weights": "weights that stay as they are",
        "trained": "weights that train" if config.full_finetuning else "adapter",
        "gradients": "gradients",
        "optimizer": f"optimizer ({config.optim})",
        "activations": "activations of a pass",
        "peak": "peak of a step",
        "graphs": "CUDA graphs, beside it",
        "host": "waiting in host memory",
    }
    rows = {names[part]: _gib(plans, part) for part in PARTS}
    per_pass = {mode: longest_pass(plan, plans.gpu) // plans.row_tokens for mode, plan in plans.modes.items()}
    longest = {
        f"{gib:>3} GiB": [_tokens(longest_pass(plan, gib * GIB)) for plan in plans.modes.values()] for gib in GPUS_GIB
    }
    lines = [
        f"{config.source} ({plans.family}): {plans.parameters:,} weights in {config.bits} bits, computing in {dtype}",
        f"training {what}: {plans.trained:,} weights",
        "",
        f"GiB of a step of {config.step_rows} rows with {plans.row_tokens:,} tokens, {passes} passes of "
        f"{config.per_device_train_batch_size} rows",
        *_table(plans, rows),
        "(Parts are not all there at once: the peak is what counts.)",
        "",
        f"on {plans.gpu_name} with memory_budget auto",
        *_table(
            plans,
            {
                f"rows of {plans.row_tokens:,} tokens a pass": [_or_none(count) for count in per_pass.values()],
                "passes of a step": [
                    _or_none(-(-config.step_rows // count) if count else 0) for count in per_pass.values()
                ],
            },
        ),
        "",
        "longest document, and most tokens of a pass",
        *_table(plans, longest),
        f"({RESERVE:.0%} of a GPU is left to CUDA and to gaps between tensors; - means that not even a token fits.",
        f" The model is made for documents of up to {plans.longest_document:,} tokens.)",
    ]
    return "\n".join(lines)


def as_json(plans: Plans) -> dict[str, Any]:
    """The same in bytes and tokens."""
    passes = plans.config.gradient_accumulation_steps
    modes = {
        _word(mode): {
            "bytes": {part: round(size(plan, plans.pass_tokens, passes)) for part, size in PARTS.items()},
            "tokens_of_a_pass": longest_pass(plan, plans.gpu),
            "longest_document": {f"{gib}": longest_pass(plan, gib * GIB) for gib in GPUS_GIB},
        }
        for mode, plan in plans.modes.items()
    }
    return {
        "model": plans.config.source,
        "family": plans.family,
        "parameters": plans.parameters,
        "trained_parameters": plans.trained,
        "bits": plans.config.bits,
        "dtype": str(plans.dtype).removeprefix("torch."),
        "optim": plans.config.optim,
        "max_seq_length": plans.row_tokens,
        "pass_tokens": plans.pass_tokens,
        "passes": passes,
        "gpu_bytes": round(plans.gpu),
        "gradient_checkpointing": modes,
    }


def _table(plans: Plans, rows: Mapping[str, Sequence[str]]) -> list[str]:
    heads = [_word(mode) for mode in plans.modes]
    return [
        f"  {name:<{FIRST_COLUMN}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)
        for name, cells in {"gradient_checkpointing": heads, **rows}.items()
    ]


def _gib(plans: Plans, part: str) -> list[str]:
    passes = plans.config.gradient_accumulation_steps
    sizes = [PARTS[part](plan, plans.pass_tokens, passes) for plan in plans.modes.values()]
    return [f"{size / GIB:.2f}" if size else "-" for size in sizes]


def _tokens(count: int) -> str:
    return f"{count:,}+" if count >= MOST_TOKENS else _or_none(count)


def _or_none(count: int) -> str:
    return f"{count:,}" if count else "-"


def _word(mode: bool | str) -> str:
    return mode if isinstance(mode, str) else str(mode).lower()
