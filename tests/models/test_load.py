"""Options of loading, and models with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import slothcore.models.load as loading
from slothcore.layers.linear import Linear
from slothcore.models import reading
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.load import from_config, load_model, resolve_device, resolve_dtype
from tests.models.test_config import TINY
from tests.models.tiny import saved, tiny_llama, token_ids

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_llama(tie_word_embeddings=True), tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [("model.", ""), ("", "_orig_mod."), ("", "base_model.model.")],
    ids=["the body alone", "compiled", "wrapped by PEFT"],
)
def test_weights_under_other_names_say_what_was_saved(before: str, after: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {after + name.removeprefix(before): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    found = after + "model.embed_tokens.weight".removeprefix(before)
    with pytest.raises(
        ValueError, match=rf"lacks the weight model\.embed_tokens\.weight and has {found}, .*whole model"
    ):
        load_model(folder, bits=32, device="cpu")


@pytest.mark.parametrize(
    ("bits", "dtype", "expected"),
    [
        (4, None, torch.float32),
        (4, torch.bfloat16, torch.bfloat16),
        (4, "float16", torch.float16),
        (16, None, torch.bfloat16),
        (16, torch.float16, torch.float16),
        (32, None, torch.float32),
    ],
)
def test_dtype_on_a_cpu(bits: int, dtype: torch.dtype | str | None, expected: torch.dtype) -> None:
    assert resolve_dtype(bits, dtype, CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_dtype_on_a_gpu(capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for bits in (4, 16):
        assert resolve_dtype(bits, None, torch.device("cuda", 0)) == expected


@pytest.mark.parametrize("bits", [3, 8, 0, True, "4"])
def test_bits_outside_the_choices(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be one of 4, 16, 32, got"):
        resolve_dtype(bits, None, CPU)


def test_dtypes_outside_the_choices() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got int8"):
        resolve_dtype(4, "int8", CPU)
    with pytest.raises(ValueError, match=r"got torch.float64"):
        resolve_dtype(32, torch.float64, CPU)
    with pytest.raises(ValueError, match="dtype float32 does not go with bits=16"):
        resolve_dtype(16, torch.float32, CPU)
    with pytest.raises(ValueError, match="dtype bfloat16 does not go with bits=32"):
        resolve_dtype(32, "bfloat16", CPU)


def test_devices_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device 'gpu' does not exist"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == CPU
    with pytest.raises(ValueError, match="torch finds no usable GPU"):
        resolve_device("cuda")


def test_4_bits_quantise_the_layers_and_nothing_else(folder: Path) -> None:
    model = load_model(folder, device="cpu")
    assert model.bits == 4
    kinds = {name: m.is_nf4 for name, m in model.named_modules() if isinstance(m, Linear)}
    assert kinds.pop("lm_head") is False
    assert len(kinds) == 14
    assert all(kinds.values())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_nf4_of_the_weight_in_the_compute_dtype(folder: Path) -> None:
    layer = "model.layers.0.mlp.up_proj"
    quantised = load_model(folder, bits=4, dtype=torch.bfloat16, device="cpu").get_submodule(layer)
    dense = load_model(folder, bits=16, dtype=torch.bfloat16, device="cpu").get_submodule(layer)
    expected = loading.nf4_eager.nf4_quantize(dense.weight.detach())
    assert torch.equal(quantised.base_weight().packed, expected.packed)


def test_dense_weights_train(folder: Path) -> None:
    model = load_model(folder, bits=32, device="cpu")
    assert all(weight.requires_grad for weight in model.parameters())
    assert not model.training


def test_a_tied_head_is_one_weight(folder: Path) -> None:
    for model in (load_model(folder, bits=32, device="cpu"), from_config({**TINY, "tie_word_embeddings": True})):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in model.state_dict()
        other = from_config({**TINY, "tie_word_embeddings": True, "num_key_value_heads": 2})
        if model.config.num_key_value_heads == 2:
            other.load_state_dict(model.state_dict(), strict=True)
            assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_max_seq_length(folder: Path) -> None:
    assert load_model(folder, device="cpu").max_seq_length == 256
    assert load_model(folder, device="cpu", max_seq_length=100).max_seq_length == 100
    with pytest.raises(ValueError, match="max_seq_length must be at least 1, got 0"):
        load_model(folder, device="cpu", max_seq_length=0)


def test_longer_documents_than_the_models_own(folder: Path) -> None:
    """Linear scaling unless another is asked for, said in a warning, and carried by the configuration of exports."""
    with pytest.warns(
        UserWarning, match=r"RoPE scaling \(linear, factor 2\) takes the model from 256 positions to 512"
    ):
        model = load_model(folder, device="cpu", max_seq_length=512)
    assert model.max_seq_length == 512
    assert (model.config.rope.rope_type, model.config.rope.factor) == ("linear", 2.0)
    assert model.hf_config["max_position_embeddings"] == 512
    with pytest.warns(UserWarning, match=r"RoPE scaling \(yarn, factor 2\)"):
        model = load_model(folder, device="cpu", max_seq_length=512, rope_scaling="yarn")
    assert model.config.rope.rope_type == "yarn"


def test_end_tokens_of_the_generation_config_win(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    model = load_model(folder, device="cpu")
    assert model.eos_token_ids == (7, 8)
    assert model.generation_config == {"eos_token_id": [7, 8]}
    assert from_config({**TINY, "eos_token_id": 5}).eos_token_ids == (5,)
    for wrong in ("7", ["7"], [7, None], 7.0):
        model.generation_config = {"eos_token_id": wrong}
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id or a list of"):
            _ = model.eos_token_ids
    model.generation_config = {"eos_token_id": None}
    assert model.eos_token_ids == ()


def test_random_weights_are_reproducible() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return from_config({**TINY, "attention_bias": True, "initializer_range": 0.05}, device="cpu").state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["lm_head.weight"].std() == pytest.approx(0.05, rel=0.1)
    assert first["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.05, rel=0.1)
    assert (first["model.norm.weight"] == 1).all()
    assert (first["model.layers.0.self_attn.q_proj.bias"] == 0).all()


def test_random_weights_from_a_folder_or_a_file(folder: Path) -> None:
    assert from_config(folder, device="cpu").config == from_config(folder / "config.json", device="cpu").config
    with pytest.raises(ValueError, match="does not exist"):
        from_config(folder / "nothing")


def test_random_weights_in_4_bits() -> None:
    model = from_config({**TINY, "hidden_size": 64, "intermediate_size": 128}, bits=4, device="cpu")
    assert model.model.layers[0].mlp.up_proj.is_nf4
    assert model(token_ids(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize(("dtype", "bits"), [(None, 32), (torch.bfloat16, 16), ("float16", 16), ("torch.bfloat16", 16)])
def test_bits_follow_the_dtype(dtype: torch.dtype | str | None, bits: int) -> None:
    model = from_config(TINY, dtype=dtype, device="cpu")
    assert model.bits == bits
    assert {weight.dtype for weight in model.parameters()} == {model.dtype}


def test_random_experts() -> None:
    """Each expert is drawn alone, under its name on disk, and quantised alone with 4 bits."""
    moe = {
        **{key: TINY[key] for key in ("vocab_size", "num_attention_heads", "num_hidden_layers")},
        **{
            "model_type": "mixtral",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_local_experts": 3,
            "num_key_value_heads": 2,
        },
    }
    dense = from_config(moe, device="cpu")
    stack = dense.model.layers[0].block_sparse_moe.experts.w2
    assert stack.weight.shape == (3, 64, 128)
    assert stack.weight.std(dim=(1, 2)).tolist() == pytest.approx([0.02] * 3, rel=0.1)
    assert not torch.equal(stack.weight[0], stack.weight[1])
    quantised = from_config(moe, bits=4, device="cpu")
    assert quantised.model.layers[0].block_sparse_moe.experts.w2.is_nf4
    assert quantised.model.layers[0].block_sparse_moe.gate.weight.is_floating_point()
    meta = from_config(moe, device="meta")
    assert {weight.device.type for weight in meta.parameters()} == {"meta"}
    count = sum(weight.numel() for weight in dense.parameters())
    assert sum(weight.numel() for weight in meta.parameters()) == count


def test_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        model = from_config({**TINY, "hidden_size": 8192, "intermediate_size": 65536, "num_attention_heads": 64})
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    per_layer = 4 * 8192**2 + 3 * 8192 * 65536 + 2 * 8192
    assert sum(weight.numel() for weight in model.parameters()) == 2 * per_layer + 2 * 97 * 8192 + 8192
    with pytest.raises(ValueError, match="bits=4 needs values"):
        from_config(TINY, bits=4, device="meta")


@pytest.mark.gpu
@pytest.mark.parametrize("small_pieces", [False, True])
def test_gpu_loads_what_it_would_quantise_and_never_waits(
    small_pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every NF4 part and dense weight of a 200 MB model; with small pieces each pinned buffer is used many times."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 4000}
    config = {**TINY, **sizes, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = from_config(config, device="cuda", dtype=torch.bfloat16)
    save_pretrained(source.state_dict().items(), tmp_path, hf_config=config, max_shard_bytes=60 * 10**6)
    load_model(tmp_path, device="cuda")  # compiles
    if small_pieces:
        monkeypatch.setattr(reading, "PIECE_BYTES", 2**19)
    original = loading._read_weights

    def watched(*args: Any, **options: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loading, "_read_weights", watched)
    loaded = load_model(tmp_path, device="cuda")
    for name, weight in source.state_dict().items():
        module = loaded.get_submodule(name.removesuffix(".weight"))
        if loading.is_quantized(loaded, name):
            expected = loading.nf4.nf4_quantize(weight)
            actual = module.base_weight()
            for part in ("packed", "absmax", "nested_absmax", "nested_offset", "nested_code"):
                assert torch.equal(getattr(actual, part), getattr(expected, part)), f"{name} {part}"
        else:
            assert torch.equal(module.weight, weight), name
