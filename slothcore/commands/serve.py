"""`slothcore serve`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slothcore.commands.command import (
    Command,
    UsageError,
    add_model_options,
    add_template_option,
    check_model_options,
    model_options,
)

if TYPE_CHECKING:
    from slothcore.data.tokenizer import Tokenizer
    from slothcore.lora.several import SeveralAdapters
    from slothcore.models.decoder import Decoder
    from slothcore.serve.models import ServedModel

EXAMPLES = """\
  slothcore serve --model runs/chat
  slothcore serve --model meta-llama/Llama-3.1-8B-Instruct --adapter law=runs/law --adapter poems=owner/poems
  slothcore serve --model runs/chat --host 0.0.0.0 --port 8080 --api-key "$KEY"   for other machines, too
"""
PACKAGES = ("starlette", "uvicorn")
NO_TEMPLATE = "conversations are refused; --chat-template alpaca, chatml or another one lets them be asked"
WARMING_UP = "warming up with a short answer, so that no client waits for kernels; --no-warm-up leaves it out"
KEY_VARIABLE = "SLOTHCORE_API_KEY"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    names = parser.add_argument_group("models")
    names.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter for the model, which requests for the model NAME get: a folder, a run or a Hub name; may be "
        "given several times",
    )
    names.add_argument(
        "--served-model-name", metavar="NAME", help="what requests call the model; default: as --model has it"
    )
    add_template_option(names)
    door = parser.add_argument_group("who may ask")
    door.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="where to listen; default: 127.0.0.1, this machine only"
    )
    door.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0: any that is free")
    door.add_argument(
        "--api-key", metavar="TEXT", help=f"a key that clients have to send; default: {KEY_VARIABLE}, or none is needed"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--max-rows", type=int, default=128, metavar="N", help="most answers that are written together; default: 128"
    )
    load.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens of a prompt with its answer; default: the model's own"
    )
    load.add_argument(
        "--cache-tokens", type=int, metavar="N", help="tokens that the cache holds; default: what memory allows"
    )
    load.add_argument(
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        help="compile and load kernels with a short answer before the first request; default: on a GPU",
    )


def run(values: dict[str, Any]) -> int:
    check_model_options(values)
    adapters = adapters_of(values["adapter"])
    name = values["served_model_name"] or values["model"]
    if name in adapters:
        raise UsageError(f"the model and an adapter are both called {name}; give one another name")
    if not values["host"]:
        raise UsageError("--host is empty; give the name or address where to listen, or leave it out")
    if not 0 <= values["port"] <= 65535:
        raise UsageError(f"--port must lie in 0..65535, got {values['port']}")
    for option in ("max_rows", "max_length", "cache_tokens"):
        if values[option] is not None and values[option] < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1, got {values[option]}")
    key = values["api_key"] if values["api_key"] is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UsageError("the API key must be printable ASCII without spaces around it, as a header can carry it")
    lacking = [package for package in PACKAGES if find_spec(package) is None]
    if lacking:
        raise ValueError(f"slothcore serve needs {' and '.join(lacking)}: pip install 'slothcore[serve]'")
    from slothcore.serve.port import Port
    from slothcore.serve.server import Server

    port = Port(values["host"], values["port"])  # one that is taken is said before a model is loaded
    if key is None and not port.is_loopback:
        print(f"slothcore: anyone who reaches {port.url} may ask; --api-key asks for a key", file=sys.stderr)
    model, several, served = open_models(values, name, adapters)
    server = Server(
        model,
        served,
        port,
        adapters=several,
        api_key=key,
        max_rows=values["max_rows"],
        capacity=values["max_length"],
        cache_tokens=values["cache_tokens"],
    )
    limit = model.config.longest_document
    if values["max_length"] is not None and values["max_length"] > limit:
        print(
            f"slothcore: --max-length {values['max_length']} goes beyond the {limit} positions that the model was made "
            "for (max_position_embeddings); longer texts may degrade",
            file=sys.stderr,
            flush=True,
        )
    names = ", ".join(each.name for each in served)
    silent = ", ".join(each.name for each in served if each.tokenizer.chat_template is None)
    if silent:
        print(f"slothcore: no chat template for {silent}: {NO_TEMPLATE}", file=sys.stderr, flush=True)
    if values["warm_up"] or (values["warm_up"] is None and model.device.type == "cuda"):
        print(f"slothcore: {WARMING_UP}", file=sys.stderr, flush=True)
        server.warm_up()
    # A process that a script has put into the background is told nothing of Ctrl-C once the server has ended with it.
    with suppress(KeyboardInterrupt):
        server.run(ready=lambda: print(f"serving {names} at {port.url}; Ctrl-C ends", flush=True))
    print("stopped", flush=True)
    return 0


def adapters_of(named: Sequence[str]) -> dict[str, str]:
    """Name of each adapter -> folder, run or Hub name. Raises: UsageError for one without a name, or with another's."""
    found: dict[str, str] = {}
    for text in named:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise UsageError(f"--adapter takes NAME=FOLDER, as in law=runs/law, got {text!r}")
        if name in found:
            raise UsageError(f"two adapters are called {name}; give one another name")
        found[name] = place
    return found


def open_models(
    values: Mapping[str, Any], name: str, adapters: Mapping[str, str]
) -> tuple["Decoder", "SeveralAdapters | None", list["ServedModel"]]:
    """The model, what its adapters are, and what clients may ask for."""
    from slothcore.lora.several import SeveralAdapters
    from slothcore.models.vocabulary import round_tables
    from slothcore.run import open_result
    from slothcore.serve.models import ServedModel

    options, several = model_options(dict(values)), None
    if not adapters:
        model, tokenizer = open_result(values["model"], **options)
        round_tables(model)
        tokenizers: dict[str, Tokenizer] = {}
    else:
        model, tokenizer, folders, tokenizers = open_base(values["model"], adapters, **options)
        several = SeveralAdapters(model, folders)
    if values["chat_template"] is not None:
        for each in (tokenizer, *tokenizers.values()):
            each.use_chat_template(values["chat_template"])
    served = [ServedModel.of(model, name, tokenizer)]
    served += [ServedModel.of(model, each, tokenizers[each], adapter=each, parent=name) for each in adapters]
    return model, several, served


def open_base(
    name: str, adapters: Mapping[str, str], *, bits: int | None, device: str | None, **hub: Any
) -> tuple["Decoder", "Tokenizer", dict[str, Path], dict[str, "Tokenizer"]]:
    """The base that several adapters stand on, with positions for the longest texts of any of them.

    Args:
        bits: of the base weights; None: as the first adapter's run had them, or 4.
    Returns: the model, its tokenizer; name of each adapter -> its folder, its tokenizer.
    Raises: ValueError, in one sentence, if a name stands for nothing, or the adapters turn positions unlike each other.
    """
    from slothcore.locating import locate
    from slothcore.models.load import read_config
    from slothcore.run import load_both, require_tokenizer
    from slothcore.training.run_folder import find_source

    places = {each: locate(name, adapter=place, **hub) for each, place in adapters.items()}
    first = next(iter(places.values()))
    turned = {
        each: read_config(found.folder, max_seq_length=found.max_seq_length, rope_scaling=found.rope_scaling)[2]
        for each, found in places.items()
    }
    # By the angles themselves: without a word of scaling they depend on the length that a run was given.
    if len({(config.rope, config.local_rope) for config in turned.values()}) > 1:
        told = ", ".join(f"{each}: {c.rope.rope_type}, {c.longest_document} positions" for each, c in turned.items())
        raise ValueError(
            f"the adapters were trained with positions scaled unlike each other ({told}); serve them apart"
        )
    runs = [run for place in adapters.values() if (run := find_source(place).config) is not None]
    bits = bits or (runs[0].bits if runs else 4)
    model, tokenizer = load_both(
        name,
        bits=bits,
        dtype=runs[0].dtype if runs and runs[0].bits == bits else None,
        device=device,
        max_seq_length=max((found.max_seq_length for found in places.values() if found.max_seq_length), default=None),
        rope_scaling=first.rope_scaling,
        **hub,
    )
    tokenizers = {each: require_tokenizer(found.tokenizer(), name) for each, found in places.items()}
    folders = {each: found.adapter for each, found in places.items() if found.adapter is not None}
    return model, tokenizer, folders, tokenizers


COMMAND = Command(
    name="serve",
    help="answer other programs over HTTP, as OpenAI's API does",
    description="Answer over HTTP, as OpenAI's API does: chat and completions, whole or in pieces, for a model or the\n"
    "result of a run, and for any number of adapters on one base. Many clients are answered together.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
