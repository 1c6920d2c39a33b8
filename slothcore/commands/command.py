"""What a command is, and what several of them share: options of a run as flags, the options that name a model."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from slothcore.data.templates import builtin_template, names_template_file, template_source
from slothcore.training.config import TrainConfig, field_types
from slothcore.training.options import check_device_name, coerce, describe, takes_bool

WIDEST_HELP = 110
# Choices beside a flag; more are listed in its help.
LONGEST_METAVAR = 60
CONFIG_IN_RUN = "config.yaml"
# Files that hold data by their names; one that ends in .json may hold options, since all JSON is YAML.
DATA_FILES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")


class UsageError(ValueError):
    """The command was called in a way that it cannot be; its text is one sentence."""


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        name: that word.
        help: a line for the list of commands.
        description: what stands first in its own help.
        examples: lines, each a command that works and, after spaces, a few words about it.
        add_options: gives a parser its options.
        run: does it, with the values of the options; gives the exit status.
        usage: in place of argparse's own, which would list every option.
        takes_config: whether the options of a run are options of this command, and --config as well.
    """

    name: str
    help: str
    description: str
    examples: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[dict[str, Any]], int]
    usage: str | None = None
    takes_config: bool = False

    def __str__(self) -> str:
        return self.name

    def known_names(self, values: dict[str, Any]) -> set[str]:
        """Every option, by the names in `values`, which lacks options of a run that were not given."""
        return {*values, *(field_types() if self.takes_config else ())} - {"config_file"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines; text is as wide as the terminal, but not wider than one reads with ease."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns, WIDEST_HELP) - 2)


def add_run_options(parser: argparse.ArgumentParser, *, groups: tuple[str, ...] | None = None) -> None:
    """--config, and a flag for every option of a run, group by group, as TrainConfig declares them.

    Args:
        groups: those that `--help` lists; the options of others are accepted and not shown. None: all.
    """
    parser.add_argument(
        "config_file",
        nargs="?",
        type=os.path.expanduser,
        metavar="CONFIG.yaml",
        help="options from a file; or from a run, by its folder",
    )
    parser.add_argument("--config", type=os.path.expanduser, metavar="FILE.yaml", help="the same")
    sections: dict[str, Any] = {}
    types = field_types()
    for item in fields(TrainConfig):
        group = item.metadata["group"]
        is_shown = groups is None or group in groups
        if is_shown and group not in sections:
            sections[group] = parser.add_argument_group(group)
        annotation = types[item.name]
        text = f"{item.metadata['help']}{_choices(annotation)} (default: {_shown(item.default)})".replace("%", "%%")
        options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "metavar": _metavar(annotation)}
        if takes_bool(annotation):
            options |= {"nargs": "?", "const": True}
        elif "a list of" in describe(annotation):
            options |= {"nargs": "+"}
        section = sections[group] if is_shown else parser
        section.add_argument(
            f"--{item.name.replace('_', '-')}", help=text if is_shown else argparse.SUPPRESS, **options
        )


def config_of(values: dict[str, Any]) -> TrainConfig:
    """The options of a run that the values of `add_run_options` stand for: those of the file, flags on top.

    Raises: UsageError, or FileNotFoundError if there is no such file.
    """
    if values["config"] and values["config_file"]:
        raise UsageError(f"{values['config_file']} and --config {values['config']} both name a file; drop one of them")
    path = values["config"] or values["config_file"]
    if path is not None:
        path = _config_file(Path(path))
    types = field_types()
    with wrong_call():
        flags = {name: _from_words(name, value, types[name]) for name, value in values.items() if name in types}
        config = TrainConfig.from_sources(path, flags)
        if config.chat_template is not None and not names_template_file(config.chat_template):
            builtin_template(config.chat_template)
        if config.rope_scaling is not None:
            from slothcore.models.rope_scaling import checked_scaling

            checked_scaling(config.rope_scaling)
    return config


def require_set(config: TrainConfig, *needed: str) -> None:
    """Raises: UsageError if an option of a run that a command needs is not set; one of them is "model"."""
    for name in needed:
        if (config.source if name == "model" else getattr(config, name)) is None:
            value = "NAME_OR_FOLDER" if name == "model" else "FILE"
            raise UsageError(f"{name} is not set; give --{name} {value}, or {name}: in the configuration file")


@contextmanager
def wrong_call() -> Iterator[None]:
    """Around checks of what was asked for, by itself: a ValueError of theirs is a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model a command opens, and how."""
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


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """Which adapter is put on the model; most need none, since an adapter names its base."""
    parser.add_argument(
        "--adapter",
        metavar="NAME_OR_RUN",
        help="put this adapter on --model, for example because its base lies elsewhere than it says; without it "
        "--model takes an adapter, and its base with it",
    )


def add_template_option(group: argparse._ActionsContainer) -> None:
    """How a conversation is written."""
    group.add_argument(
        "--chat-template",
        type=os.path.expanduser,
        metavar="NAME",
        help="a built-in template or a .jinja file; default: the model's own",
    )


def check_model_options(values: dict[str, Any]) -> None:
    """Say what is wrong with the options that name a model, an adapter and a template before a model is loaded.

    Raises: UsageError for what can be no name; ValueError for a template in a file that cannot be read.
    """
    for name in ("model", "adapter", "revision", "token", "device", "chat_template"):
        if values[name] == "":  # as an unset variable of a shell script gives it
            raise UsageError(f"--{name.replace('_', '-')} is empty; give a value, or leave it out")
    chosen = values["chat_template"]
    with wrong_call():
        if values["device"] is not None:
            check_device_name(values["device"])
        if chosen is not None and not names_template_file(chosen):
            builtin_template(chosen)
    if chosen is not None:
        template_source(chosen)


def model_options(values: dict[str, Any]) -> dict[str, Any]:
    """The values of `add_model_options` but for the model, as `open_result` takes them."""
    return {name: values[name] for name in ("bits", "device", "revision", "token", "local_files_only")}


def _config_file(path: Path) -> Path:
    """The file of options that is meant. Raises UsageError for what is more likely a model or data."""
    if (path / CONFIG_IN_RUN).is_file():
        return path / CONFIG_IN_RUN
    if path.is_dir():
        raise UsageError(f"the folder {path} has no {CONFIG_IN_RUN}, so it is no run; give a model as --model {path}")
    if path.suffix.lower() in DATA_FILES:
        raise UsageError(f"{path} is no file of options; give data as --data {path}")
    return path


def _from_words(name: str, value: Any, annotation: Any) -> Any:
    """A flag that takes one or more words gives a list; one word alone may stand for itself."""
    if isinstance(value, list) and len(value) == 1 and "text" in describe(annotation):
        value = value[0]
    elif isinstance(value, list) and len(value) == 1 and value[0] in ("null", "none"):
        value = None
    return coerce(name, value, annotation)


def _metavar(annotation: Any) -> str:
    """A short word for the value of an option, from its type."""
    what = describe(annotation).replace(" or null", "").replace(", null", "").replace(", a mapping", " | JSON")
    if "|" in what:
        return what.replace(" ", "") if len(what) <= LONGEST_METAVAR else "NAME"
    words = {
        "a whole number": "N",
        "a number": "X",
        "true or false": "BOOL",
        "a list of names": "NAME",
        "a list of numbers": "X",
        "a mapping": "JSON",
    }
    return words.get(what, "TEXT")


def _choices(annotation: Any) -> str:
    """The words to choose from, where they are too many to stand beside the flag."""
    what = describe(annotation)
    return f"; one of {what.replace(' |', ',')}" if "|" in what and _metavar(annotation) == "NAME" else ""


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "null" if default is None else "empty"
    return str(default).lower() if isinstance(default, bool) else str(default)
