"""Checkpoints quantised and saved by transformers + bitsandbytes: every bit kept, and used as bitsandbytes uses it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from slothcore.export.merged import save_merged
from slothcore.kernels import nf4_eager
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.adapter_io import adapter_state
from slothcore.lora.attach import add_lora
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.decoder import Decoder
from slothcore.models.families import FAMILIES
from slothcore.models.load import from_config
from tests.lora.reference import copy_adapter, make_batch, peft_parameters, randomise_zero_factors
from tests.models.bitsandbytes_models import CONFIGS, WHOLE_BLOCKS, edit, edit_config, load, quantized
from tests.models.tiny import SIZES, token_ids
from tests.numerics import relative_error


def assert_same_logits(ours: Decoder, reference: PreTrainedModel) -> None:
    ids = token_ids(2, 30)
    with torch.no_grad():
        expected, actual = reference(ids).logits, ours(ids).logits
    assert actual is not None
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_bit_is_kept(family: str, double_quant: bool, dtype: torch.dtype, storage: str, tmp_path: Path) -> None:
    """Codes, scales and decoded values; and logits, which a second rounding on the way to float32 would move."""
    reference = quantized(
        tmp_path, family, dtype=dtype, bnb_4bit_use_double_quant=double_quant, bnb_4bit_quant_storage=storage
    )
    ours = load(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    seen = 0
    for path, module in reference.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        mine = ours.get_submodule(path).base_weight()
        name = f"{path}.weight"
        assert stored[name].dtype == getattr(torch, storage)
        assert torch.equal(mine.packed, stored[name].view(-1).view(torch.uint8)), name
        assert torch.equal(mine.absmax, stored[f"{name}.absmax"]), name
        assert mine.is_nested == double_quant
        if double_quant:
            assert torch.equal(mine.nested_absmax, stored[f"{name}.nested_absmax"]), name
            assert torch.equal(mine.nested_code, stored[f"{name}.nested_quant_map"]), name
            assert torch.equal(mine.nested_offset, state.offset.float()), name
        assert state.dtype == dtype
        expected = bnb.dequantize_4bit(module.weight.data, state)
        assert torch.equal(nf4_eager.nf4_dequantize(mine, dtype=dtype), expected), name
        seen += 1
    assert seen == 14
    assert_same_logits(ours, reference)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in ("llama", "qwen2")])
def test_every_family(family: str, tmp_path: Path) -> None:
    """transformers 5 leaves the experts of a sparse model dense, which it keeps as one stack; so they are here."""
    reference = quantized(tmp_path, family, bnb_4bit_use_double_quant=True)
    ours = load(tmp_path)
    for path, module in ours.named_modules():
        if isinstance(module, Linear | ExpertLinear):
            assert module.is_nf4 == (path != "lm_head" and "experts" not in path), path
    assert_same_logits(ours, reference)


def test_a_prefix_goes_before_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the text part of a multimodal checkpoint."""
    reference = quantized(tmp_path, bnb_4bit_use_double_quant=True)
    family = replace(FAMILIES["llama"], weight_prefixes=(("text.", ""),), ignored_weights=("vision.",))
    monkeypatch.setitem(FAMILIES, "llama", family)

    def rename(tensors: dict[str, Tensor]) -> None:
        renamed = {f"text.{name}": tensor for name, tensor in tensors.items()}
        pictures = {f"vision.{name}": tensor.clone() for name, tensor in tensors.items() if "layers.0" in name}
        tensors.clear()
        tensors.update(renamed | pictures)

    edit(tmp_path, rename)
    with pytest.warns(UserWarning, match="belong to no text model"):
        ours = load(tmp_path)
    assert_same_logits(ours, reference)


def test_loss_and_gradients_and_a_training_step(tmp_path: Path) -> None:
    """Every gradient of PEFT's adapter on bitsandbytes' model, and a step along it that lowers the loss."""
    reference = quantized(tmp_path, bnb_4bit_use_double_quant=True)
    ours = add_lora(load(tmp_path), r=4, lora_alpha=8, target_modules="all-linear")
    randomise_zero_factors(ours)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(reference, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    copy_adapter(ours, theirs)
    theirs.train()
    batch = make_batch(SIZES["vocab_size"])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    loss = ours(**inputs).loss
    expected_loss = theirs(**inputs).loss
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    loss.backward()
    expected_loss.backward()
    expected = peft_parameters(theirs)
    for name, factor in adapter_state(ours).items():
        assert factor.grad.abs().max() > 0, name
        assert relative_error(factor.grad, expected[name].grad) < 1e-4, name

    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert len(trained) == 28
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    optimizer.step()
    assert ours(**inputs).loss < loss


def test_modules_left_dense_stay_dense(tmp_path: Path) -> None:
    """As in "dynamic" quantisations, whose publishers leave out many modules by their own rules."""
    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.k_proj"]
    reference = quantized(tmp_path, llm_int8_skip_modules=skipped)
    ours = load(tmp_path)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    kinds = {name: module.is_nf4 for name, module in ours.named_modules() if isinstance(module, Linear)}
    left = {name for name, is_nf4 in kinds.items() if not is_nf4}
    assert left == {
        "lm_head",
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
        "model.layers.1.self_attn.k_proj",
    }
    for name in left:
        assert torch.equal(ours.get_submodule(name).weight, dense[f"{name}.weight"]), name
    assert not any(weight.requires_grad for weight in ours.parameters())
    assert_same_logits(ours, reference)


def test_a_quantised_head_becomes_what_bitsandbytes_multiplies_by(tmp_path: Path) -> None:
    reference = quantized(tmp_path, dtype=torch.bfloat16, llm_int8_skip_modules=["nothing"])
    state = reference.lm_head.weight.quant_state
    ours = load(tmp_path)
    assert not ours.lm_head.is_nf4
    state.dtype = torch.float32
    assert torch.equal(ours.lm_head.weight, bnb.dequantize_4bit(reference.lm_head.weight.data, state))
    assert_same_logits(ours, reference)


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.bfloat16), (16, torch.float16)])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
def test_16_and_32_bits_have_the_decoded_values(
    bits: int, dtype: torch.dtype, stored_dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = quantized(tmp_path, dtype=stored_dtype, bnb_4bit_use_double_quant=True)
    ours = load(tmp_path, bits=bits, dtype=dtype)
    for path, module in ours.named_modules():
        if isinstance(module, Linear) and path != "lm_head":
            theirs = reference.get_submodule(path).weight
            expected = bnb.dequantize_4bit(theirs.data, theirs.quant_state).to(dtype)
            assert torch.equal(module.weight, expected), path
    assert all(weight.requires_grad for weight in ours.parameters())


@pytest.mark.parametrize("bits", [4, 16])
def test_exports_are_dense_and_say_so(bits: int, tmp_path: Path) -> None:
    """No quantization_config, or whoever reads the export would look for codes."""
    quantized(tmp_path / "4bit", dtype=torch.bfloat16)
    ours = load(tmp_path / "4bit", bits=bits, dtype=torch.bfloat16)
    assert "quantization_config" not in ours.hf_config
    save_merged(ours, None, tmp_path / "merged", dtype=torch.bfloat16)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = ours.model.layers[1].mlp.down_proj.dequantized(torch.bfloat16)
    assert torch.equal(again.model.layers[1].mlp.down_proj.weight, expected)


def test_the_names_tell_what_is_quantised(tmp_path: Path) -> None:
    """Some published config.json lost their quantization_config; its weights are NF4 all the same."""
    quantized(tmp_path)
    before = load(tmp_path).model.layers[0].mlp.up_proj.base_weight()
    edit_config(tmp_path, lambda config: config.pop("quantization_config"))
    after = load(tmp_path).model.layers[0].mlp.up_proj.base_weight()
    assert torch.equal(before.packed, after.packed)
    assert torch.equal(before.absmax, after.absmax)


def test_parts_in_several_shards(tmp_path: Path) -> None:
    """safetensors sorts by dtype, so a weight's scales lie far from its codes, and shards may part them."""
    reference = quantized(tmp_path, bnb_4bit_use_double_quant=True)
    tensors = load_file(tmp_path / "model.safetensors")
    files = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same_logits(load(tmp_path), reference)


def test_the_stored_nested_map_is_used(tmp_path: Path) -> None:
    quantized(tmp_path, bnb_4bit_use_double_quant=True)
    name = "model.layers.0.mlp.up_proj.weight.nested_quant_map"
    edit(tmp_path, lambda tensors: tensors[name].mul_(0.5))
    weight = load(tmp_path).model.layers[0].mlp.up_proj.base_weight()
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weight.nested_code, stored[name])
    absmax = weight.nested_code[weight.absmax.int()] * weight.nested_absmax[0] + weight.nested_offset
    assert torch.equal(nf4_eager.dequantize_absmax(weight), absmax)


MIXTRAL = {
    "model_type": "mixtral",
    **{key: WHOLE_BLOCKS[key] for key in ("vocab_size", "num_attention_heads", "num_key_value_heads")},
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("bits", [4, 32])
def test_experts_and_a_router(bits: int, tmp_path: Path) -> None:
    """Each expert a weight of its own, as transformers 4 quantised them; a quantised router is dense here."""
    dense = {name: weight.detach().clone() for name, weight in from_config(MIXTRAL, device="cpu").state_dict().items()}
    save_pretrained(dense.items(), tmp_path, hf_config=MIXTRAL)
    expected: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers" in name and tensors[name].dim() == 2]:
            packed, state = bnb.quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
            expected[name] = bnb.dequantize_4bit(packed, state)
            tensors[name] = packed
            tensors.update((f"{name}.{part}", tensor) for part, tensor in state.as_dict(packed=True).items())

    edit(tmp_path, quantize)
    ours = load(tmp_path, bits=bits)
    block = ours.model.layers[0].block_sparse_moe
    assert torch.equal(block.gate.weight, expected["model.layers.0.block_sparse_moe.gate.weight"])
    for name in ("w1", "w2", "w3"):
        stack = getattr(block.experts, name)
        assert isinstance(stack, ExpertLinear)
        assert stack.is_nf4 == (bits == 4)
        for expert in range(4):
            wanted = expected[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"]
            assert torch.equal(stack.dequantized_expert(expert, torch.float32), wanted)
    assert ours(token_ids(1, 9)).logits.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
def test_gpu_keeps_every_bit_and_computes(double_quant: bool, tmp_path: Path) -> None:
    quantized(tmp_path, dtype=torch.bfloat16, bnb_4bit_use_double_quant=double_quant)
    on_cpu, on_gpu = load(tmp_path), load(tmp_path, device="cuda", dtype=torch.float32)
    for name, value in on_cpu.state_dict().items():
        assert torch.equal(on_gpu.state_dict()[name].cpu(), value), name
    ids = token_ids(2, 30)
    with torch.no_grad():
        assert (on_gpu(ids).logits.cpu() - on_cpu(ids).logits).abs().max() < 1e-3
