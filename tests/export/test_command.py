"""`slothcore export` and `slothcore merge`: what they write, say and refuse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slothcore
from slothcore.cli import main
from slothcore.export.formats import FORMATS
from slothcore.export.self_check import sample_logits
from slothcore.loading import load


@pytest.mark.parametrize("command", ["merge", "export --format merged"])
def test_merge_is_short_for_an_export(command: str, run: Path, base: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "merged"
    words = f"{command} --model {run} --device cpu --dtype float32 --output-dir {target}"
    assert main(words.split()) == 0
    out, err = capsys.readouterr()
    assert out == f"saved {target}\n"
    assert err == "slothcore: read back: the same logits; rounding to float32 moved them by 0.0% of their spread\n"
    ours, _ = load(target, bits=32, device="cpu")
    theirs, _ = load(run, bits=4, device="cpu")
    torch.testing.assert_close(sample_logits(ours), sample_logits(theirs), rtol=1e-4, atol=1e-4)
    assert main(words.split()) == 1
    assert "exists and is not empty; choose a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_model_keeps_its_weights(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Nothing has asked for 4 bits, which are the default beside an adapter."""
    model, tokenizer = load(base, bits=32, device="cpu")
    plain, target = tmp_path / "plain", tmp_path / "merged"
    slothcore.save_merged(model, tokenizer, plain, dtype=dtype)
    words = f"export --format merged --dtype float32 --model {plain} --device cpu --output-dir"
    assert main([*words.split(), str(target)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, target))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.float(), after[name]) for name, tensor in before.items())
    assert main([*words.split(), str(tmp_path / "rounded"), "--bits", "4"]) == 0
    rounded = load_file(tmp_path / "rounded" / "model.safetensors")
    assert any(not torch.equal(tensor.float(), rounded[name]) for name, tensor in before.items())


def test_a_merge_into_the_originals(run: Path, base: Path, tmp_path: Path, capsys) -> None:
    """The run was trained beside NF4, and its adapter meets what that was made from."""
    words = f"merge --model {run} --device cpu --dtype float32 --base original --output-dir {tmp_path / 'merged'}"
    assert main(words.split()) == 0
    ours, _ = load(tmp_path / "merged", bits=32, device="cpu")
    expected, _ = load(run, bits=32, device="cpu")
    torch.testing.assert_close(sample_logits(ours), sample_logits(expected), rtol=1e-4, atol=1e-4)


def test_an_export_takes_a_template_for_a_run_that_has_none(run: Path, tmp_path: Path, capsys) -> None:
    words = f"--model {run} --device cpu --chat-template alpaca --output-dir {tmp_path}"
    assert main(f"merge {words}/merged".split()) == 0
    assert main(f"export --format ollama {words}/ollama".split()) == 0
    assert "Ollama gives the model texts as they are" not in capsys.readouterr().err
    assert "### Response:" in (tmp_path / "ollama" / "Modelfile").read_text()
    asked = f"generate --model {tmp_path}/merged --device cpu --max-new-tokens 6".split()
    answers = []
    for flags in ([], ["--chat-template", "alpaca"], ["--chat-template", "chatml"]):
        assert main([*asked, "--chat", "--prompt", "Add 1", *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--format gif --output-dir out", 2, "argument --format: invalid choice: 'gif'"),
        ("--format Q4_K_M --output-dir out", 2, "is a dtype of a GGUF file; give --format gguf --dtype q4_k_m"),
        ("--format merged --dtype Q4_K_M --output-dir out", 2, "dtype must be one of bfloat16, float16, float32"),
        ("--output-dir out", 2, "the following arguments are required: --format"),
        ("--format merged --output-dir file", 1, "output_dir file is a file; choose a new folder"),
        ("--format merged --output-dir file/out", 1, "would lie in file, which is a file; choose a folder"),
        ("--format merged --chat-template alpacka --output-dir out", 2, "(did you mean alpaca?)"),
        ("--format merged --chat-template none.jinja --output-dir out", 1, "none.jinja does not exist"),
        ("--format adapter --base original --output-dir out", 2, "base original is of no use to the format adapter"),
        ("--format merged --push a/b/c", 2, "a repository on the Hub is named owner/name, got 'a/b/c'"),
        ("--format merged --device tpu --output-dir out", 2, "device 'tpu' does not exist; use 'cpu' or 'cuda'"),
        ("--format adapter --output-dir out", 1, "has no LoRA adapter; export it with the format merged"),
    ],
)
def test_wrong_calls_write_nothing(words, status, message, base, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["export", "--model", str(base), "--device", "cpu", *words.split()]) == status
    error = capsys.readouterr().err
    assert error.startswith("slothcore: error: ")
    assert message in error.replace(str(tmp_path) + "/", "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_guide_names_every_format() -> None:
    text = (Path(slothcore.__file__).parents[1] / "docs" / "exporting.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}` | " in text for name in FORMATS)
