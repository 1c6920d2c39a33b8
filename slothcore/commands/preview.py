"""`slothcore preview`: rows as the model will see them, before anything is trained."""

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slothcore.commands.command import Command, UsageError, add_run_options, config_of, require_set
from slothcore.training.config import TrainConfig

if TYPE_CHECKING:
    from slothcore.data.tokenizer import Tokenizer
    from slothcore.training.batches import RowSet

EXAMPLES = """\
  slothcore preview --model meta-llama/Llama-3.2-1B --data alpaca.json
  slothcore preview run.yaml --rows 10 --seed 7 --packing
  slothcore preview runs/alpaca --no-color                  what a run was trained on, for a file
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="how many rows are shown, drawn by --seed; default: 3"
    )
    parser.add_argument(
        "--no-color", action="store_true", help="mark targets with [[ ]] in place of colours, as outside a terminal"
    )
    add_run_options(parser, groups=("Model", "Data"))


def run(values: dict[str, Any]) -> int:
    count = values["rows"]
    if count < 0:
        raise UsageError(f"--rows must not be negative, got {count}")
    config = config_of(values)
    require_set(config, "model", "data")
    from slothcore.commands.row_lengths import describe_lengths
    from slothcore.commands.rows import Ink, show_rows

    ink = Ink(colors=not values["no_color"] and _shows_colors())
    tokenizer, config = read_tokenizer(config)
    rows, evaluation = prepare(config, tokenizer)
    print()
    print(show_rows(rows, tokenizer, config, count=count, ink=ink), end="")
    print(describe_lengths(rows, config))
    if evaluation is not None:
        print(f"evaluation: {len(evaluation)} documents of {sum(evaluation.row_tokens):,} tokens")
    return 0


def read_tokenizer(config: TrainConfig) -> "tuple[Tokenizer, TrainConfig]":
    """The tokenizer of a model, and the options with max_seq_length as the run will have it; no weight is read.

    Raises: ValueError if there is no such model, or it has no tokenizer.
    """
    from slothcore.commands.model_files import read_model_files
    from slothcore.run import require_tokenizer

    assert config.source is not None
    files = read_model_files(config)
    tokenizer = require_tokenizer(files.found.tokenizer(), config.source)
    tokenizer.add_tokens(config.new_tokens)
    print(
        f"model: {config.source} ({files.family}), documents of up to {files.longest_document:,} tokens, "
        f"rows of up to {files.max_seq_length:,}"
    )
    return tokenizer, replace(config, max_seq_length=files.max_seq_length)


def prepare(config: TrainConfig, tokenizer: "Tokenizer") -> "tuple[RowSet, RowSet | None]":
    """The documents of training and evaluation, prepared as the run prepares them, but not packed yet."""
    from slothcore.run import read_records
    from slothcore.training.preparation import prepare_rows

    unpacked = replace(config, packing=False)
    train_records, eval_records = read_records(config)
    rows = prepare_rows(train_records, tokenizer, unpacked, what="training")
    if eval_records is None:
        return rows, None
    return rows, prepare_rows(eval_records, tokenizer, unpacked, what="evaluation", learned=rows)


def _shows_colors() -> bool:
    """By the conventions of terminals: see no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


COMMAND = Command(
    name="preview",
    help="show rows as the model will see them, without GPU or weights",
    description="Show training rows with what is learned of them, how long they are and how they pack.\n"
    "Needs the tokenizer and config.json of the model, no weights and no GPU. Takes the options of train.",
    usage="slothcore preview [CONFIG.yaml] [--model NAME --data FILE] [--rows N] [--option value ...]",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
    takes_config=True,
)
