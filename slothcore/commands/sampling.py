"""How answers are drawn: the options that `generate` and `chat` share."""

import argparse
from typing import Any

from slothcore.commands.command import UsageError

# What has an effect only where tokens are drawn.
OF_DRAWING = ("top_p", "top_k", "min_p")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
NAMES = ("max_new_tokens", "temperature", *OF_DRAWING, *PENALTIES, "stop_strings", "seed")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int | None, where_none: str = "") -> None:
    """The names are those of transformers' generate.

    Args:
        max_new_tokens: the default; None: it depends on the model, as `where_none` says.
    """
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"most tokens of an answer; default: {max_new_tokens or where_none}",
    )
    group.add_argument(
        "--stop-strings", nargs="+", default=(), metavar="TEXT", help="end an answer before the first of these texts"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default): always the likeliest token; above it tokens are drawn, at 1 as likely as the model says",
    )
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens with this total")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least this share as likely as the likeliest"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 makes tokens that stand there already less likely; default: 1, off",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="above 0 makes a token less likely each time that it was generated; default: 0, off",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="the same, once for all times; default: 0, off",
    )
    group.add_argument("--seed", type=int, default=42, metavar="N", help="of the draws; default: 42")


def sampling_of(values: dict[str, Any]) -> dict[str, Any]:
    """The values of `add_sampling_options`, as `slothcore.generate` takes them.

    Raises: UsageError for an option that would have no effect, or a value that it cannot have.
    """
    for name in OF_DRAWING:
        if values[name] is not None and not values["temperature"]:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} has no effect without --temperature above 0; add it, or leave --{flag} out")
    from slothcore.models.sampling import Sampling

    names = ("temperature", *OF_DRAWING, *PENALTIES)
    try:
        Sampling(**{name: values[name] for name in names})
        if values["max_new_tokens"] is not None and values["max_new_tokens"] < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {values['max_new_tokens']}")
        if not 0 <= values["seed"] < 2**63:
            raise ValueError(f"seed must lie in 0..2**63 - 1, got {values['seed']}")
        if "" in values["stop_strings"]:
            raise ValueError("stop_strings must not hold an empty text")
    except ValueError as error:
        raise UsageError(str(error)) from error
    return {name: values[name] for name in NAMES}
