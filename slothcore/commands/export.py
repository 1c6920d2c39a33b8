"""`slothcore export`, and `slothcore merge`, which is one of its formats."""

import argparse
import sys
from typing import Any

from slothcore.commands.command import Command, UsageError, add_model_options, model_options
from slothcore.export.formats import FORMATS, format_named

EXAMPLES = """\
  slothcore export --model runs/alpaca --format merged --output-dir merged
  slothcore export --model runs/alpaca/checkpoint-500 --format merged --output-dir merged-500 --dtype float16
  slothcore export --model runs/alpaca --format adapter --output-dir adapter   then: hf upload me/adapter adapter
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="what to write; see above")
    add_target_options(parser)


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Where to, and in which numbers."""
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="a new folder")
    dtypes = dict.fromkeys(dtype for format in FORMATS.values() for dtype in format.dtypes)
    parser.add_argument(
        "--dtype",
        choices=tuple(dtypes),
        help="of the numbers; default: bfloat16, and for an adapter as they are",
    )


def run(values: dict[str, Any]) -> int:
    name = values["format"]
    format_named(name, values["dtype"], say=UsageError)
    from pathlib import Path

    from slothcore.export.export import export_model
    from slothcore.export.new_folder import require_new
    from slothcore.run import open_result

    target = Path(values["output_dir"]).expanduser()
    require_new(target)
    model, tokenizer = open_result(values["model"], **model_options(values))
    found = export_model(model, tokenizer, target, format=name, dtype=values["dtype"], give_up_model=True)
    print(f"slothcore: {found}", file=sys.stderr)
    print(f"saved {target}")
    return 0


COMMAND = Command(
    name="export",
    help="write a result for others: one merged model, or its adapter",
    description="Write the result of a run as files for others. What was written is read back and has to give the\n"
    "model's logits; until then, and if anything fails, nothing lies under the folder's name.\n\nformats:\n"
    + "\n".join(f"  {name:<8} {format.help}" for name, format in FORMATS.items()),
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
