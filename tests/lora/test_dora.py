"""DoRA on a model: how it begins, what it refuses, how it is merged and stored, and in every family beside PEFT."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from slothcore.layers.known_norms import KnownNorms
from slothcore.layers.linear import Linear
from slothcore.lora.adapter_io import adapter_state, load_adapter, save_adapter
from slothcore.lora.attach import add_lora, lora_config_of
from slothcore.lora.config import LoraConfig
from slothcore.lora.merge import merged_weight
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from slothcore.training.decoded import keep_decoded_layers
from tests.lora.reference import load_pair, logits_of, make_batch, peft_parameters, reference_logits, write_tiny_llama
from tests.models.zoo import ALL_VARIANTS, LONG, Variant, quantize_as_bitsandbytes, saved, tiny_model, token_ids
from tests.numerics import relative_error

FAMILIES = [v for v in ALL_VARIANTS if not v.is_multimodal]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "base")


def adapted(folder: Path, *, bits: int = 32, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    """Factors and magnitudes away from where they begin."""
    model = load_model(folder, bits=bits, dtype=dtype, device="cpu")
    add_lora(model, **{"r": 4, "use_dora": True, **options})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise if parameter.dim() == 2 else 0.2 * parameter * noise)
    return model


def loss_and_gradients(model: Decoder) -> list[torch.Tensor]:
    batch = make_batch(model.config.vocab_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(batch.input_ids, batch.labels, batch.attention_mask).loss
    return [loss, *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.bfloat16), (4, torch.bfloat16)])
def test_it_begins_as_lora(base: Path, bits: int, dtype: torch.dtype) -> None:
    """To the last bit: every scale is 1, so logits and the gradients of B are LoRA's. (A has none while B is zero.)"""
    results = []
    for use_dora in (False, True):
        model = load_model(base, bits=bits, dtype=dtype, device="cpu")
        torch.manual_seed(1)
        add_lora(model, r=4, use_dora=use_dora)
        batch = make_batch(model.config.vocab_size)
        model(batch.input_ids, batch.labels, batch.attention_mask).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if name.endswith("lora_B")}
        results.append((logits_of(model, batch), grads))
    (logits, grads), (dora_logits, dora_grads) = results
    assert torch.equal(logits, dora_logits)
    assert all(grad.abs().max() > 0 and torch.equal(grad, dora_grads[name]) for name, grad in grads.items())


def test_magnitudes_are_float32_whatever_the_factors_are(base: Path) -> None:
    model = load_model(base, bits=16, dtype=torch.bfloat16, device="cpu")
    add_lora(model, r=4, use_dora=True, lora_dtype="auto")
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.lora_A.dtype, layer.lora_magnitude_vector.dtype) == (torch.bfloat16, torch.float32)
    assert layer.lora_magnitude_vector.requires_grad
    norms = torch.linalg.norm(layer.weight.double(), dim=1)
    assert torch.allclose(layer.lora_magnitude_vector.double(), norms, rtol=1e-6)
    assert "dora" in repr(layer)
    layer.detach_lora()
    assert layer.lora_magnitude_vector is None


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
def test_it_begins_from_the_weights_that_an_initialisation_leaves(base: Path, init: str) -> None:
    """Base and factors together are what they were, so the lengths are those of the base; and PEFT reads the file."""
    ours, reference = load_pair(base)
    before = logits_of(ours, make_batch(97))
    add_lora(ours, r=4, use_dora=True, init_lora_weights=init)
    assert torch.allclose(logits_of(ours, make_batch(97)), before, atol=1e-4)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.2)
    save_adapter(ours, base / "adapter")
    again = load_adapter(load_model(base, bits=32, device="cpu"), base / "adapter")
    assert torch.allclose(logits_of(again, make_batch(97)), logits_of(ours, make_batch(97)), atol=1e-5)
    theirs = PeftModel.from_pretrained(reference, base / "adapter").eval()
    assert (reference_logits(theirs, make_batch(97)) - logits_of(ours, make_batch(97))).abs().max() < 1e-4


@pytest.mark.parametrize("checkpointing", [True, "mlp", "offload"])
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_no_bit(base: Path, bits: int, dropout: float, checkpointing: Any) -> None:
    model = adapted(base, bits=bits, lora_dropout=dropout).train()
    torch.manual_seed(3)
    expected = loss_and_gradients(model)
    model.gradient_checkpointing = checkpointing
    torch.manual_seed(3)
    assert all(map(torch.equal, loss_and_gradients(model), expected))


def test_kept_decoded_weights_change_no_bit(base: Path) -> None:
    model = adapted(base, bits=4).train()
    expected = loss_and_gradients(model)
    keep_decoded_layers(model, 2)
    assert model.model.layers[1].mlp.up_proj.has_decoded(torch.float32)
    assert all(map(torch.equal, loss_and_gradients(model), expected))


@pytest.mark.parametrize("bits", [32, 4])
def test_a_merged_weight_has_the_lengths_that_were_learned(base: Path, bits: int) -> None:
    model = adapted(base, bits=bits, use_rslora=True)
    layer = model.model.layers[1].mlp.down_proj
    total = layer.dequantized(torch.float32).double() + layer.delta_weight().double()
    exact = layer.lora_magnitude_vector.double()[:, None] * total / torch.linalg.norm(total, dim=1, keepdim=True)
    merged = merged_weight(layer, torch.float32)
    assert torch.allclose(merged.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.linalg.norm(merged, dim=1), layer.lora_magnitude_vector, rtol=1e-5)


def test_a_round_trip_is_exact(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector" in names
    again = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path / "adapter")
    assert lora_config_of(again) == lora_config_of(model)
    assert lora_config_of(again).use_dora
    assert all(map(torch.equal, loss_and_gradients(again), loss_and_gradients(model)))
    frozen = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path / "adapter", trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(logits_of(frozen, make_batch(97)), logits_of(model, make_batch(97)))


def test_a_base_that_trains_too(base: Path) -> None:
    """A weight beside its factors, which the fused Functions leave to torch: the same numbers."""
    model = adapted(base, bias="none", target_modules=["q_proj", "up_proj"])
    expected = loss_and_gradients(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("q_proj.weight"))
    results = loss_and_gradients(model)[1:]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    actual = dict(zip(trained, results, strict=True))
    for name, gradient in zip(names, expected[1:], strict=True):
        assert relative_error(actual[name], gradient) < 1e-4, name
    assert all(actual[name].abs().max() > 0 for name in trained)


def test_writing_computes_norms_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And writes what a pass over everything says; afterwards each pass computes them again."""
    model = adapted(base).eval()
    counted, original = [], Linear.row_norms
    monkeypatch.setattr(Linear, "row_norms", lambda self, dtype=None: counted.append(self) or original(self, dtype))
    ids = torch.arange(1, 9)[None]
    written = model.generate(ids, max_new_tokens=6, eos_token_id=())
    assert len(counted) == 14
    streamed = list(model.stream(ids[0], max_new_tokens=6, eos_token_id=()))
    assert streamed == written[0, 8:].tolist()
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert all(layer.known_norms is None for layer in layers)
    with torch.no_grad():
        logits = model(written[:, :-1]).logits
        assert torch.equal(logits[0, 7:].argmax(-1), written[0, 8:])
        norms = KnownNorms()
        norms.compute(model.modules(), torch.float32)
        assert torch.equal(model(written[:, :-1]).logits, logits)
        model.model.layers[0].mlp.up_proj.lora_B.mul_(3)
        kept = model.model.layers[0].mlp.up_proj.known_norms
        assert not torch.equal(kept, layers[0].row_norms())
        norms.compute(model.modules(), torch.float32)
        assert model.model.layers[0].mlp.up_proj.known_norms is kept
        assert torch.equal(kept, model.model.layers[0].mlp.up_proj.row_norms(torch.float32))


def test_known_norms_stay_where_they_lay_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """For graphs captured there, when the model has been elsewhere meanwhile."""
    layer, norms = Linear(6, 5, dtype=torch.float32), KnownNorms()
    layer.attach_lora(torch.randn(2, 6), torch.zeros(5, 2), scaling=0.5)
    layer.attach_magnitude(torch.ones(5))
    norms.compute([layer], torch.float32)
    kept = layer.known_norms
    with monkeypatch.context() as patch:
        patch.setattr(layer, "row_norms", lambda dtype: torch.empty(5, device="meta"))
        norms.compute([layer], torch.float32)
        assert layer.known_norms.is_meta
    norms.compute([layer], torch.float32)
    assert layer.known_norms is kept
    norms.drop()
    assert layer.known_norms is None


def test_a_layer_refuses_what_does_not_fit() -> None:
    layer = Linear(6, 5, dtype=torch.float32)
    torch.nn.init.normal_(layer.weight)
    for call in (layer.row_norms, layer.delta_weight, lambda: layer.attach_magnitude(torch.ones(5))):
        with pytest.raises(ValueError, match="this layer has no LoRA term; call attach_lora first"):
            call()
    layer.attach_lora(torch.randn(2, 6), torch.zeros(5, 2), scaling=0.5)
    with pytest.raises(ValueError, match=r"the magnitude must have shape \(5,\) in this layer, got \(6,\)"):
        layer.attach_magnitude(torch.ones(6))
    layer.attach_magnitude(layer.row_norms())
    assert torch.allclose(layer.lora_magnitude_vector, torch.linalg.norm(layer.weight, dim=1))
    assert "lora_magnitude_vector" in layer.state_dict()
    layer.attach_lora(torch.randn(2, 6), torch.zeros(5, 2), scaling=0.5)
    assert layer.lora_magnitude_vector is None, "it belonged to the term before"


def test_experts_are_refused(tmp_path: Path) -> None:
    variant = next(v for v in ALL_VARIANTS if str(v) == "mixtral-three-of-five")
    saved(tiny_model(variant), tmp_path)
    model = load_model(tmp_path, bits=32, device="cpu")
    with pytest.raises(
        ValueError, match=r"use_dora is not made for experts, and .*\.experts\.0\.w1 is one; name other"
    ):
        add_lora(model, use_dora=True)
    add_lora(model, use_dora=True, target_modules=["q_proj", "v_proj"])
    assert model.model.layers[0].self_attn.q_proj.lora_magnitude_vector is not None


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("variant", FAMILIES, ids=str)
def test_every_family_has_peft_s_gradients(variant: Variant, bits: int, tmp_path: Path) -> None:
    """On an adapter that PEFT made and saved, every factor and magnitude moved; rank-stabilised."""
    reference = tiny_model(variant)
    saved(reference, tmp_path / "base")
    if bits == 4:
        quantize_as_bitsandbytes(reference)
    targets = [
        name for name in variant.target_modules if not variant.has_experts or name.startswith(("q", "k", "v", "o"))
    ]
    config = PeftConfig(
        r=4, lora_alpha=6, target_modules=targets, use_dora=True, use_rslora=True, task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(reference, config).eval()
    expected = peft_parameters(peft_model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in expected.items():
            if "magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    peft_model.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(tmp_path / "base", bits=bits, device="cpu"), tmp_path / "adapter")

    input_ids = token_ids(2, LONG)
    labels = input_ids.masked_fill(torch.arange(LONG) % 7 == 3, -100)
    theirs, mine = peft_model(input_ids=input_ids, labels=labels).loss, ours(input_ids, labels=labels).loss
    assert abs(mine - theirs) < 1e-5
    theirs.backward()
    mine.backward()
    actual = adapter_state(ours)
    assert actual.keys() == expected.keys()
    for name, parameter in expected.items():
        assert parameter.grad.norm() > 1e-7, f"{name} gets no gradient"
        assert relative_error(actual[name].grad, parameter.grad) < 1e-4, name


def test_what_an_adapter_says_of_itself() -> None:
    config = LoraConfig(r=4, target_modules=("q_proj",), use_dora=True)
    assert LoraConfig.from_json(config.to_json()) == config
    assert LoraConfig.from_json(replace(config, use_dora=False).to_json()).use_dora is False
    assert (
        LoraConfig.from_json('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}').use_dora
        is False
    )
