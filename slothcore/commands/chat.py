"""`slothcore chat`."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from slothcore.commands.command import (
    Command,
    UsageError,
    add_adapter_option,
    add_model_options,
    add_template_option,
    check_model_options,
    model_options,
)
from slothcore.commands.sampling import add_sampling_options, sampling_of

EXAMPLES = """\
  slothcore chat --model runs/chat
  slothcore chat --model Qwen/Qwen2.5-0.5B-Instruct --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
  slothcore chat --model runs/alpaca --chat-template alpaca   a model that was tuned on instructions
"""
NO_TEMPLATE = (
    "the model has no chat template, so it writes on from your text as it stands; --chat-template alpaca, chatml or "
    "another one talks to it"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_adapter_option(parser)
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", help="the system message that the conversation begins with")
    add_template_option(talk)
    add_sampling_options(parser, max_new_tokens=None, where_none="512, or half of what the model takes if that is less")


def run(values: dict[str, Any]) -> int:
    sampling = sampling_of(values)
    if values["system"] == "":
        raise UsageError("--system is empty; write a message, or leave it out")
    if sys.stdin is None:
        raise UsageError(
            "standard input is closed, so there is nobody to talk with; pipe questions in, one on each line"
        )
    check_model_options(values)
    from slothcore.commands.terminal import Terminal
    from slothcore.inference.chat import Chat
    from slothcore.models.vocabulary import round_tables
    from slothcore.run import open_result

    model, tokenizer = open_result(values["model"], adapter=values["adapter"], **model_options(values))
    round_tables(model)
    if values["chat_template"] is not None:
        tokenizer.use_chat_template(values["chat_template"])
    chat = Chat(model, tokenizer, system=values["system"], **sampling)
    if not chat.has_template:
        print(f"slothcore: {NO_TEMPLATE}", file=sys.stderr)
    return Conversation(chat, Terminal(), title=values["model"]).run()


class Conversation:
    """Reads what the user says, answers it, and does what a line with a slash in front asks for."""

    def __init__(self, chat: Any, terminal: Any, *, title: str) -> None:
        self.chat, self.terminal, self.title = chat, terminal, title
        self.commands = {
            "help": (self._help, "", "this list"),
            "reset": (self._reset, "", "begin anew, with the same system message"),
            "system": (self._system, "[TEXT]", "begin anew with another system message, or none"),
            "save": (self._save, "FILE.jsonl", "add the conversation to a file, which can be trained on"),
            "quit": (None, "", "leave, as does Ctrl-D"),
        }

    def run(self) -> int:
        """Go on until the input ends or `/quit`; gives the exit status."""
        terminal = self.terminal
        terminal.note(f"talking with {self.title}; /help lists what else can be said, Ctrl-D leaves")
        while (text := terminal.read()) is not None:
            if not text.strip():
                continue
            try:
                if not self._turn(text):
                    break
            except (ValueError, OSError) as error:
                terminal.complain(" ".join(str(error).split()))
        return 0

    def _turn(self, text: str) -> bool:
        """Answer, or do what is asked; whether the conversation goes on."""
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            if name.strip() not in self.commands:
                raise ValueError(
                    f"there is no command /{name.strip()}; /help lists them, and // begins a message with a slash"
                )
            act, argument, _ = self.commands[name.strip()]
            if act is None:
                return False
            if rest.strip() and not argument:
                raise ValueError(f"/{name.strip()} takes nothing behind it, got {rest.strip()!r}")
            act(rest.strip())
            return True
        stopped = self.terminal.show(self.chat.ask(text))
        if stopped:
            self.terminal.note("stopped; what was said so far counts as the answer")
        elif self.chat.is_full:
            self.terminal.note(
                "cut short, for the conversation is as long as the model can read; /reset begins a new one"
            )
        elif self.chat.cut_short:
            self.terminal.note(
                f"cut short after {self.chat.max_new_tokens} tokens; --max-new-tokens allows longer answers"
            )
        return True

    def _help(self, _: str) -> None:
        for name, (_act, argument, what) in self.commands.items():
            self.terminal.tell(f"{f'/{name} {argument}':<20} {what}")
        self.terminal.tell(
            f"{chr(34) * 3:<20} begins and ends a message of several lines; so does \\ at the end of each"
        )
        self.terminal.tell(f"{'Ctrl-C':<20} stops an answer, or drops what is being written")

    def _reset(self, _: str) -> None:
        self.chat.reset(self.chat.system)
        self.terminal.note("a new conversation")

    def _system(self, text: str) -> None:
        self.chat.reset(text or None)
        self.terminal.note("a new conversation, with that system message" if text else "a new one without")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file, as in /save talk.jsonl")
        if not any(message["role"] == "assistant" for message in self.chat.messages):
            raise ValueError("nothing has been said yet that could be saved")
        add_line(Path(name).expanduser(), json.dumps({"messages": self.chat.messages}, ensure_ascii=False))
        self.terminal.note(f"saved to {name}, as one line of it")


def add_line(path: Path, text: str) -> None:
    """Write a line of its own at the end of a file, which stays as it was where that fails.

    Raises: OSError.
    """
    with path.open("ab", buffering=0) as file:
        end, last = path.stat().st_size, b"\n"
        if end:
            with path.open("rb") as before:
                before.seek(end - 1)
                last = before.read(1)
        data = ("\n" * (last != b"\n") + text + "\n").encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            with suppress(OSError):
                file.truncate(end)
            raise OSError(f"{path} cannot be written ({error.strerror}); name another file") from error


COMMAND = Command(
    name="chat",
    help="talk with a model, or the result of a run, in the terminal",
    description="Talk with a model, an adapter or the result of a run, turn by turn. Ctrl-C stops an answer, Ctrl-D\n"
    "leaves; /help lists what else can be said. Of questions that are piped in, one on each line, the answers alone\n"
    "come out.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
