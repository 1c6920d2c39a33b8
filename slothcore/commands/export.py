"""`slothcore export`, and `slothcore merge`, which is one of its formats."""

import argparse
import sys
from typing import Any

from slothcore.commands.command import (
    Command,
    UsageError,
    add_adapter_option,
    add_model_options,
    add_template_option,
    check_model_options,
    model_options,
    wrong_call,
)
from slothcore.export.formats import FORMATS, format_named

EXAMPLES = """\
  slothcore export --model runs/alpaca --format merged --output-dir merged
  slothcore export --model runs/alpaca/checkpoint-500 --format merged --output-dir merged-500 --dtype float16
  slothcore export --model runs/alpaca --format merged-4bit --base original --output-dir small
  slothcore export --model runs/alpaca --format gguf --dtype q4_k_m --output-dir gguf
  slothcore export --model runs/alpaca --format ollama --chat-template alpaca --output-dir ollama
  slothcore export --model runs/alpaca --format adapter --push me/alpaca-lora
"""
# Formats that the package gguf writes; that it is missing is said before a model is loaded.
WITH_GGUF = ("gguf", "gguf-adapter", "ollama")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_adapter_option(parser)
    parser.add_argument(
        "--format", required=True, type=format_word, choices=tuple(FORMATS), help="what to write; see above"
    )
    add_target_options(
        parser, formats=tuple(FORMATS), defaults="bfloat16, q8_0 for GGUF, and for an adapter as they are"
    )


def format_word(text: str) -> str:
    """A format as it was written. Raises: ArgumentTypeError if it is what the numbers of a GGUF file can be."""
    word = text.lower()
    if word in FORMATS["gguf"].dtypes:
        raise argparse.ArgumentTypeError(f"{text} is a dtype of a GGUF file; give --format gguf --dtype {word}")
    return word.replace("_", "-")


def add_target_options(parser: argparse.ArgumentParser, *, formats: tuple[str, ...], defaults: str) -> None:
    """Where to, in which numbers, and into which base.

    Args:
        formats: the dtypes of these can be chosen.
        defaults: which dtype is taken where none is.
    """
    parser.add_argument("--output-dir", metavar="DIR", help="a new folder; with --push one is not needed")
    dtypes = dict.fromkeys(dtype for name in formats for dtype in FORMATS[name].dtypes)
    parser.add_argument("--dtype", type=str.lower, choices=tuple(dtypes), help=f"of the numbers; default: {defaults}")
    parser.add_argument(
        "--base",
        choices=("loaded", "original"),
        default="loaded",
        help="what the adapter is folded into: the weights as they were trained beside, those in 4 bits as they "
        "decode (default); or as the model's folder holds them, before anything was quantised",
    )
    add_template_option(parser)
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository of the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="let everybody read it; default: a private repository")


def run(values: dict[str, Any]) -> int:
    name = values["format"]
    check_model_options(values)
    with wrong_call():
        format_named(name, values["dtype"], base=values["base"])
        if values["push"]:
            from slothcore.hub_errors import check_repository_name

            check_repository_name(values["push"])
    if not values["output_dir"] and not values["push"]:
        raise UsageError("nothing says where to write; give --output-dir DIR, or --push OWNER/NAME for the Hub")
    if values["public"] and not values["push"]:
        raise UsageError("--public is of no use without --push OWNER/NAME; give both or neither")
    from slothcore.export.export import export_model
    from slothcore.export.gguf_file import require_library
    from slothcore.export.hub_upload import push_to_hub
    from slothcore.export.new_folder import place_of, require_new
    from slothcore.run import open_as_stored, open_result
    from slothcore.training.run_folder import run_behind

    if name in WITH_GGUF:
        require_library()
    target = place_of(values["output_dir"]) if values["output_dir"] else None
    if target is not None:
        require_new(target)
    opened = open_as_stored if name in ("merged", "gguf", "ollama") else open_result
    model, tokenizer = opened(values["model"], adapter=values["adapter"], **model_options(values))
    if values["chat_template"] is not None:
        tokenizer.use_chat_template(values["chat_template"])
    options = {"format": name, "dtype": values["dtype"], "base": values["base"], "give_up_model": True}
    if values["push"]:
        token, trained_in = values["token"], run_behind(values["adapter"] or values["model"])
        private = not values["public"]
        address = push_to_hub(
            model, tokenizer, values["push"], path=target, private=private, token=token, run=trained_in, **options
        )
        print(f"uploaded {address}")
    else:
        assert target is not None
        print(f"slothcore: {export_model(model, tokenizer, target, **options)}", file=sys.stderr)
    if target is not None:
        print(f"saved {target}")
    return 0


COMMAND = Command(
    name="export",
    help="write or upload a result for others: merged, GGUF, its adapter",
    description="Write the result of a run as files for others, or upload it. What was written is read back and has\n"
    "to give the model's logits; until then, and if anything fails, nothing lies under the folder's name.\n\nformats:\n"
    + "\n".join(f"  {name:<12} {format.help}" for name, format in FORMATS.items()),
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
