"""--adapter: an adapter on a base that is named, for example because it lies elsewhere than the adapter says."""

import io
import sys
from pathlib import Path

import pytest

import slothcore
from slothcore.cli import main
from tests.training.tiny import write_model


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter, whose base was called `old` when it was saved, and is called `base` now."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "old")
    model, _ = slothcore.load("old", bits=32, device="cpu")
    slothcore.add_lora(model, r=4, init_lora_weights=False)
    slothcore.save_adapter(model, "adapter")
    return tmp_path


def said(words: str, capsys: pytest.CaptureFixture[str], *, status: int = 0) -> str:
    """What a command says: its answer, or its error."""
    capsys.readouterr()
    assert main(words.split()) == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


def test_an_adapter_is_put_on_the_base_that_is_named(
    moved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--bits 32 --device cpu"
    asked = f"{flags} --prompt Add --max-new-tokens 8"
    trained, plain = said(f"generate --model adapter {asked}", capsys), said(f"generate --model old {asked}", capsys)
    assert trained != plain
    assert said(f"merge --model adapter {flags} --dtype float32 --output-dir before", capsys) == "saved before\n"
    (moved / "old").rename(moved / "base")
    error = said(f"generate --model adapter {asked}", capsys, status=1)
    assert error.startswith("slothcore: error: the base model of the adapter adapter cannot be had: ")
    assert error.count("\n") == 1

    assert said(f"generate --model base --adapter adapter {asked}", capsys) == trained
    assert said(f"merge --model base --adapter adapter {flags} --dtype float32 --output-dir after", capsys)
    before, after = (Path(name, "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    assert said(f"export --format adapter --model base --adapter adapter {flags} --output-dir again", capsys)
    assert said(f"generate --model again {asked}", capsys) == trained
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Add\n")))
    assert said(f"chat --model base --adapter adapter {flags} --max-new-tokens 8", capsys) == trained


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--model old --adapter=", 2, "--adapter is empty; give a value, or leave it out"),
        ("--model old --adapter absent", 1, "absent"),
        ("--model adapter --adapter adapter", 1, "adapter is no base model, so the adapter adapter cannot be put on"),
        ("--model old --adapter old", 1, "old is a whole model and no adapter; give it as the model"),
        ("--model old --lora adapter", 2, "unknown option 'lora' in the flags; did you mean 'adapter'?"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    moved: Path, words: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("generate --prompt a", "chat", "merge --output-dir out"):
        error = said(f"{command} {words}", capsys, status=status)
        assert error.startswith("slothcore: error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not (moved / "out").exists()
