"""Follows a guide as its reader would: writes the files that it shows, runs its commands and its Python in order, and
holds the output that it quotes against the real one.

What a fenced block is, the words after its three backticks say:

| words               | what is done with it                                                                      |
| ------------------- | ----------------------------------------------------------------------------------------- |
| sh                  | each line is a command, and has to succeed                                                |
| console             | the same for lines that begin with `$ `; the lines below are their output                 |
| python              | is run, in the names that the guide's Python left before                                  |
| console exact       | the same, with the numbers as they are                                                     |
| text output         | what the Python before has printed                                                        |
| jsonl data.jsonl    | a word with a dot: a file of that name, which the text before the block has to name       |
| sh gpu, python hub  | gpu or hub: not run; parsed by the real parser, with a TrainConfig made of every command  |
| python peer         | code for another library: it has to be Python (or yaml peer: YAML)                        |

Output is compared line by line, with any number in place of a number and any space in place of a space. A line of
three dots stands for any lines, and three dots in a line for any text. A command whose output is quoted with
"slothcore: error:" has to fail. `slothcore serve` runs until the guide ends, on a free port in place of 8000.
"""

import ast
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from slothcore.cli import COMMANDS, build_parser, main
from slothcore.commands.command import config_of

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "docs"
FENCE = re.compile(r"(?ms)^```(?P<words>[^\n`]*)\n(?P<text>.*?)^```$")
FILE_NAME = re.compile(r"[\w/-]+\.\w+")
# A text of the program with fewer letters than this says too little to know a message by.
SHORTEST_TEXT = 12
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
# They install, download or start something beside the guide.
NOT_RUN = ("pip", "make", "git", "hf", "export", "tensorboard", "wandb")
# Where `slothcore serve` listens in a guide, and the line with which it is ready.
GUIDE_PORT, SERVING = "8000", "serving "


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        words: after the backticks; the first is the language.
        before: the text between the block before and this one.
    """

    words: tuple[str, ...]
    text: str
    line: int
    before: str

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def file_name(self) -> str | None:
        return next((word for word in self.words[1:] if FILE_NAME.fullmatch(word)), None)

    @property
    def is_run(self) -> bool:
        return not {"gpu", "hub", "peer"} & set(self.words)


@dataclass(frozen=True)
class Call:
    """A command and the output that the guide shows of it; None: it shows none."""

    command: str
    output: list[str] | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(tuple(match["words"].split()), match["text"], line, text[end : match.start()]))
        end = match.end()
    return found


def calls_of(block: Block) -> list[Call]:
    """The commands of a block, lines that end in a backslash joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "sh":
        return [Call(line, None) for line in lines if line.strip() and not line.startswith("#")]
    calls: list[Call] = []
    for line in lines:
        if line.startswith("$ "):
            calls.append(Call(line[2:], []))
            continue
        assert calls, f"a console block begins with a command, not with {line!r}"
        output = calls[-1].output
        assert output is not None
        output.append(line)
    return calls


@dataclass
class Reader:
    """Somebody who follows a guide in a folder, which is the working folder of this process."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    printed: str = ""
    servers: ExitStack = field(default_factory=ExitStack)
    port: int = field(default_factory=lambda: free_port())

    def follow(self, page: Path) -> None:
        with self.servers:
            for block in blocks_of(page):
                text = block.text.replace(GUIDE_PORT, str(self.port)) if block.is_run else block.text
                try:
                    self.do(replace(block, text=text))
                except Exception as error:
                    raise AssertionError(f"{page.name}, line {block.line}: {error}") from error

    def do(self, block: Block) -> None:
        if block.file_name is not None:
            assert f"`{block.file_name}`" in block.before, f"the text above does not name {block.file_name}"
            file = self.folder / block.file_name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language in ("sh", "console"):
            for call in calls_of(block):
                if block.is_run and call.command.startswith("slothcore serve"):
                    shown = self.servers.enter_context(serving(call.command, self.port))
                    if call.output is not None:
                        compare(call.output, shown, what=call.command)
                elif block.is_run:
                    run(call, exact="exact" in block.words)
                else:
                    check(call.command)
        elif block.language == "python":
            code = compile(block.text, f"line {block.line}", "exec")
            if block.is_run:
                with redirect_stdout(io.StringIO()) as out:
                    exec(code, self.names)
                self.printed = out.getvalue()
            elif "peer" not in block.words:
                check_python(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.words == ("text", "output"):
            compare(block.text.splitlines(), self.printed)


def run(call: Call, *, exact: bool = False) -> None:
    """Run a command, compare its output. Raises AssertionError if it does not do what the guide says."""
    typed, _, command = call.command.rpartition(" | ")
    words = shlex.split(command, comments=True)
    if words[0] in NOT_RUN or (words[0] == "curl" and shutil.which("curl") is None):
        return
    fails = any("slothcore: error:" in line for line in call.output or ())
    if words[0] == "slothcore":
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out), what_is_typed(typed):
            try:
                status = main(words[1:])
            except SystemExit as end:  # --help
                status = int(end.code or 0)
        shown = out.getvalue()
    else:
        command = re.sub(r"^python\b", shlex.quote(sys.executable), call.command)
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        status, shown = done.returncode, done.stdout
    assert (status != 0) == fails, f"{call.command!r} ended with {status}:\n{shown}"
    if call.output is not None:
        compare(call.output, shown, what=call.command, exact=exact)


@contextmanager
def serving(command: str, port: int = 0) -> Iterator[str]:
    """`slothcore serve` in a process of its own until the block ends, and what it shows until it is ready.

    Args:
        port: where it listens; 0: anywhere.
    """
    options = shlex.split(command, comments=True)[1:]
    words = [sys.executable, "-m", "slothcore.cli", *options, "--port", str(port)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=Path.cwd()
    )
    assert process.stdout is not None
    try:
        shown = ""
        while not shown.rpartition("\n")[0].rpartition("\n")[2].startswith(SERVING):
            line = process.stdout.readline()
            assert line, f"{command!r} ended with {process.wait()}:\n{shown}"
            shown += line
        yield shown
        assert process.poll() is None, f"{command!r} ended by itself: {process.stdout.read()}"
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "stopped\n"), f"{command!r} ended with {process.returncode}:\n{rest}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def what_is_typed(command: str) -> Iterator[None]:
    """What the command in front of a pipe writes, on standard input."""
    typed = subprocess.run(command, shell=True, stdout=subprocess.PIPE, check=True).stdout if command else b""
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    try:
        yield
    finally:
        sys.stdin = before


def check(command: str) -> None:
    """Parse a command that is not run; its options have to make a configuration."""
    words = shlex.split(command, comments=True)
    if words[0] != "slothcore":
        return
    arguments, unknown = build_parser().parse_known_args(words[1:])
    assert not unknown, f"{command!r} has unknown options: {unknown}"
    values = vars(arguments)
    if COMMANDS[values["command"]].takes_config:
        if not Path(values["config_file"] or ".").exists():
            values["config_file"] = None  # the file of another run, which nobody has here
        config_of(values)


def check_python(text: str) -> None:
    """Of code that is not run: the options of each TrainConfig have to make one, and slothcore's names to exist."""
    import slothcore

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "slothcore":
            assert hasattr(slothcore, node.attr), f"slothcore.{node.attr} does not exist"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("TrainConfig"):
            slothcore.TrainConfig(**{word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg})


def compare(quoted: list[str], shown: str, *, what: str = "the Python above", exact: bool = False) -> None:
    """Raises AssertionError if the quoted lines are not what was shown."""
    pattern, real = "", [plain(line, exact=exact) for line in shown.splitlines()]
    for line in (plain(line, exact=exact) for line in quoted):
        pattern += r"(?:[^\n]*\n)*?" if line == "..." else r"[^\n]*".join(map(re.escape, line.split("..."))) + "\n"
    text = "".join(f"{line}\n" for line in real)
    assert re.fullmatch(pattern, text), f"{what} shows\n{shown}\nand the guide quotes\n" + "\n".join(quoted)


def plain(line: str, *, exact: bool = False) -> str:
    """A line as it is compared."""
    line = " ".join(line.rpartition("\r")[2].split())
    return line if exact else re.sub(r"#+", "#", NUMBER.sub("0", line))


def messages_of(block: Block) -> list[str]:
    """The messages in a block of such that no command here raises."""
    return block.text.splitlines() if block.words == ("text", "message") else []


def texts_of_the_program() -> Iterator[str]:
    """Every text in slothcore's source, values in it as three dots; adjacent pieces are one text."""
    for file in sorted((ROOT / "slothcore").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def is_made_of(message: str, texts: Iterable[str]) -> bool:
    """Whether texts of the program, one behind the other, make the message, but for values of one word between them.

    What is quoted may break off with three dots.
    """
    rest = message.removesuffix("...").strip()
    covered = [False] * len(rest)
    for text in texts:
        words = text.replace("...", "").strip()
        if len(words) < SHORTEST_TEXT or " " not in words:
            continue
        for match in re.finditer(".*?".join(map(re.escape, text.strip().split("..."))), rest):
            covered[match.start() : match.end()] = [True] * (match.end() - match.start())
    unknown = "".join("\n" if known else letter for known, letter in zip(covered, rest, strict=True))
    return any(covered) and all(len(re.findall(r"[^\W\d]+", run)) <= 1 for run in unknown.split("\n"))
