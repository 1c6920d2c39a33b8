"""Adapters that begin with a part of the base weights: values, and that the base is made again to the bit.

W_residual + s B A == W everywhere; that factors are PEFT's is shown in `test_peft_variants.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from slothcore.kernels import nf4_eager
from slothcore.kernels.nf4_tensor import NF4_CODE
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.plan import lora_layers
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config, load_model
from tests.lora.reference import logits_of, make_batch
from tests.training.tiny import CONFIG, write_model

FROM_WEIGHTS = ("pissa", "pissa_niter_16", "olora")
EXPERTS = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIG.items() if k != "architectures"} | EXPERTS
    path = tmp_path_factory.mktemp("experts")
    model = from_config(config, device="cpu")
    save_pretrained(model.state_dict().items(), path, hf_config=config)
    return path


def weights(model: Decoder) -> dict[str, Tensor]:
    """Path of each layer -> its base weight in float32, [.., out, in]."""
    return {path: layer.dequantized(torch.float32) for path, layer in lora_layers(model).items()}


def sums(model: Decoder) -> dict[str, Tensor]:
    """Path of each adapted layer -> base weight + s B A."""
    return {
        path: layer.dequantized(torch.float32) + layer.delta_weight()
        for path, layer in lora_layers(model).items()
        if layer.lora_A is not None
    }


def disturb(model: Decoder) -> None:
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def assert_same_base(one: Decoder, other: Decoder) -> None:
    mine = {n: t for n, t in one.state_dict().items() if "lora_" not in n}
    theirs = {n: t for n, t in other.state_dict().items() if "lora_" not in n}
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_the_base_loses_what_the_adapter_begins_with(folder: Path, init: str, use_rslora: bool) -> None:
    before = weights(load_model(folder, bits=32, device="cpu"))
    model = load_model(folder, bits=32, device="cpu")
    add_lora(model, r=8, lora_alpha=24, use_rslora=use_rslora, init_lora_weights=init)
    after = weights(model)
    for path, total in sums(model).items():
        torch.testing.assert_close(total, before[path], rtol=0, atol=1e-6)
        # And it is a part worth the name.
        assert (before[path] - after[path]).norm() > 0.2 * before[path].norm(), path
    assert torch.equal(after["lm_head"], before["lm_head"])


def test_pissa_takes_the_largest_singular_values(folder: Path) -> None:
    """What is left has the smallest norm that a change of rank 8 can leave; by the fast way nearly."""
    before = weights(load_model(folder, bits=32, device="cpu"))
    for init, excess in (("pissa", 1e-5), ("pissa_niter_16", 0.02), ("pissa_niter_1", 0.2)):
        model = add_lora(load_model(folder, bits=32, device="cpu"), r=8, init_lora_weights=init)
        for path in sums(model):
            smallest = torch.linalg.svdvals(before[path])[8:].norm()
            assert weights(model)[path].norm() < (1 + excess) * smallest, (init, path)


def test_olora_begins_with_orthonormal_columns(folder: Path) -> None:
    model = add_lora(load_model(folder, bits=32, device="cpu"), r=8, init_lora_weights="olora")
    lora_B = model.model.layers[1].mlp.down_proj.lora_B
    torch.testing.assert_close(lora_B.T @ lora_B, torch.eye(8), rtol=0, atol=1e-5)


def test_orthogonal_factors_multiply_to_nothing(folder: Path) -> None:
    model = add_lora(load_model(folder, bits=32, device="cpu"), r=8, init_lora_weights="orthogonal")
    for layer in lora_layers(model).values():
        if layer.lora_A is not None:
            assert layer.delta_weight().abs().max() < 1e-6
            assert layer.lora_A.norm() > 0.1
            assert layer.lora_B.norm() > 0.1
    assert not model.taken_out


@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_the_residual_is_what_is_quantised(folder: Path, init: str) -> None:
    """QPiSSA: from the weights of the file, not from what four bits had left of them."""
    dense, model = load_model(folder, bits=32, device="cpu"), load_model(folder, bits=4, device="cpu")
    plain = load_model(folder, bits=4, device="cpu")
    torch.manual_seed(3)
    add_lora(model, r=8, lora_alpha=16, init_lora_weights=init)
    error = quantised_error = 0.0
    for path, layer in lora_layers(model).items():
        if path == "lm_head":
            continue
        assert isinstance(layer, Linear)
        weight = lora_layers(dense)[path].weight.detach()
        residual = weight - layer.delta_weight()
        expected = nf4_eager.nf4_dequantize(nf4_eager.nf4_quantize(residual), dtype=torch.float32)
        # A last bit in the difference may fall on the other side of a step of four bits.
        assert torch.isclose(layer.dequantized(torch.float32), expected, rtol=1e-4).float().mean() > 0.999, path
        error += (weight - sums(model)[path]).norm()
        quantised_error += (weight - lora_layers(plain)[path].dequantized(torch.float32)).norm()
    # What pissa is for: the smaller residual loses less. OLoRA's is not smaller in general.
    assert error < 0.95 * quantised_error or init == "olora"


@pytest.mark.parametrize("scaling", [1, 3])
def test_loftq_makes_up_for_what_four_bits_lose(folder: Path, scaling: int) -> None:
    dense, plain = load_model(folder, bits=32, device="cpu"), load_model(folder, bits=4, device="cpu")
    errors = []
    for iterations in (1, 4):
        model = load_model(folder, bits=4, device="cpu")
        add_lora(model, r=8, lora_alpha=8 * scaling, init_lora_weights="loftq", loftq_iter=iterations)
        totals = sums(model)
        errors.append(sum((weights(dense)[path] - total).norm() for path, total in totals.items()))
        if iterations == 1:
            assert_same_base(model, plain)
            assert not model.taken_out
            for path, total in totals.items():
                lost = weights(dense)[path] - weights(plain)[path]
                values = torch.linalg.svdvals(lost)
                left = (weights(dense)[path] - total).norm()
                torch.testing.assert_close(left, values[8:].norm(), rtol=1e-3, atol=1e-5)
    unaided = sum((weights(dense)[path] - weights(plain)[path]).norm() for path in totals)
    assert errors[0] < 0.9 * unaided
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("init", "bits"), [("pissa", 32), ("pissa", 4), ("olora", 32), ("olora", 4), ("loftq", 4)])
def test_experts(experts: Path, init: str, bits: int) -> None:
    dense, model = load_model(experts, bits=32, device="cpu"), load_model(experts, bits=bits, device="cpu")
    plain = weights(load_model(experts, bits=bits, device="cpu"))
    add_lora(model, r=4, init_lora_weights=init, loftq_iter=2 if init == "loftq" else 1)
    exact, totals = weights(dense), sums(model)
    stacks = [path for path, layer in lora_layers(model).items() if isinstance(layer, ExpertLinear)]
    assert len(stacks) == 6
    for path in totals:
        if bits == 32:
            torch.testing.assert_close(totals[path], exact[path], rtol=0, atol=1e-6)
        else:
            # OLoRA's residual is no smaller than the weight, and loses no less.
            excess = 2 if init == "olora" else 1
            assert (totals[path] - exact[path]).norm() < excess * (plain[path] - exact[path]).norm(), path


def contents(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The texts of an adapter's folder, and its tensors."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        texts = [file.metadata(), (folder / "adapter_config.json").read_text()]
    return texts, load_file(folder / "adapter_model.safetensors")


CASES = [
    *((init, 1, bits) for init in FROM_WEIGHTS for bits in (32, 16, 4)),
    ("loftq", 1, 4),
    ("loftq", 3, 4),
]


@pytest.mark.parametrize("lora_dtype", ["float32", "auto"])
@pytest.mark.parametrize(("init", "iterations", "bits"), CASES)
def test_a_saved_adapter_brings_its_base_back_to_the_bit(
    folder: Path, tmp_path: Path, init: str, iterations: int, bits: int, lora_dtype: str
) -> None:
    dtype = torch.float32 if bits == 32 else torch.bfloat16

    def base() -> Decoder:
        return load_model(folder, bits=bits, dtype=dtype, device="cpu")

    model = add_lora(base(), r=4, lora_dtype=lora_dtype, init_lora_weights=init, loftq_iter=iterations)
    disturb(model)
    save_adapter(model, tmp_path / "one")
    again = load_adapter(base(), tmp_path / "one", lora_dtype=lora_dtype)
    assert_same_base(model, again)
    batch = make_batch(model.config.vocab_size)
    assert torch.equal(logits_of(model, batch), logits_of(again, batch))
    assert again.lora_config == model.lora_config
    assert again.lora_config.init_lora_weights == init
    # And once more: what was read is written.
    save_adapter(again, tmp_path / "two")
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in one[1].items())


@pytest.mark.gpu
@pytest.mark.parametrize(("init", "iterations"), [("pissa", 1), ("pissa_niter_4", 1), ("olora", 1), ("loftq", 2)])
def test_a_base_on_the_gpu_comes_back_to_the_bit(folder: Path, tmp_path: Path, init: str, iterations: int) -> None:
    def base() -> Decoder:
        return load_model(folder, bits=4, dtype=torch.float16, device="cuda")

    model = add_lora(base(), r=4, init_lora_weights=init, loftq_iter=iterations)
    before, exact = weights(base()), weights(load_model(folder, bits=32, device="cuda"))
    for path, total in sums(model).items():
        if init != "olora":
            assert (total - exact[path]).norm() < (before[path] - exact[path]).norm(), path
    disturb(model)
    save_adapter(model, tmp_path)
    assert_same_base(model, load_adapter(base(), tmp_path))


def test_experts_come_back_to_the_bit(experts: Path, tmp_path: Path) -> None:
    model = add_lora(load_model(experts, bits=4, device="cpu"), r=4, init_lora_weights="pissa", use_rslora=True)
    disturb(model)
    save_adapter(model, tmp_path)
    again = load_adapter(load_model(experts, bits=4, device="cpu"), tmp_path)
    assert_same_base(model, again)
    batch = make_batch(model.config.vocab_size)
    assert torch.equal(logits_of(model, batch), logits_of(again, batch))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_others_find_an_ordinary_adapter_of_twice_the_rank(folder: Path, tmp_path: Path, use_rslora: bool) -> None:
    model = load_model(folder, bits=32, device="cpu")
    add_lora(model, r=4, lora_alpha=6, use_rslora=use_rslora, init_lora_weights="pissa")
    disturb(model)
    save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    assert config["lora_alpha"] == pytest.approx(6 * 2**0.5 if use_rslora else 12)
    # As any other program writes what it has read.
    (tmp_path / "theirs").mkdir()
    save_file(load_file(tmp_path / "ours" / "adapter_model.safetensors"), tmp_path / "theirs/adapter_model.safetensors")
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    plain = load_adapter(load_model(folder, bits=32, device="cpu"), tmp_path / "theirs")
    assert plain.lora_config.r == 8
    assert not plain.taken_out
    batch = make_batch(model.config.vocab_size)
    torch.testing.assert_close(logits_of(plain, batch), logits_of(model, batch), rtol=0, atol=2e-4)


def test_one_round_of_loftq_is_saved_as_it_is(folder: Path, tmp_path: Path) -> None:
    model = add_lora(load_model(folder, bits=4, device="cpu"), r=4, init_lora_weights="loftq")
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    with pytest.warns(UserWarning, match=r"by LoftQ for a base in 4 bits, and this one has 32; load it with bits=4"):
        load_adapter(load_model(folder, bits=32, device="cpu"), tmp_path)


def test_a_head_that_is_the_embedding_leaves_it_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tied", tie_word_embeddings=True)
    model = load_model(folder, bits=32, device="cpu")
    before = model.model.embed_tokens.weight.detach().clone()
    add_lora(model, r=4, target_modules=["q_proj", "lm_head"], init_lora_weights="pissa")
    assert torch.equal(model.model.embed_tokens.weight, before)
    torch.testing.assert_close(sums(model)["lm_head"], before, rtol=0, atol=1e-6)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_model(folder, bits=32, device="cpu"), tmp_path / "adapter")
    batch = make_batch(model.config.vocab_size)
    assert torch.equal(logits_of(model, batch), logits_of(again, batch))


def test_a_dense_head_beside_loftq_begins_as_usual(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, bits=4, device="cpu")
    before = model.lm_head.weight.detach().clone()
    add_lora(model, r=4, target_modules=["q_proj", "lm_head"], init_lora_weights="loftq", loftq_iter=2)
    assert torch.equal(model.lm_head.weight, before)
    assert not model.lm_head.lora_B.any()
    assert model.lm_head.lora_A.any()
    disturb(model)
    save_adapter(model, tmp_path)
    again = load_adapter(load_model(folder, bits=4, device="cpu"), tmp_path)
    assert_same_base(model, again)


def test_original_weights_that_are_not_to_be_had(tmp_path: Path) -> None:
    model = from_config(CONFIG, bits=4, device="cpu")
    with pytest.raises(ValueError, match=r"not read from a folder; load it with slothcore.load, or with bits=16"):
        add_lora(model, init_lora_weights="pissa")
    assert model.lora_config is None
    gone = write_model(tmp_path / "gone")
    model = load_model(gone, bits=4, device="cpu")
    (gone / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"gone has neither model.safetensors nor"):
        add_lora(model, init_lora_weights="loftq")


def test_a_base_that_its_publisher_quantised(folder: Path, tmp_path: Path) -> None:
    """Nothing is taken out of it; an adapter that began so is put on it as an ordinary one, with a warning."""
    published = publish_in_nf4(folder, tmp_path / "published")
    model = load_model(published, bits=4, device="cpu")
    assert model.model.layers[0].mlp.up_proj.is_nf4
    for init in ("pissa", "loftq"):
        with pytest.raises(ValueError, match=r"holds .* quantised already, so .*; load the model's unquantised 16-bit"):
            add_lora(model, init_lora_weights=init)
    trained = add_lora(load_model(folder, bits=4, device="cpu"), r=4, init_lora_weights="pissa")
    disturb(trained)
    save_adapter(trained, tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"are not to be had; it is put on this base as an ordinary one of twice"):
        load_adapter(model, tmp_path / "adapter")
    assert model.lora_config.r == 8
    taken = trained.taken_out
    for path, total in sums(model).items():
        layer = lora_layers(trained)[path]
        learned = layer.delta_weight() - taken[path][1] @ taken[path][0] * layer.lora_scaling
        torch.testing.assert_close(total, weights(model)[path] + learned, rtol=0, atol=1e-5)


def publish_in_nf4(folder: Path, target: Path) -> Path:
    """The same model as transformers with bitsandbytes would save it."""
    model = load_model(folder, bits=4, device="cpu")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "weight_" not in name:
            tensors[name] = tensor.contiguous()
    for path, layer in lora_layers(model).items():
        if isinstance(layer, Linear) and layer.is_nf4:
            weight: Any = layer.base_weight()
            name = f"{path}.weight"
            state = {
                "quant_type": "nf4",
                "blocksize": 64,
                "dtype": "float32",
                "shape": list(weight.shape),
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": float(weight.nested_offset),
            }
            tensors[name] = weight.packed.view(-1, 1)
            tensors[f"{name}.absmax"] = weight.absmax
            tensors[f"{name}.nested_absmax"] = weight.nested_absmax
            tensors[f"{name}.nested_quant_map"] = weight.nested_code
            tensors[f"{name}.quant_map"] = torch.tensor(NF4_CODE)
            text = json.dumps(state).encode()
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    target.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors")
    config = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config["quantization_config"]["bnb_4bit_quant_type"] = "nf4"
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_damaged_metadata_are_said(folder: Path, tmp_path: Path) -> None:
    save_adapter(add_lora(load_model(folder, bits=32, device="cpu"), r=4, init_lora_weights="pissa"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["slothcore_adapter"])["doubled"] is True
    for record in ("{", "[]", '{"config": {"r": 0}, "doubled": true}', '{"config": 3, "doubled": true}'):
        save_file(load_file(file), file, metadata={"slothcore_adapter": record})
        with pytest.raises(ValueError, match="its metadata do not describe the adapter"):
            load_adapter(load_model(folder, bits=32, device="cpu"), tmp_path)
