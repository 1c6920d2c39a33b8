"""What is wrong by itself ends with 2, before anything is looked for; what the world lacks ends with 1."""

from pathlib import Path

import pytest

from slothcore.cli import main

ABSENT = "--model ./absent"
# Commands as far as nothing is wrong with them but that there is no such model.
CALLS = {
    "train": f"train {ABSENT} --data rows.jsonl",
    "preview": f"preview {ABSENT} --data rows.jsonl",
    "plan": f"plan {ABSENT}",
    "generate": f"generate {ABSENT} --prompt x --chat",
    "generate rows": f"generate {ABSENT} --prompts-file rows.jsonl --output answers.jsonl",
    "chat": f"chat {ABSENT}",
    "serve": f"serve {ABSENT} --port 0",
    "export": f"export {ABSENT} --format merged --output-dir out",
    "merge": f"merge {ABSENT} --output-dir out",
}
EVERYWHERE = {
    "--chat-template chatlm": "unknown chat template 'chatlm' (did you mean chatml?)",
    "--device gpu": "device 'gpu' does not exist; use 'cpu' or 'cuda'",
    "--device meta": "device 'meta' does not exist",
    "--device cuda:": "device 'cuda:' does not exist",
    "--model=": "empty",
    "--revision=": "empty",
    "--token=": "empty",
}
OF_A_RUN = {
    "--dtype float16 --bits 32": "dtype float16 does not go with bits=32",
    "--format gif": "unknown record format 'gif'; known are auto, ",
    "--completion-template {": "completion_template '{' is not valid: ",
    "--completion-template x": "completion_template 'x' names no column",
    "--prompt-template {a --completion-template {b}": "prompt_template '{a' is not valid: ",
    "--text-field=": "text_field must not be empty",
    "--max-seq-length 1": "max_seq_length must be at least 2, got 1: nothing predicts the first token",
    "--layers-to-transform 0 -1": "layers_to_transform counts layers from 0, got -1",
    '--rope-scaling {"rope_type":"longer"}': "rope_scaling's rope_type must be one of linear, ",
    '--rope-scaling {"rope_type":"yarn","factor":0.5}': "rope_scaling's factor must be a number above 1, got 0.5",
    '--rope-scaling {"factor":2}': "rope_scaling needs a rope_type beside 'factor'",
}
OF_ONE = {
    "train --data rows.jsonl": "model is not set; give --model NAME_OR_FOLDER",
    "train rows.jsonl": "rows.jsonl is no file of options; give data as --data rows.jsonl",
    "preview ROWS.CSV": "ROWS.CSV is no file of options; give data as --data ROWS.CSV",
    "plan .": "the folder . has no config.yaml, so it is no run; give a model as --model .",
    f"train {ABSENT}": "data is not set; give --data FILE",
    f"preview {ABSENT}": "data is not set; give --data FILE",
    f"{CALLS['train']} --eval-steps 5": "eval_steps is 5, but there is no evaluation data",
    f"{CALLS['train']} --eval-on-start": "eval_on_start is true, but there is no evaluation data",
    f"{CALLS['plan']} --gpu nan": "--gpu must be a number of GiB greater than 0, got nan",
    f"{CALLS['serve']} --host=": "--host is empty",
    f"export {ABSENT} --format gguf-adapter --base original --output-dir out": "of no use to the format gguf-adapter",
    f"export {ABSENT} --format gguf --push a/b/c": "a repository on the Hub is named owner/name, got 'a/b/c'",
    f"merge {ABSENT} --push a/b/c": "a repository on the Hub is named owner/name, got 'a/b/c'",
}
WRONG = {
    **{f"{call} {flags}": said for call in CALLS.values() for flags, said in EVERYWHERE.items()},
    **{f"{CALLS[name]} {flags}": said for name in ("train", "preview", "plan") for flags, said in OF_A_RUN.items()},
    **OF_ONE,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "empty.jinja").write_text("")
    (tmp_path / "plain").write_text("{{ messages[0].content }}")
    return tmp_path


def status_of(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status, and the one line that says why."""
    capsys.readouterr()
    status, errors = main(words.split()), capsys.readouterr().err
    assert errors.startswith("slothcore: error: ")
    assert errors.count("\n") == 1
    return status, errors


@pytest.mark.parametrize("words", WRONG)
def test_a_call_that_cannot_be_meant_so(words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, errors = status_of(words, capsys)
    assert (status, WRONG[words] in errors) == (2, True), errors
    assert sorted(path.name for path in here.iterdir()) == ["empty.jinja", "plain", "rows.jsonl"]


@pytest.mark.parametrize("call", CALLS.values())
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "absent"),
        ("--chat-template none.jinja", "none.jinja does not exist"),
        ("--chat-template empty.jinja", "empty.jinja is empty"),
        ("--chat-template plain", "absent"),
    ],
)
def test_what_is_not_there(call: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if flags.endswith(".jinja") and call.startswith(("plan", "preview")):
        message = "absent"  # they read no template before the model's own files
    status, errors = status_of(f"{call} {flags}", capsys)
    assert (status, message in errors) == (1, True), errors
