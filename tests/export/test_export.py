"""Exports: complete and checked, or not there, whatever happens to the disk, the process or a single weight."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slothcore
from slothcore.cli import main
from slothcore.data.tokenizer import Tokenizer
from slothcore.export import merged
from slothcore.export.export import export_model
from slothcore.export.formats import FORMATS
from slothcore.export.self_check import sample_ids, sample_logits
from slothcore.loading import load
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.load import load_model
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer
from tests.lora.reference import randomise_zero_factors
from tests.models.zoo import FAMILIES_TINY, Variant, saved, tiny_model
from tests.training.tiny import write_model

ZOO = [variants[0] for variants in FAMILIES_TINY.values()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("export") / "base")


def adapted(base: Path, **options: Any) -> tuple[Any, Tokenizer | None]:
    """A model whose adapter has moved, and its tokenizer."""
    loading = {"bits": options.pop("bits", 4), "dtype": options.pop("dtype", None)}
    model, tokenizer = load(base, device="cpu", **loading)
    add_lora(model, **{"r": 4, **options})
    randomise_zero_factors(model)
    return model, tokenizer


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter, as good as a run's."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model, tokenizer = adapted(base)
    save_adapter(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*belong to no text model", "ignore:.*adapter", "ignore:.*no tokenizer.json")
@pytest.mark.parametrize("variant", ZOO, ids=str)
@pytest.mark.parametrize("bits", [32, 4])
def test_every_family_is_written_and_read_back(variant: Variant, bits: int, tmp_path: Path) -> None:
    """The self-check goes by the files alone, and by every family's names, norms, ties and experts."""
    source = saved(tiny_model(variant), tmp_path / "base")
    model, _ = adapted(Path(source), bits=bits)
    for dtype in FORMATS["merged"].dtypes:
        said = export_model(model, None, tmp_path / dtype, dtype=dtype)
        assert said.startswith("read back: the same logits; rounding to")
    again = load_model(tmp_path / "float32", bits=32, device="cpu")
    torch.testing.assert_close(sample_logits(again), sample_logits(model), rtol=1e-3, atol=1e-3)
    said = export_model(model, None, tmp_path / "nf4", format="merged-4bit")
    assert said.startswith("read back: the same logits; quantising what was merged")
    assert export_model(model, None, tmp_path / "adapter", format="adapter").startswith(
        "read back on its base: the same logits"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 32},
        {"bits": 4},
        {"use_rslora": True, "bias": "all"},
        {"bits": 32, "use_dora": True, "use_rslora": True},
        {"bits": 32, "modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]},
        {"bits": 32, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}, "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_an_adapter_alone_is_what_peft_reads(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    model, tokenizer = adapted(base, **options)
    with pytest.warns(UserWarning, match="names its base as .*, which no other machine finds"):
        said = export_model(model, tokenizer, tmp_path / "adapter", format="adapter")
    assert said == "read back on its base: the same logits"
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    save_adapter(model, tmp_path / "plain")
    ours, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "plain"))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    if options.get("bits") == 32:
        reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        reference = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        with torch.no_grad():
            expected = reference(sample_ids(model)[None]).logits[0]
        torch.testing.assert_close(sample_logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the adapter names its base")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_adapter_in_fewer_bits(dtype: str, base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base)
    said = export_model(model, None, tmp_path / "adapter", format="adapter", dtype=dtype)
    assert said.startswith("read back on its base: the same logits")
    assert {str(t.dtype) for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {
        f"torch.{dtype}"
    }


def test_the_card_of_an_adapter_names_a_base_on_the_hub(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base)
    model.lora_config = replace(model.lora_config, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    export_model(model, None, tmp_path / "public", format="adapter")
    card = (tmp_path / "public" / "README.md").read_text()
    assert card.startswith("---\nbase_model: meta-llama/Llama-3.2-1B\nlibrary_name: peft\n")
    assert "Rank 4, alpha 16." in card
    for private in ("/somewhere/else", "../base", "a/b/c"):
        model.lora_config = replace(model.lora_config, base_model_name_or_path=private)
        with pytest.warns(UserWarning, match="which no other machine finds"):
            export_model(model, None, tmp_path / private.replace("/", "_"), format="adapter")
        assert "base_model:" not in (tmp_path / private.replace("/", "_") / "README.md").read_text()


def test_merged_is_what_save_merged_writes(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer", config={"chat_template": CHATML}))
    model, _ = adapted(base)
    export_model(model, tokenizer, tmp_path / "exported")
    slothcore.save_merged(model, tokenizer, tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {file.name for file in (tmp_path / "exported").iterdir()} == names
    for name in names:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.parametrize("format", ["merged", "merged-4bit", "adapter"])
@pytest.mark.parametrize("damage", ["one number", "a name"])
@pytest.mark.filterwarnings("ignore:the adapter names its base")
def test_what_was_written_wrongly_is_not_kept(format, damage, base, tmp_path, monkeypatch) -> None:
    model, _ = adapted(base)
    writer = FORMATS[format].writer()
    write = writer.write

    def spoiling(model: Any, tokenizer: Any, folder: Path, dtype: str | None, **options: Any) -> None:
        write(model, tokenizer, folder, dtype, **options)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(("layers.1.mlp.up_proj.weight", "lora_B.weight")))
        if damage == "a name":
            tensors[f"{name}x"] = tensors.pop(name)
        else:
            # The least that a weight can be off by, in the merged model.
            row = tensors[name][3]
            row[-1] = row[-1] ^ 1 if format == "merged-4bit" else row[-1] * 1.02 if format == "merged" else 30.0
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(writer, "write", spoiling)
    with pytest.raises(
        ValueError, match=r"gives other logits than the model|lacks|must have \d+ bytes of codes, got 0"
    ):
        export_model(model, None, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_float16_cannot_hold(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base, bits=32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="are not finite in float16, so it was not kept; export it with --dtype bfl"):
        export_model(model, None, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export_model(model, None, tmp_path / "out", dtype="bfloat16")


def test_the_model_is_given_up_only_where_that_is_allowed(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base)
    with pytest.warns(UserWarning, match="names its base"):
        export_model(model, None, tmp_path / "a", format="adapter")
    assert model.device.type == "cpu"
    with pytest.warns(UserWarning, match="names its base"):
        export_model(model, None, tmp_path / "b", format="adapter", give_up_model=True)
    assert model.device.type == "meta"


@pytest.mark.parametrize("format", FORMATS)
def test_too_little_room_is_said_before_anything_is_written(format, base, tmp_path, monkeypatch) -> None:
    model, _ = adapted(base)
    need = FORMATS[format].writer().size(model, FORMATS[format].default_dtype)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need + 2**20))
    with pytest.raises(ValueError, match=r"will take 0\.00 GiB, and 0\.00 GiB are free there; free some space, or"):
        export_model(model, None, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the adapter names its base")
def test_the_size_is_that_of_the_files(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base, target_modules=["lm_head", "q_proj"])
    cases = [("merged", "bfloat16"), ("merged", "float32"), ("merged-4bit", "float16")]
    for format, dtype in (*cases, ("adapter", None), ("adapter", "float16")):
        folder = tmp_path / f"{format}-{dtype}"
        export_model(model, None, folder, format=format, dtype=dtype, check=False)
        (file,) = folder.glob("*.safetensors")
        stored = sum(tensor.nbytes for tensor in load_file(file).values())
        assert FORMATS[format].writer().size(model, dtype or FORMATS[format].default_dtype) == stored


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


def test_a_merge_into_the_originals(run: Path, base: Path, tmp_path: Path, capsys) -> None:
    """The run was trained beside NF4, and its adapter meets what that was made from."""
    words = f"merge --model {run} --device cpu --dtype float32 --base original --output-dir {tmp_path / 'merged'}"
    assert main(words.split()) == 0
    ours, _ = load(tmp_path / "merged", bits=32, device="cpu")
    expected, _ = load(run, bits=32, device="cpu")
    torch.testing.assert_close(sample_logits(ours), sample_logits(expected), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert main(f"export --model {run} --format adapter --base original --output-dir {tmp_path / 'out'}".split()) == 1
    assert "base original is of no use to the format adapter" in capsys.readouterr().err


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


def test_an_exported_adapter_answers_as_the_run(run: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "adapter"
    assert main(f"export --model {run} --format adapter --output-dir {target} --device cpu".split()) == 0
    answers = []
    for model in (run, target):
        capsys.readouterr()
        assert main(f"generate --model {model} --prompt Add --max-new-tokens 8 --device cpu".split()) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--format gif --output-dir out", 2, "argument --format: invalid choice: 'gif'"),
        ("--format Q4_K_M --output-dir out", 2, "is a dtype of a GGUF file; give --format gguf --dtype q4_k_m"),
        ("--format merged --dtype Q4_K_M --output-dir out", 2, "dtype must be one of bfloat16, float16, float32"),
        ("--output-dir out", 2, "the following arguments are required: --format"),
        ("--format merged --output-dir file", 1, "output_dir file is a file; choose a new folder"),
        ("--format merged --output-dir file/out", 1, "would lie in file, which is a file; choose a folder"),
        ("--format merged --chat-template alpacka --output-dir out", 1, "(did you mean alpaca?)"),
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


def test_formats_are_checked_by_name(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base)
    with pytest.raises(ValueError, match=r"format must be one of merged, merged-4bit, adapter.*, got 'gif'"):
        export_model(model, None, tmp_path / "out", format="gif")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32 for the format merged, got"):
        export_model(model, None, tmp_path / "out", dtype="int8")
    said = [export_model(model, None, tmp_path / name, dtype=name) for name in ("float16", "FLOAT16")]
    assert said[0] == said[1]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("float16", "FLOAT16")]
    assert files[0] == files[1]
    assert slothcore.export_model is export_model
    assert merged.require(model, "bfloat16") is None
