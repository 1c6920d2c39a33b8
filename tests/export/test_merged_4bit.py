"""save_merged(bits=4): the folder that transformers + bitsandbytes would have saved, and loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slothcore.export.export import export_model
from slothcore.export.merged import save_merged
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from slothcore.models.prequantized import STATE
from tests.lora.reference import randomise_zero_factors
from tests.models.bitsandbytes_models import CONFIGS, WHOLE_BLOCKS, quantized
from tests.models.tiny import token_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dense(folder: Path, family: str = "llama") -> Path:
    """A tiny model of large random weights, as transformers saves it."""
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.2, generator=generator)
            if "norm" in name:
                weight += 1.0
    model.save_pretrained(folder)
    return folder


def adapted(folder: Path, *, bits: int = 4, **options: Any) -> Decoder:
    model = load_model(folder, bits=bits, dtype=torch.float32, device="cpu")
    randomise_zero_factors(add_lora(model, **{"r": 4, **options}))
    return model


def through_transformers(folder: Path) -> Any:
    """In training mode, or bitsandbytes would repack its weights for the CPU's matrix instructions."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32, attn_implementation="eager"
    )
    return model.train()


@pytest.mark.parametrize("family", list(CONFIGS))
def test_transformers_loads_every_family(family: str, tmp_path: Path) -> None:
    """With the logits of slothcore's own reading; that reading keeps every bit."""
    model = adapted(dense(tmp_path / "base", family))
    said = export_model(model, None, tmp_path / "out", format="merged-4bit", dtype="float32")
    assert said.startswith("read back: the same logits; quantising what was merged moved them by")
    again = load_model(tmp_path / "out", bits=4, dtype=torch.float32, device="cpu")
    for path, module in again.named_modules():
        if isinstance(module, Linear | ExpertLinear):
            assert module.is_nf4 == (path != "lm_head" and "experts" not in path), path
    reference = through_transformers(tmp_path / "out")
    ids = token_ids(2, 30)
    with torch.no_grad():
        assert (reference(ids).logits - again(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["loaded", "original"])
def test_codes_are_those_of_the_merged_model_quantised(base: str, dtype: str, tmp_path: Path) -> None:
    """bitsandbytes quantises what save_merged writes to the same bytes, and transformers finds the same state."""
    model = adapted(dense(tmp_path / "base"))
    save_merged(model, None, tmp_path / "dense", DTYPES[dtype], base=base)
    save_merged(model, None, tmp_path / "nf4", DTYPES[dtype], bits=4, base=base, max_shard_bytes=30_000)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    found = {n: t for file in (tmp_path / "nf4").glob("*.safetensors") for n, t in load_file(file).items()}
    quantised = {name.removesuffix(f".{STATE}") for name in found if name.endswith(STATE)}
    assert len(quantised) == 14
    for name, weight in weights.items():
        if name not in quantised:
            assert torch.equal(found[name], weight)
            continue
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        expected = state.as_dict(packed=True)
        assert torch.equal(found[name], packed)
        for part, value in expected.items():
            mine = found[f"{name}.{part}"]
            if part == STATE:
                mine, value = (json.loads(bytes(tensor.tolist())) for tensor in (mine, value))
                assert mine.pop("nested_offset") == pytest.approx(value.pop("nested_offset"), rel=1e-6)
                assert mine == value
            else:
                torch.testing.assert_close(mine, value, rtol=1e-6, atol=0)
    assert quantised | weights.keys() == weights.keys()


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_no_adapter_touches_keeps_its_bits(double_quant: bool, tmp_path: Path) -> None:
    """Of a folder that others quantised, with and without double quantisation, and of one quantised here."""
    quantized(tmp_path / "base", dtype=torch.bfloat16, bnb_4bit_use_double_quant=double_quant)
    model = adapted(tmp_path / "base", target_modules=["q_proj"])
    save_merged(model, None, tmp_path / "out", bits=4)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert {name for name in before if "q_proj" not in name} == {name for name in after if "q_proj" not in name}
    for name, tensor in before.items():
        if name.endswith(STATE):
            mine, theirs = (json.loads(bytes(state[name].tolist())) for state in (after, before))
            assert mine == theirs or "q_proj" in name
        elif "q_proj" not in name:
            assert torch.equal(after[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is True
    through_transformers(tmp_path / "out")


def test_a_dense_model_is_quantised(tmp_path: Path) -> None:
    """As transformers quantises it on the way in; with the configuration that it writes."""
    base = dense(tmp_path / "base")
    save_merged(load_model(base, bits=32, device="cpu"), None, tmp_path / "out", torch.float32, bits=4)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    reference = AutoModelForCausalLM.from_pretrained(
        base, device_map="cpu", dtype=torch.float32, quantization_config=settings
    )
    reference.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape or name.endswith(STATE)
        if not name.endswith((STATE, "absmax")):
            assert torch.equal(ours[name], tensor), name
    configs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs"))
    mine, expected = (config["quantization_config"] for config in configs)
    assert mine == expected


def test_layers_that_their_publisher_left_dense_stay_so(tmp_path: Path) -> None:
    """And the configuration says which, or transformers would look for their codes."""
    quantized(tmp_path / "base", llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.up_proj"])
    model = adapted(tmp_path / "base", target_modules=["up_proj"])
    save_merged(model, None, tmp_path / "out", torch.float32, bits=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    again = load_model(tmp_path / "out", bits=4, dtype=torch.float32, device="cpu")
    assert not again.model.layers[1].mlp.up_proj.is_nf4
    assert again.model.layers[0].mlp.up_proj.is_nf4
    ids = token_ids(1, 20)
    with torch.no_grad():
        assert (through_transformers(tmp_path / "out")(ids).logits - again(ids).logits).abs().max() < 1e-4


def test_it_is_a_quarter_of_the_size(tmp_path: Path) -> None:
    model = adapted(dense(tmp_path / "base"))
    assert WHOLE_BLOCKS["hidden_size"] == 64
    save_merged(model, None, tmp_path / "nf4", bits=4)
    save_merged(model, None, tmp_path / "dense")
    sizes = {}
    for name in ("nf4", "dense"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        sizes[name] = sum(tensor.nbytes for key, tensor in tensors.items() if "_proj.weight" in key)
    # The tables of the codes and the state, of which each small weight has its own, weigh much here.
    tables = 14 * (64 + 1024 + 256)
    assert sizes["nf4"] < 0.27 * sizes["dense"] + tables


def test_refusals(tmp_path: Path) -> None:
    model = adapted(dense(tmp_path / "base"))
    for bits in (8, 16):
        with pytest.raises(ValueError, match=f"bits must be 4, or None for dense weights, .*; got {bits}"):
            save_merged(model, None, tmp_path / "out", bits=bits)
    assert not (tmp_path / "out").exists()
