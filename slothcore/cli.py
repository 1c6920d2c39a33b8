"""The `slothcore` command: arguments to calls, nothing else."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from slothcore.data.formats import alpaca_prompt
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.merged import save_merged
from slothcore.inference.generate import generate
from slothcore.models.decoder import Decoder
from slothcore.run import notices, open_result, train_from_config
from slothcore.training.config import TrainConfig, field_types
from slothcore.training.options import check_names, coerce, describe, takes_bool
from slothcore.training.out_of_memory import DoesNotFit
from slothcore.training.run_folder import check_writable
from slothcore.version import __version__

USER_ERROR = 2
# What a shell reports for a command that Ctrl-C ended, and for one whose reader has gone.
INTERRUPTED, BROKEN_PIPE = 130, 141

TRAIN_EXAMPLES = """\
examples:
  slothcore train --model meta-llama/Llama-3.2-1B --data alpaca.json --max-steps 200 --output-dir runs/alpaca
  slothcore train --config run.yaml --learning-rate 1e-4        a file, and flags on top of it
  slothcore train --config runs/alpaca/config.yaml --resume-from-checkpoint latest
"""
GENERATE_EXAMPLES = """\
examples:
  slothcore generate --model runs/alpaca --instruction "Name three rivers in Europe."
  slothcore generate --model meta-llama/Llama-3.2-1B --prompt "The capital of France is" --max-new-tokens 8
"""
MERGE_EXAMPLES = """\
examples:
  slothcore merge --model runs/alpaca --output-dir merged
"""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and that guesses no abbreviations: a typing error must not train."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status. What a user can cause ends in one line on stderr, never a traceback."""
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # As in `slothcore generate ... | head -1`. Whatever is left to flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    except torch.OutOfMemoryError as error:
        full = "the GPU's memory is full; lower max_seq_length, or set gradient_checkpointing to true"
        message = str(error) if isinstance(error, DoesNotFit) else full
    except KeyboardInterrupt:
        print("slothcore: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"slothcore: error: {message}", file=sys.stderr)
    return USER_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the options of `train` are the fields of TrainConfig."""
    parser = OneLineParser(prog="slothcore", description="Fine-tune open-weight language models, exactly.")
    parser.add_argument("--version", action="version", version=f"slothcore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="train | generate | merge")
    _add_train(
        commands.add_parser(
            "train",
            help="fine-tune a model",
            description="Fine-tune a model. Every option may stand in the YAML file or as a flag; flags win.",
            usage="slothcore train [--config FILE.yaml] [--option value ...]",
            epilog=TRAIN_EXAMPLES,
        )
    )
    _add_generate(
        commands.add_parser(
            "generate",
            help="let a model, or the result of a run, answer",
            description="Continue prompts with a model, an adapter or the result of a run.",
            epilog=GENERATE_EXAMPLES,
        )
    )
    _add_merge(
        commands.add_parser(
            "merge",
            help="write an adapter and its base as one 16-bit model",
            description="Merge an adapter into its base model and write a Hugging Face folder.",
            epilog=MERGE_EXAMPLES,
        )
    )
    return parser


def _run(argv: list[str]) -> int:
    parser = build_parser()
    arguments, unknown = parser.parse_known_args([_with_dashes(word) for word in argv])
    if arguments.command is None:
        parser.print_help()
        return USER_ERROR
    values = vars(arguments)
    command = values.pop("command")
    known = {"config", *field_types()} if command == "train" else set(values)
    check_names([_option_name(word) for word in unknown if word.startswith("-")], known, source="the flags")
    if unknown:
        raise ValueError(f"{unknown[0]!r} belongs to no option; options begin with --")
    # Beside the answers, which alone stand on standard output.
    with notices(lambda text: print(f"slothcore: {text}", file=sys.stderr)):
        return COMMANDS[command](values)


def _with_dashes(word: str) -> str:
    """`--max_steps`, the spelling of transformers and PEFT, is `--max-steps`."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _option_name(word: str) -> str:
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file")
    groups: dict[str, Any] = {}
    types = field_types()
    for item in fields(TrainConfig):
        group = item.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        annotation = types[item.name]
        text = f"{item.metadata['help']} (default: {_shown(item.default)})".replace("%", "%%")
        options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "metavar": _metavar(annotation)}
        if takes_bool(annotation):
            options |= {"nargs": "?", "const": True}
        elif "a list of names" in describe(annotation):
            options |= {"nargs": "+"}
        groups[group].add_argument(f"--{item.name.replace('_', '-')}", help=text, **options)


def _metavar(annotation: Any) -> str:
    """A short word for the value of an option, from its type."""
    what = describe(annotation).replace(" or null", "").replace(", null", "").replace(", a mapping", " | JSON")
    if "|" in what:
        return what.replace(" ", "")
    words = {"a whole number": "N", "a number": "X", "true or false": "BOOL", "a list of names": "NAME"}
    return words.get(what, "TEXT")


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "null" if default is None else "empty"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_RUN", help="a Hub name, or a folder: of a run, an adapter or a model"
    )
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--token", metavar="TEXT", help="access token of the Hub; default: HF_TOKEN, or a stored login")
    parser.add_argument("--local-files-only", action="store_true", help="take a Hub model from the download cache")
    parser.add_argument(
        "--bits", type=int, choices=(4, 16, 32), help="base weights; default: as the run was trained, else 4"
    )
    parser.add_argument("--device", metavar="TEXT", help="cpu, cuda or cuda:N; default: a GPU if there is one")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model_options(parser)
    prompts = parser.add_argument_group("prompts (one kind)")
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    prompts.add_argument("--prompts-file", metavar="FILE", help="the same, one on each line")
    prompts.add_argument("--instruction", metavar="TEXT", help="an instruction, put into Alpaca's template")
    prompts.add_argument("--input", metavar="TEXT", default="", help="the input that goes with --instruction")
    prompts.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    prompts.add_argument("--system", metavar="TEXT", help="the system message that goes with --chat")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer; default: 256")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token"
    )
    sampling.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens with this total")
    sampling.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    sampling.add_argument("--seed", type=int, default=42, metavar="N", help="of the sampling; default: 42")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    _add_model_options(parser)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="a new folder for the merged model")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of its weights"
    )


def _train(values: dict[str, Any]) -> int:
    path = values.pop("config")
    types = field_types()
    flags = {name: _from_words(name, value, types[name]) for name, value in values.items()}
    result = train_from_config(TrainConfig.from_sources(path, flags))
    return INTERRUPTED if result.interrupted else 0


def _from_words(name: str, value: Any, annotation: Any) -> Any:
    """A flag that takes one or more words gives a list; one word alone may stand for itself."""
    if isinstance(value, list) and len(value) == 1 and "text" in describe(annotation):
        value = value[0]
    return coerce(name, value, annotation)


def _generate(values: dict[str, Any]) -> int:
    prompts = _prompts(values)
    for name, needed in {
        "input": "instruction",
        "system": "chat",
        "top_p": "temperature",
        "top_k": "temperature",
    }.items():
        if values[name] and not values[needed]:
            flag = name.replace("_", "-")
            above_zero = " above 0" if needed == "temperature" else ""
            raise ValueError(f"--{flag} has no effect without --{needed}{above_zero}; add it, or leave --{flag} out")
    model, tokenizer = _open(values)
    if values["chat"]:
        system = [{"role": "system", "content": values["system"]}] if values["system"] else []
        prompts = [
            tokenizer.apply_chat_template([*system, {"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in prompts
        ]
    texts = generate(
        model,
        tokenizer,
        prompts,
        **{name: values[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")},
        # A chat template writes the begin token itself.
        add_special_tokens=not values["chat"],
    )
    for text in texts:
        print(text)
    return 0


def _open(values: dict[str, Any]) -> tuple[Decoder, Tokenizer]:
    """The model that the options of `_add_model_options` name."""
    names = ("bits", "device", "revision", "token", "local_files_only")
    return open_result(values["model"], **{name: values[name] for name in names})


def _prompts(values: dict[str, Any]) -> list[str]:
    """The texts to continue, from whichever option holds them."""
    if sum(values[name] is not None for name in ("prompt", "prompts_file", "instruction")) != 1:
        raise ValueError("give one of --prompt, --prompts-file and --instruction")
    if values["instruction"] is not None:
        return [alpaca_prompt(values["instruction"], values["input"])]
    if values["prompt"] is not None:
        return list(values["prompt"])
    path = Path(values["prompts_file"])
    if not path.is_file():
        raise FileNotFoundError(f"the prompts file {path} does not exist")
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts file {path} is not UTF-8; save it as UTF-8") from error
    if not prompts:
        raise ValueError(f"the prompts file {path} is empty; write one prompt on each line")
    return prompts


def _merge(values: dict[str, Any]) -> int:
    target = Path(values["output_dir"])
    check_writable(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"output_dir {target} exists and is not empty; choose a new folder")
    model, tokenizer = _open(values)
    save_merged(model, tokenizer, target, dtype=getattr(torch, values["dtype"]))
    print(f"saved {target}")
    return 0


COMMANDS = {"train": _train, "generate": _generate, "merge": _merge}

if __name__ == "__main__":
    sys.exit(main())
