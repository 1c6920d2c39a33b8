"""`slothcore plan`: what training takes, worked out before there is a GPU to train on."""

import argparse
import json
import math
from typing import Any

from slothcore.commands.command import Command, UsageError, add_run_options, config_of, require_set

EXAMPLES = """\
  slothcore plan --model meta-llama/Llama-3.1-8B --gpu 24
  slothcore plan --model Qwen/Qwen2.5-7B --bits 16 --r 64 --optim adamw_8bit --max-seq-length 8192
  slothcore plan --model meta-llama/Llama-3.2-1B --full-finetuning --bits 16
  slothcore plan runs/alpaca/config.yaml --json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu",
        type=gib,
        metavar="GIB",
        help="memory of the GPU that is meant; default: the one that is present, else 24",
    )
    parser.add_argument("--json", action="store_true", help="figures in bytes, for programs")
    add_run_options(parser, groups=("Model", "LoRA", "Optimization"))


def gib(text: str) -> float:
    """A number of GiB. Raises: ArgumentTypeError for a text with a unit, or the name of a GPU."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of GiB, as in --gpu 24, got {text!r}") from None


def run(values: dict[str, Any]) -> int:
    config = config_of(values)
    require_set(config, "model")
    if values["gpu"] is not None and not 0 < values["gpu"] < math.inf:
        raise UsageError(f"--gpu must be a number of GiB greater than 0, got {values['gpu']}")
    from slothcore.commands.memory_table import as_json, as_text
    from slothcore.commands.planning import plans_of

    plans = plans_of(config, gpu_gib=values["gpu"])
    print(json.dumps(as_json(plans), indent=2) if values["json"] else as_text(plans))
    return 0


COMMAND = Command(
    name="plan",
    help="predict the memory of training, from config.json alone",
    description="Predict what training takes on the GPU, part by part, for every gradient_checkpointing,\n"
    "and the longest documents that fit into GPUs of several sizes. Reads config.json alone.\n"
    "Takes the options of train.",
    usage="slothcore plan [CONFIG.yaml] [--model NAME] [--gpu GIB] [--json] [--option value ...]",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
    takes_config=True,
)
