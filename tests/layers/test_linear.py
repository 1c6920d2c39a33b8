"""The linear layer: its states, what moves and casts it, and which computation each state takes."""

import gc
import weakref
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.kernels import nf4_eager
from slothcore.layers.adapted_weight import NF4_BUFFERS
from slothcore.layers.linear import Linear, gated_mlp, project_together

IN, OUT, RANK = 64, 96, 8


def layer(
    out: int = OUT,
    inner: int = IN,
    *,
    bits: int = 32,
    lora: bool = False,
    bias: bool = False,
    trainable: bool = False,
    dropout: float = 0.0,
    double_quant: bool = True,
) -> Linear:
    linear = Linear(inner, out, bias=bias, dtype=torch.float32, device="cpu")
    weight = torch.randn(out, inner) / inner**0.5
    if bits == 4:
        linear.set_nf4(nf4_eager.nf4_quantize(weight, double_quant=double_quant))
    else:
        linear.set_dense(torch.nn.Parameter(weight, requires_grad=trainable))
    if linear.bias is not None:
        torch.nn.init.normal_(linear.bias)
    if lora:
        linear.attach_lora(torch.randn(RANK, inner) / 8, torch.randn(out, RANK), scaling=0.5, dropout=dropout)
    return linear


def plain(linear: Linear, x: Tensor) -> Tensor:
    """The layer without dropout, written out in torch."""
    weight = linear.weight if not linear.is_nf4 else linear.dequantized(x.dtype)
    y = F.linear(x, weight, linear.bias)
    return y if linear.lora_A is None else y + linear.lora_scaling * (x @ linear.lora_A.T) @ linear.lora_B.T


def trainable_gradients(module: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x} | {n: p for n, p in module.named_parameters() if p.requires_grad}
    # A fixed direction that is no multiple of the identity, so that transposed gradients differ.
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


STATES = {
    "dense frozen": {},
    "dense trainable": {"trainable": True},
    "dense LoRA": {"lora": True},
    "dense trainable LoRA": {"trainable": True, "lora": True},
    "NF4": {"bits": 4},
    "NF4 LoRA": {"bits": 4, "lora": True},
    "NF4 without double quantisation": {"bits": 4, "lora": True, "double_quant": False},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_every_state_computes_the_written_equation(state: str, bias: bool) -> None:
    linear = layer(bias=bias, **STATES[state]).double()
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    y, expected = linear(x), plain(linear, x)
    torch.testing.assert_close(y, expected)
    expected_gradients = trainable_gradients(linear, x, expected)
    gradients = trainable_gradients(linear, x, y)
    assert set(gradients) == {"x"} | {
        *(["weight"] if STATES[state].get("trainable") else []),
        *(["lora_A", "lora_B"] if STATES[state].get("lora") else []),
        *(["bias"] if bias else []),
    }
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[name], expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("state", STATES)
def test_any_leading_shape(state: str) -> None:
    linear = layer(**STATES[state])
    x = torch.randn(2, 3, IN)
    torch.testing.assert_close(linear(x), linear(x.view(6, IN)).view(2, 3, OUT))
    assert linear(x[0, 0]).shape == (OUT,)
    assert linear(x[:, :0]).shape == (2, 0, OUT)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("trainable", [False, True])
def test_dropout_only_in_training_mode(bits: int, trainable: bool) -> None:
    linear = layer(bits=bits, lora=True, dropout=0.5, trainable=trainable and bits == 32)
    x = torch.randn(7, IN)
    assert not torch.equal(linear(x), linear(x))
    linear.eval()
    torch.testing.assert_close(linear(x), plain(linear, x))


def test_nf4_keeps_names_types_and_bits() -> None:
    weight = torch.randn(OUT, IN)
    packed = nf4_eager.nf4_quantize(weight)
    linear = Linear(IN, OUT, dtype=torch.bfloat16, device="cpu")
    linear.set_nf4(packed)
    assert linear.is_nf4
    assert linear.is_frozen
    assert set(linear.state_dict()) == set(NF4_BUFFERS)
    assert list(linear.parameters()) == []
    assert torch.equal(linear.dequantized(torch.float32), nf4_eager.nf4_dequantize(packed, dtype=torch.float32))
    linear.set_dense(weight)
    assert not linear.is_nf4
    assert not linear.weight.requires_grad
    assert set(linear.state_dict()) == {"weight"}
    assert torch.equal(linear.dequantized(torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: torch.nn.Sequential(m).to(torch.bfloat16)[0],
    ],
    ids=["to bfloat16", "half", "double", "to device and dtype", "parent"],
)
def test_casting_a_module_does_not_touch_nf4_statistics(cast, double_quant: bool) -> None:
    linear = layer(bits=4, lora=True, bias=True, double_quant=double_quant)
    before = {name: None if b is None else b.clone() for name, b in linear.named_buffers()}
    decoded = linear.dequantized(torch.float32)
    linear = cast(linear)
    for name, buffer in linear.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert linear.lora_A.dtype == linear.bias.dtype != torch.float32
    assert torch.equal(linear.dequantized(torch.float32), decoded)
    assert linear(torch.randn(3, IN, dtype=linear.bias.dtype)).dtype == linear.bias.dtype


def test_moving_takes_every_part() -> None:
    linear = layer(bits=4, lora=True)
    linear.base_weight()
    linear.to("meta")
    assert {t.device.type for t in linear.state_dict().values()} == {"meta"}
    assert linear.base_weight().device.type == "meta"
    emptied = linear.to_empty(device="cpu")
    assert {t.device.type for t in emptied.state_dict().values()} == {"cpu"}
    assert emptied.base_weight().nested_absmax.dtype == torch.float32


def test_moving_lets_go_of_the_old_parts() -> None:
    linear = layer(bits=4)
    old = weakref.ref(linear.base_weight().packed)
    linear.to("meta")
    gc.collect()
    assert old() is None


def test_loading_a_state_dict_replaces_the_nf4_weight() -> None:
    first, second = layer(bits=4), layer(bits=4)
    first.base_weight()
    for assign in (False, True):
        target = deepcopy(first)
        target.load_state_dict(second.state_dict(), assign=assign)
        assert torch.equal(target.dequantized(torch.float32), second.dequantized(torch.float32))


def test_meta_layer_can_be_filled() -> None:
    linear = Linear(IN, OUT, bias=True, dtype=torch.bfloat16, device="meta")
    assert linear.weight.is_meta
    assert linear.weight.requires_grad
    weight = torch.randn(OUT, IN)
    linear.set_dense(weight)
    assert torch.equal(linear.weight, weight)


def test_detaching_lora_restores_the_base() -> None:
    linear, x = layer(bits=4, lora=True), torch.randn(3, IN)
    expected_delta = 0.5 * linear.lora_B @ linear.lora_A
    torch.testing.assert_close(linear.delta_weight(), expected_delta.detach())
    assert linear.delta_weight().dtype == torch.float32
    assert not linear.delta_weight().requires_grad
    linear.detach_lora()
    torch.testing.assert_close(linear(x), F.linear(x, linear.dequantized(torch.float32)))
    assert linear.lora_scaling == 1.0
    with pytest.raises(ValueError, match="attach_lora"):
        linear.delta_weight()


def test_errors_name_what_does_not_fit() -> None:
    linear = layer()
    with pytest.raises(ValueError, match=r"lora_A must have shape \(8, 64\)"):
        linear.attach_lora(torch.zeros(8, 65), torch.zeros(OUT, 8), scaling=1.0)
    with pytest.raises(ValueError, match=r"lora_B must have shape \(96, 8\)"):
        linear.attach_lora(torch.zeros(8, IN), torch.zeros(OUT, 9), scaling=1.0)
    with pytest.raises(ValueError, match="below 1"):
        linear.attach_lora(torch.zeros(8, IN), torch.zeros(OUT, 8), scaling=1.0, dropout=1.0)
    with pytest.raises(ValueError, match=r"NF4 weight must have shape \(96, 64\)"):
        linear.set_nf4(nf4_eager.nf4_quantize(torch.randn(IN, OUT)))
    with pytest.raises(ValueError, match=r"weight must have shape \(96, 64\)"):
        linear.set_dense(torch.randn(IN, OUT))
    assert linear.lora_A is None


MIXTURES = {
    "NF4 LoRA": [STATES["NF4 LoRA"]] * 3,
    "frozen, some LoRA": [STATES["dense LoRA"], STATES["dense frozen"], STATES["NF4 LoRA"]],
    "trainable": [STATES["dense trainable"]] * 3,
    "one trainable": [STATES["NF4 LoRA"], STATES["dense trainable"], STATES["dense trainable LoRA"]],
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_project_together_is_each_on_its_own(mixture: str) -> None:
    linears = torch.nn.ModuleList(
        layer(out, bias=True, **state) for out, state in zip((96, 32, 32), MIXTURES[mixture], strict=True)
    ).double()
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    y, expected = project_together(x, linears), torch.cat([plain(linear, x) for linear in linears], dim=-1)
    torch.testing.assert_close(y, expected)
    expected_gradients = trainable_gradients(linears, x, expected)
    for name, gradient in trainable_gradients(linears, x, y).items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_gated_mlp_is_its_equation(mixture: str, activation: str) -> None:
    shapes = ((OUT, IN), (OUT, IN), (IN, OUT))
    linears = torch.nn.ModuleList(
        layer(*shape, bias=True, **state) for shape, state in zip(shapes, MIXTURES[mixture], strict=True)
    ).double()
    gate, up, down = linears
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    expected = plain(down, act(plain(gate, x)) * plain(up, x))
    y = gated_mlp(x, (gate, up), down, activation=activation)
    torch.testing.assert_close(y, expected)
    expected_gradients = trainable_gradients(linears, x, expected)
    for name, gradient in trainable_gradients(linears, x, y).items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.gpu
def test_moving_to_the_gpu_and_casting_there() -> None:
    linear = layer(bits=4, lora=True)
    expected = linear.dequantized(torch.bfloat16)
    linear = linear.to("cuda", torch.bfloat16)
    assert {t.device.type for t in linear.state_dict().values()} == {"cuda"}
    assert linear.weight_nested_absmax.dtype == torch.float32
    assert torch.equal(linear.dequantized(torch.bfloat16).cpu(), expected)
    assert linear(torch.randn(5, IN, device="cuda", dtype=torch.bfloat16)).isfinite().all()
