"""`slothcore chat`: a person at a terminal, and questions that are piped in."""

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slothcore
from slothcore.cli import main
from slothcore.commands.chat import add_line
from slothcore.inference.chat import Chat
from tests.data.tiny_tokenizers import CHATML
from tests.pseudo_terminal import CTRL_C, CTRL_D, PseudoTerminal
from tests.training.tiny import write_model

TEMPLATE = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template and room for long answers; an untrained model does not come to an end."""
    folder = write_model(tmp_path_factory.mktemp("chat") / "model", max_position_embeddings=30_000)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def piped(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    def piped(text: str | bytes, *flags: str, which: Path = model) -> tuple[int, str, str]:
        encoded = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded), encoding="utf-8"))
        capsys.readouterr()
        status = main(["chat", "--model", str(which), "--device", "cpu", "--max-new-tokens", "6", *flags])
        return status, *capsys.readouterr()

    return piped


def answers(model: Path, questions: list[str], **options) -> list[str]:
    opened, tokenizer = slothcore.load(model, device="cpu")
    chat = Chat(opened, tokenizer, max_new_tokens=6, seed=42, **options)
    return ["".join(chat.ask(question)) for question in questions]


def as_lines(texts: list[str]) -> str:
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


def test_piped_questions_give_the_answers_alone(piped, model: Path) -> None:
    expected = as_lines(answers(model, ["one", "two\nlines", "three\nmore  ", "/four", "five"]))
    script = 'one\n\n"""two\nlines"""\n  """\nthree\nmore  \n"""\n//four\n\nfive'
    assert piped(script) == (0, expected, "")
    windows = "\ufeffone\r\n"
    assert piped(windows) == (0, as_lines(answers(model, ["one"])), "")
    assert piped("three\\\nmore  \n")[1] == as_lines(answers(model, ["three\nmore  "]))
    assert piped("") == (0, "", "")


def test_piped_help_is_given_beside_the_answers(piped, model: Path) -> None:
    status, output, errors = piped("/help\none\n")
    assert (status, output) == (0, as_lines(answers(model, ["one"])))
    names = [line.split()[0] for line in errors.splitlines()]
    assert names == ["/help", "/reset", "/system", "/save", "/quit", '"""', "Ctrl-C"]


def test_a_closed_input_is_a_wrong_call(model: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "--model", str(model)]) == 2
    assert capsys.readouterr().err.startswith("slothcore: error: standard input is closed")


def test_sampling_and_system_flags_reach_the_answers(piped, model: Path) -> None:
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    expected = answers(model, ["one", "two"], system="Be brief.", **options)
    assert piped("one\ntwo\n", "--system", "Be brief.", *flags)[1] == as_lines(expected)
    assert piped("one\ntwo\n", "--system", "Be brief.", *flags, "--seed", "43")[1] != as_lines(expected)
    stop = expected[0][2]
    assert piped("one\n", "--system", "Be brief.", *flags, "--stop-strings", stop, "zzz")[1] == expected[0][:2] + "\n"


def test_commands_begin_anew_and_leave(piped, model: Path) -> None:
    first, again, other = (answers(model, ["one"], system=system)[0] for system in (None, None, "Brief."))
    assert piped("one\n/reset\none\n/system Brief.\none\n/reset\none\n/quit\none\n")[1] == as_lines(
        [first, again, other, other]
    )


def test_a_saved_conversation_can_be_trained_on(piped, tmp_path: Path, model: Path) -> None:
    file = tmp_path / "talk.jsonl"
    status, *_ = piped(f"öne\n/save {file}\ntwo\n/save {file}\n", "--system", "Brief.")
    assert status == 0
    first, second = (row["messages"] for row in slothcore.load_dataset(file))
    assert second[: len(first)] == first
    assert [message["role"] for message in second] == ["system", *["user", "assistant"] * 2]
    said = answers(model, ["öne", "two"], system="Brief.")
    assert [message["content"] for message in second] == ["Brief.", "öne", said[0], "two", said[1]]
    words = f"train --model {model} --data {file} --max-steps 1 --device cpu --max-seq-length 512"
    assert main([*words.split(), "--output-dir", str(tmp_path / "run"), "--report", "no", "--plot", "no"]) == 0


def test_a_saved_conversation_is_a_line_of_its_own(piped, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    rows = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file.write_bytes(rows)  # as an editor leaves it that ends no last line
    assert piped(f"one\n/save {file}\n/save {file}\n")[0] == 0
    kept, *saved = file.read_bytes().splitlines()
    assert (kept, len(saved), len(slothcore.load_dataset(file))) == (rows, 2, 3)
    whole = file.read_bytes()

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > len(whole):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:9])

    class Place(type(file)):  # type: ignore[misc]
        def open(self, mode: str, **_: Any) -> Any:
            return FullDisk(self, mode)

    with pytest.raises(OSError, match=r"talk\.jsonl cannot be written \(No space left on device\); name another file"):
        add_line(Place(file), "a line that is longer than what there is room for")
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("one\n/foo\n", "line 2: there is no command /foo; /help lists them, and // begins a message with a slash"),
        ("/reset now\n", "line 1: /reset takes nothing behind it, got 'now'"),
        ("\n/save\n", "line 2: /save needs the name of a file, as in /save talk.jsonl"),
        ("/save a.jsonl\n", "line 1: nothing has been said yet that could be saved"),
        ("one\n/save absent/a.jsonl\n", "line 2: [Errno 2] No such file or directory: 'absent/a.jsonl'"),
        (b"one\ntwo\n\xff\n", "line 3: what was read is not UTF-8 (byte 0xff); write it as UTF-8"),
        ('one\n"""two\nthree\n', 'line 4: the message that """ begins in line 2 has no end'),
    ],
)
def test_a_script_that_goes_wrong_ends_with_its_line(piped, tmp_path, monkeypatch, script, message) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, errors = piped(script)
    assert (status, errors) == (1, f"slothcore: error: {message}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--top-p 0.9", "--top-p has no effect without --temperature above 0; add it, or leave --top-p out"),
        ("--min-p 0.9", "--min-p has no effect without --temperature above 0; add it, or leave --min-p out"),
        ("--temperature 1 --min-p 2", "min_p must lie in 0..1, got 2.0; None turns it off"),
        ("--temperature -1", "temperature must be 0 (greedy) or positive, got -1.0"),
        ("--max-new-tokens 0", "max_new_tokens must be at least 1, got 0"),
        ("--seed -1", "seed must lie in 0..2**63 - 1, got -1"),
        ("--system=", "--system is empty; write a message, or leave it out"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "generate --prompt a"])
def test_wrong_flags_are_said_before_the_model_is_opened(command, flags, message, capsys) -> None:
    if command != "chat" and "system" in flags:
        command, message = "generate --prompt a", None
        flags = "--system x"
    assert main([*command.split(), "--model", "./absent", *flags.split()]) == 2
    message = message or "--system has no effect without --chat; add it, or leave --system out"
    assert capsys.readouterr().err == f"slothcore: error: {message}\n"


def test_a_model_without_a_template_is_said_in_one_sentence(piped, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    status, output, errors = piped("one\n", which=folder)
    assert (status, output) == (0, as_lines(answers(folder, ["one"])))
    assert errors.startswith("slothcore: the model has no chat template, so it writes on from your text")
    assert errors.count("\n") == 1
    assert piped("one\n", "--system", "x", which=folder)[0] == 1
    status, output, errors = piped("one\n", "--system", "x", "--chat-template", "alpaca", which=folder)
    assert (status, errors) == (0, "")
    assert piped("one\n", "--chat-template", "alpacka")[2].startswith(
        "slothcore: error: unknown chat template 'alpacka' (did you mean alpaca?)"
    )


def test_a_conversation_at_a_terminal(model: Path, tmp_path: Path) -> None:
    """Ctrl-C stops an answer and what is being written, what goes wrong is said, and Ctrl-D leaves."""
    words = ["chat", "--model", str(model), "--device", "cpu", "--max-new-tokens", "25000"]
    with PseudoTerminal(words, cwd=tmp_path) as terminal:
        terminal.expect("/help lists what else can be said, Ctrl-D leaves")
        terminal.expect("> ")
        terminal.send("tell me\r")
        terminal.expect("tell me\r\n")
        terminal.expect("\ufffd")  # an untrained model writes such bytes all the time
        terminal.send(CTRL_C)
        terminal.expect("stopped; what was said so far counts as the answer")
        terminal.expect("> ")
        terminal.send("half a mess")
        terminal.expect("half a mess")
        terminal.send(CTRL_C)
        terminal.expect("Ctrl-D leaves")
        terminal.expect("> ")
        terminal.send("/foo\r")
        terminal.expect("slothcore: there is no command /foo")
        terminal.expect("> ")
        terminal.send("/save talk.jsonl\r")
        terminal.expect("saved to talk.jsonl")
        terminal.expect("> ")
        # The arrow fetches back what was written before.
        terminal.send("\x1b[A\x1b[A\r")
        terminal.expect("there is no command /foo")
        terminal.expect("> ")
        terminal.send('"""first\r')
        terminal.expect(". ")
        terminal.send("second")
        terminal.expect("second")
        terminal.send(CTRL_C)
        terminal.expect("> ")
        terminal.send("/help\r")
        for name in ("/help", "/reset", "/system", "/save", "/quit", '"""', "Ctrl-C"):
            terminal.expect(name)
        terminal.expect("> ")
        terminal.send(CTRL_D)
        assert terminal.finish() == 0
    (row,) = slothcore.load_dataset(tmp_path / "talk.jsonl")
    question, answer = row["messages"]
    assert question["content"] == "tell me"
    assert 0 < len(answer["content"]) < 25_000


def test_ctrl_c_ends_a_script(model: Path) -> None:
    """Questions that come from a pipe: the terminal belongs to whoever began it, not to the conversation."""
    code = (
        "import io, os, signal, sys; from slothcore.cli import main; "
        "from slothcore.inference.chat import Chat; ask = Chat.ask\n"
        "def interrupted(self, text): os.kill(os.getpid(), signal.SIGINT); yield from ask(self, text)\n"
        "Chat.ask = interrupted; sys.stdin = io.TextIOWrapper(io.BytesIO(b'one\\ntwo\\n')); "
        f"sys.exit(main(['chat', '--model', {str(model)!r}, '--device', 'cpu']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert done.stderr == "slothcore: interrupted\n"
