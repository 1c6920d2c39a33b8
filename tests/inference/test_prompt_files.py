"""Files of prompts: each row is answered as alone, in order, and what was cut short goes on where it was."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slothcore
from slothcore.cli import main
from slothcore.data.formats import alpaca_prompt
from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.endings import Endings
from slothcore.inference.generate import generate
from slothcore.inference.prompt_files import answer_rows, read_prompts
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from slothcore.models.sampling import Sampling
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer
from tests.inference.test_chat import CONFIG
from tests.training.tiny import write_model

RECORDS: list[dict[str, Any]] = [
    {"id": "first", "prompt": "the cat"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "who?"}]},
    {"instruction": "Add.", "input": "1, 2", "answer": 3},
    {"instruction": "Sing.", "tags": ["a", None]},
    *({"prompt": f"number {i} of them, \u2028 and so on: 我们"} for i in range(12)),
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "sampling": Sampling(temperature=1.0), "seed": 5}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Decoder, Tokenizer]:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer", config={"chat_template": CHATML}))
    torch.manual_seed(5)
    return from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, device="cpu").eval(), tokenizer


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def answered(pair: tuple[Decoder, Tokenizer], source: Path, output: Path, **options: Any) -> int:
    model, tokenizer = pair
    rows = read_prompts(source, tokenizer)
    return answer_rows(model, tokenizer, rows, output, endings=Endings.of(*pair, ()), **{**OPTIONS, **options})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_rows_of_every_kind_are_answered_as_alone(pair, tmp_path: Path) -> None:
    model, tokenizer = pair
    assert answered(pair, write(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl", batch_size=4) == 0
    lines = lines_of(tmp_path / "out.jsonl")
    added = ("generated", "finish_reason", "generated_tokens")
    assert [{name: value for name, value in line.items() if name not in added} for line in lines] == RECORDS
    for number, (record, line) in enumerate(zip(RECORDS, lines, strict=True)):
        special = "messages" not in record
        text = record.get("prompt") or alpaca_prompt(record.get("instruction", ""), record.get("input", ""))
        if not special:
            text = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True)
        options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5 + number}
        expected = generate(model, tokenizer, text, add_special_tokens=special, **options)
        assert line["generated"] == expected[0]
        assert (line["generated_tokens"] == 9) if line["finish_reason"] == "length" else line["generated_tokens"] <= 9
    assert len({line["generated"] for line in lines}) > 8


def test_prompts_can_be_what_a_user_says(pair, tmp_path: Path) -> None:
    _, tokenizer = pair
    source = write(tmp_path / "in.jsonl", RECORDS[:1])
    (row,) = read_prompts(source, tokenizer, chat=True, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert row.ids == tokenizer.encode_prompt(text, add_special_tokens=False)


@pytest.mark.parametrize("cut", ["between lines", "in a line", "in a character", "all", "nothing"])
def test_what_was_cut_short_goes_on(pair, tmp_path: Path, cut: str) -> None:
    source, output = write(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl"
    answered(pair, source, output)
    whole = output.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:7])
    place = {"between lines": len(kept), "in a line": len(kept) + 9, "all": 0, "nothing": len(whole)}
    place["in a character"] = len(kept) + whole[len(kept) :].index("我".encode()) + 1
    output.write_bytes(whole[: place[cut]])
    assert answered(pair, source, output) == {"all": 0, "nothing": len(RECORDS)}.get(cut, 7)
    assert output.read_bytes() == whole


def test_lines_are_written_as_rows_are_complete(pair, tmp_path: Path) -> None:
    """A run that is killed loses no more than what is under way."""
    source, output = write(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl"
    passes: list[int] = []

    def failing(*_: Any) -> None:
        passes.append(len(output.read_bytes().splitlines()))
        if len(passes) == 40:
            raise KeyboardInterrupt

    handle = pair[0].model.register_forward_pre_hook(failing)
    with pytest.raises(KeyboardInterrupt):
        answered(pair, source, output, batch_size=2)
    handle.remove()
    assert 0 < passes[20] < passes[-1] < len(RECORDS)
    assert len(lines_of(output)) == passes[-1]
    assert answered(pair, source, output, batch_size=3) == passes[-1]
    assert len(lines_of(output)) == len(RECORDS)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty; write one row on each line"),
        (["text"], "line 1: a row is an object"),
        ([RECORDS[0], {"text": "a"}], "line 2: a row has one of prompt, messages, instruction, got text"),
        ([{"prompt": "a", "instruction": "b"}], "got prompt, instruction"),
        ([{"prompt": 3}], "line 1: prompt must be a str, got int"),
        ([{"messages": "a"}], "messages must be a list, got str"),
        ([{"instruction": "a", "input": 3}], "input must be a str, got int"),
        ([{"prompt": "a", "generated": "b"}], "generated is what the answer is called; rename it"),
    ],
    ids=str,
)
def test_wrong_rows(pair, tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / "in.jsonl", records), pair[1])


def test_answers_of_other_prompts_are_left_alone(pair, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", RECORDS[:2]), tmp_path / "out.jsonl"
    for content in (b'{"prompt": "another"}\n', b"no JSON\n", b'{"id": "first", "prompt": "the cat"}\n'):
        output.write_bytes(content)
        with pytest.raises(ValueError, match=r"out\.jsonl, line \d is no answer to that row of the prompts"):
            answered(pair, source, output)
        assert output.read_bytes() == content


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    source = write(tmp_path / "in.jsonl", [{"prompt": "Add 1"}, {"prompt": "Add 2"}])
    output = tmp_path / "out.jsonl"
    flags = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--max-new-tokens", "4"]
    both = ["--prompts-file", str(source), "--output", str(output)]
    assert main([*flags, *both]) == 0
    assert capsys.readouterr().out == f"{output}: 2 rows, 2 of them new\n"
    assert main([*flags, *both]) == 0
    assert capsys.readouterr().out == f"{output}: 2 rows, 0 of them new; another --output has them answered anew\n"
    assert [line["generated_tokens"] for line in lines_of(output)] == [4, 4]
    for words, message in (
        (both[:2], "--output goes with a .jsonl file of prompts"),
        (["--prompts-file", "a.json"], "--prompts-file takes rows in a .jsonl file, or a text file with one prompt"),
        (["--prompts-file", "a.csv"], "got a.csv; write it as one of these"),
        (["--prompts-file", "a.jsonl.gz", *both[2:]], "got a.jsonl.gz; write it as one of these"),
        (["--prompt", "a", *both[2:]], "--output has no effect without --prompts-file"),
        (["--prompt", "a", *both], "give one of --prompt"),
        ([*both[:3], str(source)], "is the file of prompts; give it another name"),
        (["--prompt", "a", "--chat-template", "alpaca"], "--chat-template has no effect without --chat"),
        (["--instruction", "a", "--chat"], "--instruction has Alpaca's template and takes no --chat"),
    ):
        assert main([*flags, *words]) == 2
        assert message in capsys.readouterr().err


def test_rows_and_prompts_take_a_template_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    flags = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--max-new-tokens", "4"]
    model, tokenizer = slothcore.load(tmp_path / "model", device="cpu")
    tokenizer.use_chat_template("alpaca")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Add 1"}], add_generation_prompt=True)
    expected = generate(model, tokenizer, text, max_new_tokens=4, add_special_tokens=False)[0] + "\n"
    assert main([*flags, "--prompt", "Add 1", "--chat", "--chat-template", "alpaca"]) == 0
    assert capsys.readouterr().out == expected
    source = write(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "Add 1"}]}])
    both = ["--prompts-file", str(source), "--output", str(tmp_path / "out.jsonl")]
    assert main([*flags, *both]) == 1
    assert "has no chat template; set chat_template" in capsys.readouterr().err
    assert main([*flags, *both, "--chat-template", "alpaca"]) == 0
    assert [line["generated"] + "\n" for line in lines_of(tmp_path / "out.jsonl")] == [expected]
    assert main([*flags, *both, "--chat-template", "alpacka"]) == 2
    assert "(did you mean alpaca?)" in capsys.readouterr().err


def test_prompts_may_come_from_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    flags = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--max-new-tokens", "4"]
    assert main([*flags, "--prompt", "Add\u20281", "Add 2"]) == 0
    expected = capsys.readouterr().out

    def piped(content: bytes) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return main([*flags, "--prompts-file", "-"])

    assert piped("\ufeffAdd\u20281\r\n\n  \nAdd 2".encode()) == 0
    assert capsys.readouterr().out == expected
    for content, message in ((b"\n", "standard input is empty"), (b"a\n\xff", "standard input is not UTF-8")):
        assert piped(content) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert main([*flags, "--prompts-file", "-"]) == 1
    assert "standard input is empty" in capsys.readouterr().err
    rows = write(tmp_path / "in.jsonl", [{"prompt": "Add 1"}])
    both = ["--prompts-file", str(rows), "--output", str(tmp_path / "absent" / "out.jsonl")]
    assert main(["generate", "--model", "./absent", *both]) == 1
    assert "absent, which is no folder; make it" in capsys.readouterr().err
    assert main([*flags, *both[:3], str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.jsonl'}: 1 row, 1 of them new\n"
    assert main([*flags, "--prompts-file", str(tmp_path)]) == 1
    assert "is a folder; name a file in it" in capsys.readouterr().err
