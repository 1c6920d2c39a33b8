"""Stacks of experts: one by one into the stack and out of it again, under the names that files have."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels.nf4_eager import nf4_dequantize, nf4_quantize
from slothcore.layers.adapted_weight import NF4_BUFFERS
from slothcore.layers.experts import ExpertLinear, expert_path, stack_path
from slothcore.layers.moe import Experts

NAMES = ("w1", "w3", "w2")
EXPERTS, IN, OUT = 3, 64, 48


def random_weights(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(OUT, IN, generator=generator).to(dtype) for _ in range(EXPERTS)]


def placed(weights: list, **options) -> ExpertLinear:
    layer = ExpertLinear(EXPERTS, IN, OUT, device="meta")
    # In any order, as files may have it.
    for index in (2, 0, 1):
        layer.place_expert(index, weights[index], **options)
    return layer


def random_experts(*, bits: int, seed: int = 0) -> Experts:
    experts = Experts(IN, OUT, num_experts=EXPERTS, names=NAMES, activation="silu", device="meta")
    generator = torch.Generator().manual_seed(seed)
    for layer in experts.projections():
        for index in range(EXPERTS):
            weight = torch.randn(layer.out_features, layer.in_features, generator=generator)
            layer.place_expert(index, nf4_quantize(weight) if bits == 4 else weight)
        factors = [torch.randn(shape, generator=generator) for shape in layer.factor_shapes(4)]
        layer.attach_lora(*factors, scaling=0.5)
    return experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [False, True])
def test_dense_experts(dtype: torch.dtype, trains: bool) -> None:
    weights = random_weights(dtype=dtype)
    layer = placed(weights, requires_grad=trains)
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert layer.is_frozen is not trains
    assert torch.equal(layer.weight, torch.stack(weights))
    assert torch.equal(layer.dequantized(torch.float32), torch.stack(weights).float())


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_experts_are_those_that_came_in(double_quant: bool) -> None:
    """Each was quantised alone, and none of its bits depends on the others."""
    quantized = [nf4_quantize(weight, double_quant=double_quant) for weight in random_weights()]
    layer = placed(quantized)
    assert layer.is_nf4
    assert layer.is_frozen
    stack = layer.base_weight()
    assert layer.base_weight() is stack, "made anew although nothing moved"
    for index, weight in enumerate(quantized):
        expert = stack.expert(index)
        assert torch.equal(expert.packed, weight.packed)
        assert torch.equal(expert.absmax, weight.absmax)
        assert torch.equal(nf4_dequantize(expert, dtype=torch.float32), nf4_dequantize(weight, dtype=torch.float32))
        assert torch.equal(layer.dequantized_expert(index, torch.float32), nf4_dequantize(weight, dtype=torch.float32))
    assert torch.equal(layer.dequantized(torch.float32)[1], layer.dequantized_expert(1, torch.float32))


def test_experts_quantised_in_different_ways_are_refused() -> None:
    first, second, _ = random_weights()
    layer = ExpertLinear(EXPERTS, IN, OUT, device="meta")
    layer.place_expert(0, nf4_quantize(first))
    with pytest.raises(ValueError, match="expert 1 is quantised in another way"):
        layer.place_expert(1, nf4_quantize(second, double_quant=False))
    with pytest.raises(ValueError, match=r"must have shape \(48, 64\) in this layer, got \(64, 48\)"):
        layer.place_expert(1, second.T)


def test_a_cast_leaves_the_statistics_of_nf4_alone() -> None:
    layer = placed([nf4_quantize(weight) for weight in random_weights()])
    layer.attach_lora(*(torch.ones(shape) for shape in layer.factor_shapes(2)), scaling=1.0)
    before = layer.dequantized(torch.float32)
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype == torch.bfloat16
    assert layer.weight_nested_absmax.dtype == torch.float32
    assert torch.equal(layer.dequantized(torch.float32), before)
    assert layer.base_weight().packed is layer.weight


def test_delta_weight_and_refused_factors() -> None:
    layer = placed(random_weights())
    with pytest.raises(ValueError, match="no LoRA term"):
        layer.delta_weight()
    generator = torch.Generator().manual_seed(1)
    lora_A, lora_B = (torch.randn(shape, generator=generator) for shape in layer.factor_shapes(4))
    layer.attach_lora(lora_A, lora_B, scaling=0.25)
    assert layer.projection().scaling == 0.25
    for index in range(EXPERTS):
        torch.testing.assert_close(layer.delta_weight()[index], 0.25 * lora_B[index] @ lora_A[index])
    layer.detach_lora()
    assert layer.projection().lora_A is None
    for wrong in ((lora_A[:2], lora_B), (lora_A, lora_B[:, :, :2]), (lora_A[0], lora_B[0])):
        with pytest.raises(ValueError, match="must have shapes"):
            layer.attach_lora(*wrong, scaling=1.0)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1"):
        layer.attach_lora(lora_A, lora_B, scaling=1.0, dropout=1.0)


def test_dropout_only_in_training() -> None:
    layer = placed(random_weights())
    layer.attach_lora(*(torch.ones(shape) for shape in layer.factor_shapes(2)), scaling=1.0, dropout=0.3)
    assert layer.train().projection().dropout == 0.3
    assert layer.eval().projection().dropout == 0.0


@pytest.mark.parametrize("bits", [32, 4])
def test_state_dict_has_a_name_for_each_expert(bits: int) -> None:
    experts = random_experts(bits=bits)
    state = experts.state_dict()
    parts = (*(NF4_BUFFERS if bits == 4 else ("weight",)), "lora_A", "lora_B")
    assert set(state) == {f"{index}.{name}.{part}" for index in range(EXPERTS) for name in NAMES for part in parts}
    assert state["2.w3.lora_B"].shape == (OUT, 4)
    assert torch.equal(state["2.w3.lora_B"], experts.w3.lora_B[2])
    assert state["1.w2.weight"].data_ptr() == experts.w2.weight[1].data_ptr(), "a window, no copy"

    other = random_experts(bits=bits, seed=1)
    assert not torch.equal(other.w2.weight, experts.w2.weight)
    outer = torch.nn.ModuleDict({"experts": other})
    outer.load_state_dict({f"experts.{name}": tensor for name, tensor in state.items()})
    for name, tensor in outer.state_dict().items():
        assert torch.equal(tensor, state[name.removeprefix("experts.")]), name
    assert torch.equal(other.w1.dequantized(torch.float32), experts.w1.dequantized(torch.float32))


def test_a_state_dict_that_does_not_fit_is_refused_by_its_own_names() -> None:
    experts = torch.nn.ModuleDict({"experts": random_experts(bits=32)})
    state = experts.state_dict()
    del state["experts.1.w3.weight"]
    state["experts.3.w3.weight"] = state["experts.0.w3.weight"]
    state["experts.0.w1.weight"] = state["experts.0.w1.weight"][:5]
    with pytest.raises(RuntimeError) as caught:
        experts.load_state_dict(state)
    message = str(caught.value)
    assert 'Missing key(s) in state_dict: "experts.1.w3.weight"' in message
    assert 'Unexpected key(s) in state_dict: "experts.3.w3.weight"' in message
    assert "experts.0.w1.weight has the shape (5, 64), but this model needs (48, 64)" in message


def test_paths() -> None:
    assert expert_path("model.layers.0.mlp.experts.gate_proj", 3) == "model.layers.0.mlp.experts.3.gate_proj"
    assert stack_path("model.layers.0.mlp.experts.3.gate_proj") == ("model.layers.0.mlp.experts.gate_proj", 3)
    for path in ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.experts.gate_proj", "experts", ""):
        assert stack_path(path) is None
