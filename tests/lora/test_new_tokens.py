"""Adapters of models with more tokens than their base: PEFT loads ours after resizing its base, and we load PEFT's."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import slothcore
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.merged import save_merged
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from slothcore.training.new_tokens import add_tokens
from tests.data.tiny_tokenizers import write_byte_tokenizer
from tests.lora.reference import Batch, logits_of, randomise_zero_factors, reference_logits, write_tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NEW = ("<|turn|>", "<think>", "axolotl")
BOTH = ["embed_tokens", "lm_head"]
# What the model is, and what of its tables trains.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "both trained": ({}, {"modules_to_save": BOTH}),
    "tied, both trained": ({"tie_word_embeddings": True}, {"modules_to_save": BOTH}),
    "none trained": ({}, {}),
    "tied, none trained": ({"tie_word_embeddings": True}, {}),
    "embedding trained": ({}, {"modules_to_save": ["embed_tokens"]}),
    "tied, head trained": ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
    "head adapted": ({}, {"target_modules": ["lm_head", "q_proj"]}),
    "padded, both trained": ({"vocab_size": 320}, {"modules_to_save": BOTH}),
    "padded, none trained": ({"vocab_size": 320}, {}),
}


def write_base(folder: Path, **options: Any) -> Path:
    size = Tokenizer.from_folder(write_byte_tokenizer(folder)).vocab_size
    return write_tiny_llama(folder, **{"vocab_size": size, **options})


def enlarged(base: Path, *, bits: int = 32, **options: Any) -> tuple[Decoder, Tokenizer]:
    """A model with new tokens whose adapter, and whatever else trains, has moved."""
    model, tokenizer = load_model(base, bits=bits, dtype=torch.float32, device="cpu"), Tokenizer.from_folder(base)
    add_tokens(model, tokenizer, NEW)
    add_lora(model, r=4, **options)
    randomise_zero_factors(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model, tokenizer


def batch_with(tokenizer: Tokenizer) -> Batch:
    ids = torch.tensor([tokenizer.encode("<|turn|>the <think>an axolotl<|turn|>")])
    assert {tokenizer.token_id(token) for token in NEW} <= set(ids[0].tolist())
    return Batch(ids, torch.ones_like(ids), ids)


def through_peft(base: Path, adapter: Path) -> torch.nn.Module:
    """As PEFT's users do it: resize the base to the tokenizer that lies with the adapter, then load the adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    size = len(transformers.AutoTokenizer.from_pretrained(adapter))
    if size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_ours(tmp_path: Path, name: str) -> None:
    model_options, options = CASES[name]
    base = write_base(tmp_path / "base", **model_options)
    model, tokenizer = enlarged(base, **options)
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save(tmp_path / "adapter")
    batch = batch_with(tokenizer)
    theirs = reference_logits(through_peft(base, tmp_path / "adapter"), batch)
    assert (logits_of(model, batch) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"vocab_size": 320}], ids=["grown", "padded"])
def test_peft_resizes_by_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    """AutoPeftModel takes the size from the tokenizer that lies with the adapter."""
    base = write_base(tmp_path / "base", **options)
    model, tokenizer = slothcore.load(base, bits=32, device="cpu")
    add_tokens(model, tokenizer, NEW)
    randomise_zero_factors(add_lora(model, r=4, modules_to_save=BOTH))
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save(tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    batch = batch_with(tokenizer)
    assert (logits_of(model, batch) - reference_logits(theirs, batch)).abs().max() < 1e-4


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", CASES)
def test_we_load_ours(tmp_path: Path, name: str, bits: int) -> None:
    """The base as it was, with the adapter, is the model that was saved, bit for bit; and so is what it saves again."""
    model_options, options = CASES[name]
    base = write_base(tmp_path / "base", **model_options)
    model, _ = enlarged(base, bits=bits, **options)
    save_adapter(model, tmp_path / "adapter")
    fresh = load_model(base, bits=bits, dtype=torch.float32, device="cpu")
    again = load_adapter(fresh, tmp_path / "adapter")
    assert again.config.vocab_size == model.config.vocab_size
    assert again.hf_config["vocab_size"] == again.config.vocab_size
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    trains = [key for key, p in model.named_parameters() if p.requires_grad]
    assert [key for key, p in again.named_parameters() if p.requires_grad] == trains
    save_adapter(again, tmp_path / "again")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_is_whole(tmp_path: Path, name: str) -> None:
    model_options, options = CASES[name]
    base = write_base(tmp_path / "base", **model_options)
    model, tokenizer = enlarged(base, **options)
    save_merged(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    batch = batch_with(tokenizer)
    expected = logits_of(model, batch)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert theirs.config.vocab_size == model.config.vocab_size
    assert (reference_logits(theirs, batch) - expected).abs().max() < 1e-4
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) == tokenizer.vocab_size
    again = load_model(tmp_path / "merged", bits=32, device="cpu")
    assert (logits_of(again, batch) - expected).abs().max() < 1e-4
    assert Tokenizer.from_folder(tmp_path / "merged").encode("axolotl") == tokenizer.encode("axolotl")


# Of an adapted head PEFT saves the resized weight, and leaves the embedding out: nobody could load that.
@pytest.mark.parametrize("name", [name for name in CASES if "padded" not in name and name != "head adapted"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_we_load_pefts(tmp_path: Path, name: str) -> None:
    """What PEFT saves of a model that was resized first: it adds both tables, whether they train or not."""
    model_options, options = CASES[name]
    base = write_base(tmp_path / "base", **model_options)
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    theirs.add_tokens(list(NEW))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.resize_token_embeddings(len(theirs))
    config = peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": "all-linear", **options}
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    theirs.save_pretrained(tmp_path / "adapter")
    tokenizer = Tokenizer.from_folder(tmp_path / "adapter")
    ours = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path / "adapter")
    assert ours.config.vocab_size == len(theirs)
    batch = batch_with(tokenizer)
    assert (logits_of(ours, batch) - reference_logits(adapted.eval(), batch)).abs().max() < 1e-4


def test_a_table_without_its_twin_is_refused(tmp_path: Path) -> None:
    """More rows in the embedding than in the base, and none for the head: nothing can be made up for them."""
    base = write_base(tmp_path / "base")
    model, _ = enlarged(base)
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    fresh = load_model(base, bits=32, device="cpu")
    before = fresh.config.vocab_size
    with pytest.raises(ValueError, match=r"lacks 1 tensors that this model needs, the first lm_head\.weight"):
        load_adapter(fresh, tmp_path / "adapter")
    assert fresh.config.vocab_size == len(fresh.model.embed_tokens.weight) == before


def test_unchanged_tables_stay_out_of_an_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    model = load_model(base, bits=32, device="cpu")
    tokenizer = Tokenizer.from_folder(base)
    assert add_tokens(model, tokenizer, ["<|im_start|>", "the"]) == {}
    save_adapter(add_lora(model, r=2), tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
