"""The `slothcore` command: finds the command that is meant, runs it, and says in one line what went wrong."""

import argparse
import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from slothcore.commands import chat, doctor, export, generate, merge, plan, preview, report, serve, train
from slothcore.commands.command import Command, HelpFormatter, UsageError
from slothcore.commands.train import INTERRUPTED
from slothcore.notices import notices
from slothcore.training.options import check_names
from slothcore.training.other_names import OTHER_FLAGS, OTHER_NAMES
from slothcore.version import __version__

FAILURE, USAGE_ERROR = 1, 2
# What a shell reports for a command whose reader has gone.
BROKEN_PIPE = 141

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND
    for module in (train, preview, plan, generate, chat, serve, export, merge, report, doctor)
}
FIRST_STEPS = """\
first steps:
  slothcore doctor                                                  is everything there?
  slothcore plan --model meta-llama/Llama-3.1-8B --gpu 24           does it fit into 24 GiB?
  slothcore preview --model meta-llama/Llama-3.1-8B --data d.jsonl  what will be learned?
  slothcore train --model meta-llama/Llama-3.1-8B --data d.jsonl --output-dir run
  slothcore chat --model run                                        talk with the result
  slothcore serve --model run                                       let other programs ask it
  slothcore export --model run --format merged --output-dir merged  take it elsewhere

slothcore COMMAND --help explains a command and shows examples.
"""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and that guesses no abbreviations: a typing error must not train."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Have Ctrl-C end the process where it comes in the middle of an import, and be what it was everywhere else.

    An exception that reaches torch or numpy while they are loading aborts the process, or is dropped and the command
    goes on.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"slothcore: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


@_interruptible_imports()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status. What a user can cause ends in one line on stderr, never a traceback.

    The status is 0 for success, 1 for a failure, 2 for a call that cannot be meant so: a wrong option or value.
    """
    status = FAILURE
    _make_outputs_usable()
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # As in `slothcore generate ... | head -1`.
        _drop_output()
        return BROKEN_PIPE
    except UsageError as error:
        status, message = USAGE_ERROR, str(error)
    except ValueError as error:
        message = str(error)
    except OSError as error:
        status, message = FAILURE, _system_error(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
    except RuntimeError as error:
        message = _out_of_memory(error)
    except KeyboardInterrupt:
        print("slothcore: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"slothcore: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the options of `train` are the fields of TrainConfig."""
    parser = OneLineParser(
        prog="slothcore",
        description="Fine-tune open-weight language models, exactly.",
        usage="slothcore [--version] COMMAND [options]",
        epilog=FIRST_STEPS,
    )
    parser.add_argument("--version", action="version", version=f"slothcore {__version__}")
    words = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_options(
            words.add_parser(
                command.name,
                prog=f"slothcore {command.name}",
                help=command.help,
                description=command.description,
                usage=command.usage,
                epilog=f"examples:\n{command.examples}",
            )
        )
    return parser


def _run(argv: list[str]) -> int:
    parser = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"there is no command {argv[0]!r}{hint}; the commands are {', '.join(COMMANDS)}")
    arguments, unknown = parser.parse_known_args([_with_dashes(word) for word in argv])
    if arguments.command is None:
        if unknown:
            raise UsageError(f"{unknown[0]!r} is no option of slothcore itself; name a command before its options")
        parser.print_help()
        return USAGE_ERROR
    values = vars(arguments)
    command = COMMANDS[values.pop("command")]
    options = [_option_name(word) for word in unknown if word.startswith("-")]
    try:
        others = OTHER_NAMES if command.takes_config else {**OTHER_NAMES, **OTHER_FLAGS}
        check_names(options, command.known_names(values), source="the flags", others=others)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if unknown:
        raise UsageError(f"{unknown[0]!r} belongs to no option; options begin with --")
    # Beside the answers, which alone stand on standard output.
    with notices(lambda text: print(f"slothcore: {text}", file=sys.stderr)):
        return command.run(values)


def _with_dashes(word: str) -> str:
    """`--max_steps`, the spelling of transformers and PEFT, is `--max-steps`."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _option_name(word: str) -> str:
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _make_outputs_usable() -> None:
    """Have standard output spell what its encoding lacks, \\u65e5: no run is to fail over its last line.

    An output that is closed, as `>&-` leaves it, takes everything and shows nothing. Its number may else become that
    of a file of the run, into which a library then writes its warnings.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Have what standard output does not take go nowhere: it would fail again where Python flushes it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _system_error(error: OSError) -> str:
    """What to say of an error that says nothing but what the system does not do; others are sentences already."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = error.filename or "a file, or standard output,"
        return f"{what} cannot be written: {error.strerror}; make room, or write to another disk"
    if error.errno in (errno.EACCES, errno.EPERM) and error.filename is not None:
        return f"{error.filename} may not be read, or written: {error.strerror}; change its rights, or choose another"
    return str(error)


def _out_of_memory(error: RuntimeError) -> str:
    """What to say where the GPU's memory is full; any other error is ours, and goes on."""
    # Imported long since by whatever has raised it.
    import torch

    from slothcore.training.out_of_memory import DoesNotFit

    if not isinstance(error, torch.OutOfMemoryError):
        raise error
    if isinstance(error, DoesNotFit):
        return str(error)
    return "the GPU's memory is full; lower max_seq_length, or set gradient_checkpointing to true"


if __name__ == "__main__":
    sys.exit(main())
