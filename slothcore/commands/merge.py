"""`slothcore merge`."""

import argparse
from pathlib import Path
from typing import Any

from slothcore.commands.command import Command, add_model_options, model_options

EXAMPLES = """\
  slothcore merge --model runs/alpaca --output-dir merged
  slothcore merge --model runs/alpaca/checkpoint-500 --output-dir merged-500 --dtype float16
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="a new folder for the merged model")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of its weights"
    )


def run(values: dict[str, Any]) -> int:
    import torch

    from slothcore.export.merged import save_merged
    from slothcore.run import open_result
    from slothcore.training.run_folder import check_writable

    target = Path(values["output_dir"])
    check_writable(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"output_dir {target} exists and is not empty; choose a new folder")
    model, tokenizer = open_result(values["model"], **model_options(values))
    save_merged(model, tokenizer, target, dtype=getattr(torch, values["dtype"]))
    print(f"saved {target}")
    return 0


COMMAND = Command(
    name="merge",
    help="write an adapter and its base as one 16-bit model",
    description="Merge an adapter into its base model and write a Hugging Face folder.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
