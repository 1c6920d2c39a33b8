"""Widths that are no power of two, rows cut into several pieces, and gates so large that an exponential overflows."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.kernels import glu, glu_eager, launch
from slothcore.kernels.glu import StripTile
from slothcore.kernels.glu_eager import Activation
from tests.numerics import assert_as_accurate_as_eager, relative_error

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
OPS = pytest.mark.parametrize("ops", [glu, glu_eager], ids=["fused", "eager"])


def make_inputs(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    gate_up = 2 * torch.randn(num_tokens, 2 * width)
    dy = torch.randn(num_tokens, width)
    return gate_up.to(device, dtype), dy.to(device, dtype)


def run(ops: ModuleType, gate_up: Tensor, dy: Tensor, activation: Activation) -> dict[str, Tensor]:
    d_gate_up, recomputed = ops.glu_backward(dy, gate_up, activation=activation)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    y = ops.glu_forward(gate_up, activation=activation)
    return {"y": y, "d_gate": d_gate, "d_up": d_up, "recomputed y": recomputed}


def check_against_eager(gate_up: Tensor, dy: Tensor, activation: Activation) -> None:
    fused = run(glu, gate_up, dy, activation)
    eager = run(glu_eager, gate_up, dy, activation)
    exact = run(glu_eager, gate_up.double(), dy.double(), activation)
    for name in fused:
        assert fused[name].dtype == gate_up.dtype
        assert_as_accurate_as_eager(fused[name], eager[name], exact[name], what=name)


@ACTIVATIONS
@DTYPES
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (7, 37), (33, 80), (3, 4100)])
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager(
    num_tokens: int, width: int, dtype: torch.dtype, activation: Activation, kernel_device: str
) -> None:
    check_against_eager(*make_inputs(num_tokens, width, dtype, kernel_device), activation)


@ACTIVATIONS
@DTYPES
def test_eager_rounds_as_the_separate_operations_do(dtype: torch.dtype, activation: Activation) -> None:
    gate_up, _ = make_inputs(9, 48, dtype, "cpu")
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    assert torch.equal(glu_eager.glu_forward(gate_up, activation=activation), activated * up)


@ACTIVATIONS
def test_rounds_where_eager_does(activation: Activation, kernel_device: str) -> None:
    """A rounding left out or moved would change a third of the results' last digit."""
    inputs = make_inputs(64, 80, torch.float16, kernel_device)
    fused, eager = (run(ops, *inputs, activation) for ops in (glu, glu_eager))
    for name in fused:
        assert (fused[name] == eager[name]).float().mean() > 0.95, name


@OPS
@ACTIVATIONS
@DTYPES
def test_backward_recomputes_the_output_to_the_bit(
    ops: ModuleType, activation: Activation, dtype: torch.dtype, kernel_device: str
) -> None:
    gate_up, dy = make_inputs(5, 70, dtype, kernel_device)
    results = run(ops, gate_up, dy, activation)
    assert torch.equal(results["y"], results["recomputed y"])


@OPS
@ACTIVATIONS
def test_inplace_overwrites_its_input_with_the_same_gradient(
    ops: ModuleType, activation: Activation, kernel_device: str
) -> None:
    buffer = torch.randn(7, 80, device=kernel_device)
    gate_up, dy = buffer[:, 3:77], torch.randn(7, 37, device=kernel_device)
    untouched = buffer.clone()
    expected, expected_y = ops.glu_backward(dy, gate_up, activation=activation)
    assert torch.equal(buffer, untouched)
    d_gate_up, y = ops.glu_backward(dy, gate_up, activation=activation, inplace=True)
    assert d_gate_up is gate_up
    untouched[:, 3:77] = expected
    assert torch.equal(buffer, untouched)
    assert torch.equal(y, expected_y)


@OPS
@pytest.mark.parametrize("inplace", [True, False])
def test_the_output_is_not_made_where_it_is_not_wanted(ops: ModuleType, inplace: bool, kernel_device: str) -> None:
    gate_up, dy = make_inputs(7, 37, torch.float16, kernel_device)
    expected, _ = ops.glu_backward(dy, gate_up, activation="silu")
    d_gate_up, y = ops.glu_backward(dy, gate_up, activation="silu", inplace=inplace, output=False)
    assert y is None
    assert torch.equal(d_gate_up, expected)


def test_strides_do_not_change_a_bit(kernel_device: str) -> None:
    gate_up, dy = make_inputs(7, 37, torch.float32, kernel_device)
    dy = dy[:, :1].expand(7, 37)
    expected = run(glu, gate_up, dy.contiguous(), "silu")
    sliced = torch.cat([gate_up, gate_up], dim=1)[:, 74:]
    transposed = gate_up.T.contiguous().T
    for strided in (sliced, transposed):
        for name, actual in run(glu, strided, dy, "silu").items():
            assert torch.equal(actual, expected[name]), name


@OPS
@ACTIVATIONS
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_saturate(ops: ModuleType, activation: Activation, kernel_device: str) -> None:
    """Far left the gate is shut, far right it is the identity; neither may become NaN."""
    gate = torch.tensor([[-3e4, -300.0, -90.0, 90.0, 300.0, 3e4]], device=kernel_device)
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1)
    results = run(ops, gate_up, torch.ones_like(gate), activation)
    open_gate = (gate > 0).float()
    # SiLU leaves -90 * exp(-90), a subnormal.
    torch.testing.assert_close(results["y"], gate * open_gate, rtol=0, atol=1e-36)
    torch.testing.assert_close(results["d_gate"], open_gate, rtol=0, atol=1e-36)
    torch.testing.assert_close(results["d_up"], gate * open_gate, rtol=0, atol=1e-36)


def test_tanh_gelu_keeps_its_digits_on_the_left(kernel_device: str) -> None:
    """1 + tanh(z) has no digit left below z = -9; the sigmoid form keeps them all."""
    gate = torch.linspace(-6, -4, 64, device=kernel_device)[None]
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1)
    z = (2 / torch.pi) ** 0.5 * (gate.double() + 0.044715 * gate.double() ** 3)
    exact = gate.double() * torch.sigmoid(2 * z)
    actual = glu.glu_forward(gate_up, activation="gelu_pytorch_tanh").double()
    assert ((actual - exact) / exact).abs().max() < 1e-5


def test_no_tokens(kernel_device: str) -> None:
    gate_up, dy = make_inputs(0, 8, torch.float32, kernel_device)
    assert glu.glu_forward(gate_up, activation="silu").shape == (0, 8)
    d_gate_up, y = glu.glu_backward(dy, gate_up, activation="silu")
    assert d_gate_up.shape == (0, 16)
    assert y.shape == (0, 8)


@pytest.mark.parametrize("width", [1, 37, 2048, 11008, 14336])
def test_tiles_are_pieces_of_a_row(width: int) -> None:
    tile = launch.partial_row_tile(width)
    assert tile.rows == 1
    assert tile.columns <= 2048
    assert tile.columns // 2 < width
    assert tile.columns <= 32 * tile.warps * 16


# Small enough that a program walks over several tiles of rows, the last of them partial; some shares have none.
SMALL_TILE = StripTile(rows=16, columns=32, warps=4, stages=2, shares=3)


def check_with_dA(num_tokens: int, width: int, rank: int, dtype: torch.dtype, activation, device: str, **tile) -> None:
    """The gradient has the bits of `glu_backward`; dA is as near to float64 as a product with its y, twice the same."""
    gate_up, dy = make_inputs(num_tokens, width, dtype, device)
    v = torch.randn(num_tokens, rank).to(device, dtype)
    d_gate_up, dA = glu.glu_backward_and_dA(dy, gate_up, v, activation=activation, **tile)
    expected, y = glu.glu_backward(dy, gate_up, activation=activation)
    assert dA.dtype == torch.float32
    assert dA.is_contiguous()
    assert_as_accurate_as_eager(d_gate_up, expected, expected.double(), what="d_gate_up")
    # Rounding errors of the activation itself would drown those of the sum.
    eager = v.float().t() @ y.float()
    assert_as_accurate_as_eager(dA, eager, v.double().t() @ y.double(), what="dA")
    overwritten = gate_up.clone()
    again, again_dA = glu.glu_backward_and_dA(dy, overwritten, v, activation=activation, inplace=True, **tile)
    assert again is overwritten
    assert torch.equal(again, d_gate_up)
    assert torch.equal(again_dA, dA)


@ACTIVATIONS
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs for real: see the gpu tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_tokens", "width", "rank"), [(1, 32, 8), (7, 64, 16), (33, 96, 24), (70, 32, 32)])
@pytest.mark.usefixtures("nan_filled_empty")
def test_one_pass_with_dA_in_interpreter(num_tokens: int, width: int, rank: int, dtype, activation) -> None:
    check_with_dA(num_tokens, width, rank, dtype, activation, "cpu", _tile=SMALL_TILE)


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_eager_dA_is_the_product_with_the_recomputed_output(dtype: torch.dtype, activation: Activation) -> None:
    gate_up, dy = make_inputs(9, 20, dtype, "cpu")
    v = torch.randn(9, 8).to(dtype)
    expected, y = glu_eager.glu_backward(dy, gate_up, activation=activation)
    d_gate_up, dA = glu_eager.glu_backward_and_dA(dy, gate_up, v, activation=activation)
    assert torch.equal(d_gate_up, expected)
    assert dA.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(dA, v.double().t() @ y.double()) < 1e-6


def test_one_pass_with_dA_is_taken_only_where_it_wins() -> None:
    assert glu.one_pass_pays(8192, 14336)
    assert glu.one_pass_pays(4096, 8192)
    assert not glu.one_pass_pays(4095, 14336)
    assert not glu.one_pass_pays(8192, 4864)


@pytest.mark.gpu
@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_tokens", "width", "rank"), [(4096, 14336, 16), (4133, 8192, 8), (300, 4864, 32)])
@pytest.mark.usefixtures("nan_filled_empty")
def test_one_pass_with_dA_at_real_sizes(num_tokens: int, width: int, rank: int, dtype, activation) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the pass is for Hopper")
    check_with_dA(num_tokens, width, rank, dtype, activation, "cuda")


@pytest.mark.gpu
def test_one_pass_with_dA_is_not_taken_for_what_it_cannot_do() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the pass is for Hopper")
    gate_up, dy = (torch.zeros(4096, n, dtype=torch.bfloat16, device="cuda") for n in (16384, 8192))
    v = torch.zeros(4096, 64, dtype=torch.bfloat16, device="cuda")
    few = v[:, :16].contiguous()
    assert glu.takes_dA(dy, gate_up, few)
    assert not glu.takes_dA(dy, gate_up, v)
    assert not glu.takes_dA(dy, gate_up, v[:, :16])
    assert not glu.takes_dA(dy.float(), gate_up.float(), few.float())


@pytest.mark.gpu
@ACTIVATIONS
@DTYPES
@pytest.mark.parametrize(("num_tokens", "width"), [(512, 14336), (1, 14336), (33, 11008), (300, 4864)])
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager_at_real_sizes(num_tokens: int, width: int, dtype: torch.dtype, activation: Activation) -> None:
    check_against_eager(*make_inputs(num_tokens, width, dtype, "cuda"), activation)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last of four rows starts at element 3 * 2^30."""
    near, dy = make_inputs(4, 64, torch.float16, "cuda")
    far = torch.empty(3 * 2**30 + 128, dtype=torch.float16, device="cuda").as_strided((4, 128), (2**30, 1))
    far.copy_(near)
    assert torch.equal(glu.glu_forward(far, activation="silu"), glu.glu_forward(near, activation="silu"))
    expected, _ = glu.glu_backward(dy, near, activation="silu")
    glu.glu_backward(dy, far, activation="silu", inplace=True)
    assert torch.equal(far, expected)
