"""GGUF files by what they hold: their numbers, keys and sizes, what is refused, and what a wrong one is met with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from gguf import GGUFReader

from slothcore.cli import main
from slothcore.data.tokenizer import Tokenizer
from slothcore.export import gguf, gguf_file
from slothcore.export.export import export_model
from slothcore.export.formats import FORMATS
from slothcore.export.gguf_architecture import architecture
from slothcore.export.gguf_architecture import metadata as architecture_keys
from slothcore.export.gguf_tokenizer import metadata
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config, load_model
from tests.data.tiny_tokenizers import write_byte_tokenizer
from tests.export.gguf_models import CASES, FAMILIES, Case, adapted, byte_level_tokenizer, load_case
from tests.export.gguf_models import sentencepiece_tokenizer as sentencepiece
from tests.models.zoo import FAMILIES_TINY
from tests.training.tiny import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore:llama.cpp", "ignore:.*belong to no text model", "ignore:.*tokenizer")
LLAMA = FAMILIES["llama"]
DTYPES = FORMATS["gguf"].dtypes


def keys(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("case", FAMILIES.values(), ids=str)
def test_every_family_is_written_and_read_back(case: Case, bits: int, tmp_path: Path) -> None:
    """And the size that was promised is that of the tensors."""
    model = adapted(load_case(case, tmp_path / "base", bits=bits))
    for dtype in DTYPES:
        said = export_model(model, None, tmp_path / dtype, format="gguf", dtype=dtype)
        assert said.startswith(f"read back: the same weights; rounding to {dtype} moved the logits by ")
        reader = GGUFReader(tmp_path / dtype / f"model-{dtype.upper()}.gguf")
        assert gguf.size(model, dtype) == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert "moved the logits by 0.0%" in export_model(model, None, tmp_path / "again", format="gguf", dtype="f32")


def test_the_original_base_is_merged_as_in_a_folder(tmp_path: Path) -> None:
    """NF4 weights stay out of the file with base="original"."""
    model = adapted(load_case(LLAMA, tmp_path / "base", bits=4))
    own = load_case(LLAMA, tmp_path / "base")
    files = {}
    for base in ("loaded", "original"):
        options: dict[str, Any] = {"format": "gguf", "dtype": "f32", "base": base}
        said = export_model(model, None, tmp_path / base, **options)
        assert said.endswith("rounding to f32 moved the logits by 0.0% of their spread")
        reader = GGUFReader(tmp_path / base / "model-F32.gguf")
        files[base] = {str(tensor.name): np.array(tensor.data) for tensor in reader.tensors}
    layer, lora = own.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    expected = (layer.weight + lora.delta_weight()).detach().numpy()
    np.testing.assert_allclose(files["original"]["blk.0.ffn_up.weight"], expected, rtol=1e-6, atol=1e-7)
    assert np.abs(files["loaded"]["blk.0.ffn_up.weight"] - expected).max() > 1e-3


def test_the_keys_of_a_model_and_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    model = load_case(LLAMA, tmp_path / "base")
    model.name_or_path = "somebody/Little-Llama"
    model.generation_config = {"do_sample": True, "temperature": 0.5, "top_k": 20}
    export_model(model, tokenizer, tmp_path / "out", format="gguf", dtype="q4_k_m")
    found = keys(tmp_path / "out" / "model-Q4_K_M.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Little-Llama",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "llama.vocab_size": 320,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {name: found[name] for name in expected} == expected
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert [tokens[index] for index in (0, 1, 4, 319)] == ["<unk>", "<s>", "<|im_end|>", "[PAD319]"]
    assert [types[index] for index in (0, 1, 4, 5, 319)] == [3, 3, 3, 1, 5]
    assert len(tokens) == len(types) == 320
    assert found["tokenizer.ggml.merges"][:2] == ["t h", "t he"]


def test_the_windows_of_a_gemma_2(tmp_path: Path) -> None:
    """llama.cpp gives it windows of 4096 tokens where the file names none: one as long as any text stands for none."""
    found = {}
    for name in ("windows-and-caps", "no-windows"):
        case = next(case for case in CASES if case.name == name)
        config = load_case(case, tmp_path / name).config
        found[name] = architecture_keys(config, architecture(config, tied=True))
    assert found["windows-and-caps"]["gemma2.attention.sliding_window"] == 7
    assert found["windows-and-caps"]["gemma2.attention.sliding_window_pattern"] == 2
    assert found["no-windows"]["gemma2.attention.sliding_window"] == 256


def test_the_keys_of_sentencepiece(tmp_path: Path) -> None:
    """A piece's score is minus the place of its first merge; bytes and the unknown token have types of their own."""
    found = metadata(sentencepiece(tmp_path), 320)
    tokens: Any = found["tokenizer.ggml.tokens"]
    types: Any = found["tokenizer.ggml.token_type"]
    scores: Any = found["tokenizer.ggml.scores"]
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.unknown_token_id"] == 0
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert (types[0], types[tokens.index("<0x41>")], types[tokens.index("th")]) == (2, 6, 1)
    assert scores[tokens.index("th")] == 0.0
    assert scores[tokens.index("the")] == -1.0
    assert scores[tokens.index("in")] == -3.0


def refused(case: str, index: int, **changes: Any) -> Callable[[Path], Decoder]:
    variant = FAMILIES_TINY[case][index]
    options = {**variant.options, "vocab_size": 320, **changes}
    # `Case` ties every Gemma's head, unless told otherwise.
    tied = {"tie_word_embeddings": options.get("tie_word_embeddings", False)}
    return lambda folder: load_case(replace(LLAMA, base=replace(variant, options=options), changes=tied), folder)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (refused("qwen3", 1), "o bias"),
        (refused("qwen3_moe", 0), "dense layers between the sparse ones"),
        (refused("qwen3_moe", 0, mlp_only_layers=[]), "experts whose weights are not normalised"),
        (refused("gemma", 1), "head of its own beside the embedding"),
        (refused("llama", 0, hidden_act="gelu_pytorch_tanh"), "activation gelu_pytorch_tanh"),
        (refused("qwen2", 0, rope_parameters={**CASES[1].changes["rope_parameters"]}), "RoPE of the type llama3"),
        (refused("gemma2", 1, attention_bias=False, tie_word_embeddings=True), "windows of one size in all layers but"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(make, what: str, tmp_path: Path) -> None:
    model = make(tmp_path / "base")
    with pytest.raises(ValueError, match=rf"{what}.*export it with the format merged"):
        export_model(model, None, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def tokenizer_with(folder: Path, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    import json

    file = sentencepiece(folder)._folder / "tokenizer.json"
    source = json.loads(file.read_text())
    change(source)
    file.write_text(json.dumps(source))
    return Tokenizer.from_folder(folder)


def drop_a_merge(source: dict[str, Any]) -> None:
    source["model"]["merges"].remove(["t", "he"])


def test_a_tokenizer_that_would_give_other_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuts text into words as this one does"):
        metadata(Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "uncut")), 320)
    with pytest.raises(ValueError, match="would join pieces that this tokenizer does not join, such as those of 'the'"):
        metadata(tokenizer_with(tmp_path / "merges", drop_a_merge), 320)


def test_long_texts_that_differ_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"computes this architecture \(llama\) without its window of 7 tokens"):
        export_model(load_case(FAMILIES["mistral"], tmp_path / "a"), None, tmp_path / "window", format="gguf")
    dynamic = next(case for case in CASES if case.name == "dynamic-rope")
    with pytest.warns(UserWarning, match="no RoPE of the type dynamic: the file is for texts of up to 32 tokens"):
        export_model(load_case(dynamic, tmp_path / "b"), None, tmp_path / "dynamic", format="gguf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("damage", ["numbers", "another layer's", "a name"])
def test_what_was_written_wrongly_is_not_kept(damage: str, dtype: str, tmp_path: Path, monkeypatch) -> None:
    """Wrong numbers in one matrix, two layers that have changed places, and a tensor under another name."""
    model = load_case(LLAMA, tmp_path / "base")
    write_file = gguf_file.write_file

    def spoiled(file: Path, architecture: str, values: Any, entries: Any, parts: Any) -> None:
        if damage == "a name":
            entries = [replace(e, name=e.name.replace("blk.1.ffn_up", "blk.1.ffn_upx")) for e in entries]
            parts = ((name.replace("blk.1.ffn_up", "blk.1.ffn_upx"), index, data) for name, index, data in parts)
        elif damage == "another layer's":
            swap = {"blk.0.attn_v.weight": "blk.1.attn_v.weight", "blk.1.attn_v.weight": "blk.0.attn_v.weight"}
            parts = ((swap.get(name, name), index, data) for name, index, data in parts)
        write_file(file, architecture, values, entries, parts)
        if damage == "numbers":
            place = next(t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight").data_offset
            with file.open("r+b") as opened:
                opened.seek(place)
                opened.write(np.full(4, 1.5, np.float16 if dtype not in ("f32", "bf16") else np.float32).tobytes())

    monkeypatch.setattr(gguf, "write_file", spoiled)
    with pytest.raises(ValueError, match=r"is not what the model has|lacks|are not finite"):
        export_model(model, None, tmp_path / "out", format="gguf", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_numbers_that_a_dtype_cannot_hold(tmp_path: Path) -> None:
    model = load_case(LLAMA, tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight cannot be written: .*F16"):
        export_model(model, None, tmp_path / "out", format="gguf", dtype="f16")
    assert not (tmp_path / "out").exists()
    export_model(model, None, tmp_path / "out", format="gguf", dtype="bf16")


def test_without_the_package_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"install it with: pip install 'slothcore\[gguf\]'"):
        export_model(from_config(CONFIG, device="cpu"), None, tmp_path / "out", format="gguf")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 4])
def test_on_a_gpu(bits: int, tmp_path: Path) -> None:
    """What is on the GPU is merged, quantised and compared there."""
    load_case(LLAMA, tmp_path / "base")
    model = adapted(load_model(tmp_path / "base", bits=bits, device="cuda", progress=False))
    for dtype in DTYPES:
        said = export_model(model, None, tmp_path / dtype, format="gguf", dtype=dtype)
        assert said.startswith("read back: the same weights")
    said = export_model(model, None, tmp_path / "adapter", format="gguf-adapter")
    assert said.startswith("read back in the place of the model's own: the same logits")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_case(LLAMA, tmp_path / "base")
    byte_level_tokenizer(tmp_path / "base")
    words = ["export", "--model", str(tmp_path / "base"), "--format", "gguf", "--dtype", "q4_k_m", "--device", "cpu"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model-Q4_K_M.gguf"]
    assert "read back: the same weights; rounding to q4_k_m moved the logits by" in capsys.readouterr().err
