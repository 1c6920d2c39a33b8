"""The adapter alone: what PEFT reads, in any dtype, with a card that names its base."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slothcore.cli import main
from slothcore.export.export import export_model
from slothcore.export.self_check import sample_ids, sample_logits
from slothcore.loading import load
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from tests.export.adapted_models import adapted
from tests.lora.reference import randomise_zero_factors


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


@pytest.mark.filterwarnings("ignore:the adapter names its base")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_that_fewer_bits_would_change(dtype: str, base: Path, tmp_path: Path) -> None:
    """What OLoRA took out of a base in NF4, rounded, leaves another one; in its own numbers it is exact."""
    model, _ = adapted(base, init_lora_weights="olora")
    with pytest.raises(
        ValueError, match=rf"other logits than the model \(.*, so it was not kept; leave the dtype {dtype}"
    ):
        export_model(model, None, tmp_path / "adapter", format="adapter", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    assert export_model(model, None, tmp_path / "adapter", format="adapter") == "read back on its base: the same logits"


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


@pytest.mark.filterwarnings("ignore:the adapter names its base")
@pytest.mark.parametrize("format", ["adapter", "gguf-adapter"])
def test_what_no_file_of_an_adapter_says_is_said(format: str, base: Path, tmp_path: Path) -> None:
    """RoPE scaled for the run: the same factors on the base as it was published are another model."""
    if format == "gguf-adapter":
        pytest.importorskip("gguf")
    with pytest.warns(UserWarning, match="takes the model from 128 positions to 256"):
        model, _ = load(base, bits=32, device="cpu", max_seq_length=256)
    randomise_zero_factors(add_lora(model, r=4))
    with pytest.warns(UserWarning, match=r"RoPE scaled \(linear, factor 2, 256 positions\), which its files have no"):
        export_model(model, None, tmp_path / "scaled", format=format)
    if format == "adapter":
        assert "RoPE scaled (linear, factor 2, 256 positions)" in (tmp_path / "scaled" / "README.md").read_text()
    plain, _ = adapted(base)
    with warnings.catch_warnings(record=True) as caught:
        export_model(plain, None, tmp_path / "plain", format=format)
    assert not [w for w in caught if "RoPE" in str(w.message)]


def test_an_exported_adapter_answers_as_the_run(run: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "adapter"
    assert main(f"export --model {run} --format adapter --output-dir {target} --device cpu".split()) == 0
    answers = []
    for model in (run, target):
        capsys.readouterr()
        assert main(f"generate --model {model} --prompt Add --max-new-tokens 8 --device cpu".split()) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
