"""`slothcore merge`."""

import argparse
from typing import Any

from slothcore.commands import export
from slothcore.commands.command import Command, add_adapter_option, add_model_options

EXAMPLES = """\
  slothcore merge --model runs/alpaca --output-dir merged
  slothcore merge --model runs/alpaca/checkpoint-500 --output-dir merged-500 --dtype float16
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_adapter_option(parser)
    export.add_target_options(parser, formats=("merged",), defaults="bfloat16")


def run(values: dict[str, Any]) -> int:
    return export.run({**values, "format": "merged"})


COMMAND = Command(
    name="merge",
    help="short for export --format merged",
    description="Merge an adapter into its base model and write a Hugging Face folder: short for\n"
    "slothcore export --format merged. What was written is read back and has to give the model's logits.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
