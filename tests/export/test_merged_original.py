"""base="original": an adapter trained beside NF4 weights, folded into what these were quantised from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import slothcore
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.export import export_model
from slothcore.export.merged import save_merged
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.merge import merged_weight
from slothcore.models.checkpoint import stored_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from slothcore.models.reading import read_bytes
from tests.data.tiny_tokenizers import write_byte_tokenizer
from tests.lora.reference import logits_of, make_batch, randomise_zero_factors, reference_logits, write_tiny_llama
from tests.models.bitsandbytes_models import quantized
from tests.models.zoo import FAMILIES_TINY, Variant, saved, tiny_model

ZOO = [variants[0] for variants in FAMILIES_TINY.values()]
FEW = {"target_modules": ["o_proj", "down_proj"]}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all linears": ({}, {"use_rslora": True}),
    "tied head": ({"tie_word_embeddings": True}, FEW),
    "tied head adapted": ({"tie_word_embeddings": True}, {"target_modules": ["lm_head", "up_proj"]}),
    "tied head trained": ({"tie_word_embeddings": True}, {**FEW, "modules_to_save": ["lm_head"]}),
    "DoRA": ({"attention_bias": True}, {"use_dora": True}),
    "biases and norms": (
        {"attention_bias": True, "mlp_bias": True},
        {**FEW, "bias": "lora_only", "modules_to_save": ["norm"]},
    ),
    "ranks by pattern": ({}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
}


def trained(folder: Path, **options: Any) -> Decoder:
    """A model in NF4 whose adapter, and whatever else trains, has moved."""
    model = load_model(folder, bits=4, dtype=torch.float32, device="cpu")
    add_lora(model, **{"r": 4, "lora_alpha": 8, **options})
    randomise_zero_factors(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def on_originals(model: Decoder, folder: Path, scratch: Path) -> Decoder:
    """The same adapter on the base as its folder holds it."""
    save_adapter(model, scratch)
    return load_adapter(load_model(folder, bits=32, device="cpu"), scratch)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.filterwarnings("ignore:.*belong to no text model")
@pytest.mark.parametrize("variant", ZOO, ids=str)
def test_every_family(variant: Variant, tmp_path: Path) -> None:
    """Every byte is that of the adapter merged into the model loaded with 32 bits."""
    base = Path(saved(tiny_model(variant).bfloat16(), tmp_path / "base"))
    model = trained(base)
    save_merged(on_originals(model, base, tmp_path / "adapter"), None, tmp_path / "expected")
    said = save_merged(model, None, tmp_path / "ours", base="original")
    assert said.startswith("read back: the same logits; rounding to bfloat16 moved them by")
    ours, expected = tmp_path / "ours" / "model.safetensors", tmp_path / "expected" / "model.safetensors"
    assert ours.read_bytes() == expected.read_bytes()
    save_merged(model, None, tmp_path / "loaded")
    assert (tmp_path / "loaded" / "model.safetensors").read_bytes() != ours.read_bytes()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_adapter(name: str, tmp_path: Path) -> None:
    """And transformers gives the logits that PEFT gives with the adapter on the originals."""
    shape, options = OPTIONS[name]
    base = write_tiny_llama(tmp_path / "base", **shape)
    model = trained(base, **options)
    expected = on_originals(model, base, tmp_path / "adapter")
    said = export_model(model, None, tmp_path / "ours", dtype="float32", base="original")
    assert said == "read back: the same logits; rounding to float32 moved them by 0.0% of their spread"
    save_merged(expected, None, tmp_path / "expected", dtype=torch.float32)
    ours, theirs = weights_of(tmp_path / "ours"), weights_of(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[weight], theirs[weight]) for weight in ours)
    batch = make_batch(97)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    by_peft = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    difference = reference_logits(merged.eval(), batch) - reference_logits(by_peft, batch)
    assert difference.abs().max() < 1e-4
    assert (logits_of(expected, batch) - reference_logits(by_peft, batch)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_no_adapter_touches_keeps_its_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base = write_tiny_llama(tmp_path / "float32", attention_bias=True)
    LlamaForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", target_modules=["q_proj"], bias="lora_only")
    save_merged(model, None, tmp_path / "original", dtype, base="original", max_shard_bytes=50_000)
    save_merged(model, None, tmp_path / "loaded", dtype)
    before, original, loaded = (stored_tensors(tmp_path / name) for name in ("base", "original", "loaded"))
    assert before.keys() == original.keys() == loaded.keys()

    def changed(after: dict[str, Any]) -> set[str]:
        return {name for name in before if read_bytes(before[name]) != read_bytes(after[name])}

    q_projections = {f"model.layers.{i}.self_attn.q_proj.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert changed(original) == q_projections
    linears = {name for name in before if name.endswith("_proj.weight")}
    assert changed(loaded) == linears | q_projections


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_began_with_base_weights(init: str, tmp_path: Path) -> None:
    """They lost something before they were quantised, and the originals have it still."""
    base = write_tiny_llama(tmp_path / "base")
    model = trained(base, init_lora_weights=init, use_rslora=True)
    # On unquantised weights the adapter in the file, of twice the rank, is what it stands for.
    expected = on_originals(model, base, tmp_path / "adapter")
    assert not model.taken_out.keys() ^ expected.taken_out.keys()
    save_merged(model, None, tmp_path / "ours", dtype=torch.float32, base="original")
    save_merged(expected, None, tmp_path / "expected", dtype=torch.float32)
    ours, theirs = weights_of(tmp_path / "ours"), weights_of(tmp_path / "expected")
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-5)


def test_new_tokens_come_along(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", vocab_size=300)
    write_byte_tokenizer(base)
    model = load_model(base, bits=4, dtype=torch.float32, device="cpu")
    tokenizer = Tokenizer.from_folder(base)
    slothcore.add_tokens(model, tokenizer, [f"<{i}>" for i in range(60)])
    randomise_zero_factors(add_lora(model, r=4))
    save_merged(model, tokenizer, tmp_path / "ours", dtype=torch.float32, base="original")
    merged, before = weights_of(tmp_path / "ours"), weights_of(base)
    table = merged["model.embed_tokens.weight"]
    assert len(table) == model.config.vocab_size > 300
    assert torch.equal(table, model.model.embed_tokens.weight)
    assert torch.equal(merged["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize("room", [0, 55], ids=["rows are added", "rows were there"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_new_tokens_of_an_adapted_head(tied: bool, room: int, bits: int | None, tmp_path: Path) -> None:
    """The head that its LoRA term is added to has the rows of the new tokens, too."""
    write_byte_tokenizer(tmp_path / "base")
    tokenizer = Tokenizer.from_folder(tmp_path / "base")
    size = tokenizer.vocab_size + room
    base = write_tiny_llama(tmp_path / "base", vocab_size=size, tie_word_embeddings=tied)
    model = load_model(base, bits=4, dtype=torch.float32, device="cpu")
    slothcore.add_tokens(model, tokenizer, ["<a>", "<b>"])
    randomise_zero_factors(add_lora(model, r=4, target_modules=["q_proj", "lm_head"]))
    save_merged(model, tokenizer, tmp_path / "ours", dtype=torch.float32, base="original", bits=bits)
    expected = on_originals(model, base, tmp_path / "adapter")
    merged = load_model(tmp_path / "ours", bits=32, device="cpu")
    torch.testing.assert_close(merged.lm_head.weight, merged_weight(expected.lm_head, torch.float32))
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    if bits is None:
        batch = make_batch(size)
        assert (logits_of(merged, batch) - logits_of(expected, batch)).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_on_a_gpu(options: dict[str, Any], tmp_path: Path) -> None:
    """The check passes there, and the weights are those of a CPU up to the order of sums."""
    base = write_tiny_llama(tmp_path / "base", vocab_size=20_000)
    model = trained(base, **options)
    save_merged(model, None, tmp_path / "cpu", dtype=torch.float32, base="original")
    model.to("cuda")
    said = save_merged(model, None, tmp_path / "gpu", dtype=torch.float32, base="original")
    assert said.startswith("read back: the same logits")
    ours, expected = weights_of(tmp_path / "gpu"), weights_of(tmp_path / "cpu")
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    for format in ("merged", "merged-4bit"):
        said = export_model(model, None, tmp_path / format, format=format, base="original")
        assert said.startswith("read back: the same logits")


def test_refusals(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    plain = load_model(base, bits=4, device="cpu")
    with pytest.raises(ValueError, match="base original is for a model with an adapter, and this one has none"):
        save_merged(plain, None, tmp_path / "out", base="original")
    model = trained(base)
    with pytest.raises(ValueError, match="base must be one of loaded, original, got 'first'"):
        save_merged(model, None, tmp_path / "out", base="first")
    with pytest.raises(ValueError, match="base original is of no use to the format adapter"):
        export_model(model, None, tmp_path / "out", format="adapter", base="original")
    with pytest.raises(ValueError, match="begun by loftq, which makes up for what NF4 lost"):
        save_merged(trained(base, init_lora_weights="loftq"), None, tmp_path / "out", base="original")
    model.folder = None
    with pytest.raises(ValueError, match="are not to be had, for it was not read from a folder"):
        export_model(model, None, tmp_path / "out", base="original")
    quantized(tmp_path / "nf4")
    model = trained(tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"holds .* quantised already, so .* 16-bit original, or leave base out"):
        export_model(model, None, tmp_path / "out", base="original")
    moved = trained(shutil.copytree(base, tmp_path / "moved"))
    write_tiny_llama(tmp_path / "moved", intermediate_size=128)
    with pytest.raises(ValueError, match=r"_proj.weight has changed since the model was loaded; load it again"):
        export_model(moved, None, tmp_path / "out", base="original")
    assert not (tmp_path / "out").exists()
