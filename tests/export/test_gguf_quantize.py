"""The bytes of GGUF's kinds against llama.cpp's own quantisers, and the numbers that come back out of them."""

import platform
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gguf_quantize import llama_cpp_quantizer
from slothcore.export import gguf_quantize
from slothcore.export.gguf_quantize import quantize
from slothcore.export.gguf_types import BLOCKS, Kind, row_bytes

PACKED: tuple[Kind, ...] = ("Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
COLUMNS = 768


def ordinary(rows: int = 384) -> Tensor:
    return torch.randn(rows, COLUMNS) * 0.02


def with_outliers() -> Tensor:
    return torch.distributions.StudentT(2.0).sample((96, COLUMNS)) * 0.02


def with_ties() -> Tensor:
    """Few values, so that steps, signs of the largest magnitude and errors tie."""
    return torch.randint(-5, 6, (96, COLUMNS)) / 2.0


def sixteen_bit() -> Tensor:
    return torch.randn(96, COLUMNS).bfloat16().float()


def tied_steps() -> Tensor:
    """Numbers half way between two integers of Q8_0."""
    weight = torch.arange(COLUMNS).remainder(127) + 0.5
    weight[::32] = 127.0
    return torch.stack((weight, -weight, weight.roll(1)))


def odd_blocks() -> Tensor:
    """Zeros, constants, one sign, groups that are nothing beside others, tiny and huge numbers."""
    weight = torch.randn(24, COLUMNS)
    weight[0] = 0
    weight[1, :256] = 0
    weight[1, 300:332] = 1.5
    weight[1, 384:416] = -2
    weight[2] = 1
    weight[3] = -1
    weight[4].abs_()
    weight[5].abs_().neg_()
    weight[6] *= 1e-16
    weight[7] *= 1e-9
    weight[8] *= 1e3
    weight[9] += 5
    weight[10] -= 5
    weight[11, :40] *= 1e-6
    weight[12, 32:64] *= 1e-30
    weight[13, ::7] = 0
    weight[14, 3] = 100
    weight[15] = torch.linspace(-1, 1, COLUMNS)
    weight[16, :512] = -0.0
    return weight


WEIGHTS = (ordinary, with_outliers, with_ties, sixteen_bit, tied_steps, odd_blocks)


def numbers_of(packed: np.ndarray, kind: Kind) -> Tensor:
    gguf = pytest.importorskip("gguf")
    return torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]).copy())


@pytest.fixture(scope="module")
def llama_cpp() -> Callable[[Tensor, Kind], np.ndarray]:
    quantizer = llama_cpp_quantizer()
    if quantizer is None:
        pytest.skip("needs xllamacpp")
    return quantizer


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere llama.cpp fuses its products")
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("weight_of", WEIGHTS)
def test_bytes_are_llama_cpps(
    weight_of: Callable[[], Tensor], kind: Kind, llama_cpp: Callable[[Tensor, Kind], np.ndarray]
) -> None:
    weight = weight_of()
    np.testing.assert_array_equal(quantize(weight, kind), llama_cpp(weight, kind))


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("weight_of", WEIGHTS)
def test_errors_are_no_larger_than_llama_cpps(
    weight_of: Callable[[], Tensor], kind: Kind, llama_cpp: Callable[[Tensor, Kind], np.ndarray]
) -> None:
    weight = weight_of()
    own, theirs = ((numbers_of(of(weight, kind), kind) - weight).square().sum() for of in (quantize, llama_cpp))
    assert own <= 1.0001 * theirs


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1"])
def test_bytes_are_the_gguf_librarys_where_it_quantises(kind: Kind) -> None:
    gguf = pytest.importorskip("gguf")
    weight = ordinary()
    packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]).view(np.uint8)
    np.testing.assert_array_equal(quantize(weight, kind), packed)


@pytest.mark.parametrize(
    ("kind", "steps"), [("Q8_0", 254), ("Q6_K", 63), ("Q5_1", 31), ("Q5_0", 31), ("Q5_K", 31), ("Q4_K", 15)]
)
def test_no_number_moves_further_than_its_bits_allow(kind: Kind, steps: int) -> None:
    """Half a step of its group, but for what the group's scale lost when it was rounded."""
    weight = ordinary()
    group = 16 if kind == "Q6_K" else 32
    groups = weight.reshape(-1, group)
    spread = groups.amax(1) - groups.amin(1)
    if kind in ("Q8_0", "Q6_K", "Q5_0"):  # as many steps on either side of zero
        spread = 2 * groups.abs().amax(1)
    error = (numbers_of(quantize(weight, kind), kind) - weight).reshape(-1, group).abs().amax(1)
    # Searches trade the outermost number of a group for the others.
    assert (error <= spread / steps * (1.5 if kind.endswith("K") else 1.01)).all()


def test_more_bits_err_less() -> None:
    weight = ordinary()
    errors = {
        kind: ((numbers_of(quantize(weight, kind), kind) - weight).norm() / weight.norm()).item()
        for kind in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
    }
    # Each bit halves the error, or nearly so.
    for fewer, more, bits in (("Q4_K", "Q5_K", 1), ("Q5_K", "Q6_K", 1), ("Q6_K", "Q8_0", 2), ("Q8_0", "F16", 3)):
        assert errors[more] < errors[fewer] / 1.7**bits
    assert errors["Q4_K"] < 0.08


@pytest.mark.parametrize("kind", PACKED)
def test_numbers_that_fit_come_back_as_they_were(kind: Kind) -> None:
    """Integers over powers of two: factors that float16 holds, and every integer of every group used."""
    numbers = BLOCKS[kind][0]
    highest = {"Q8_0": 127, "Q5_0": 15, "Q5_1": 31, "Q4_K": 15, "Q5_K": 31, "Q6_K": 31}[kind]
    lowest = {"Q8_0": -127, "Q5_0": -16, "Q6_K": -32}.get(kind, 0)
    weight = torch.randint(lowest, highest + 1, (8, 2 * numbers)).float()
    ends = torch.tensor([lowest, highest]).float()
    weight.view(8, -1, 16)[:, :, :2] = ends if lowest else ends.flip(0)
    # The scale of 63 of 63, or of -128 of 128, so that each group's own factor is exact, too.
    scale = {"Q4_K": 63 / 64, "Q5_K": 63 / 64}.get(kind, 1 / 64)
    torch.testing.assert_close(numbers_of(quantize(weight * scale, kind), kind), weight * scale, rtol=0, atol=0)


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_shape_dtype_and_layout(kind: Kind) -> None:
    experts = torch.randn(3, 5, 512).bfloat16()
    packed = quantize(experts, kind)
    assert packed.shape == (3, 5, row_bytes(kind, 512))
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed.reshape(15, -1), quantize(experts.float().reshape(15, 512), kind))
    np.testing.assert_array_equal(packed, quantize(torch.nn.Parameter(experts), kind))
    columns_first = experts.float().transpose(0, 2).contiguous().transpose(0, 2)
    np.testing.assert_array_equal(packed, quantize(columns_first, kind))


@pytest.mark.parametrize("kind", PACKED)
def test_bytes_do_not_depend_on_how_many_numbers_are_done_at_once(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_outliers()
    whole = quantize(weight, kind)
    monkeypatch.setattr(gguf_quantize, "NUMBERS_A_THREAD", 1280)
    np.testing.assert_array_equal(quantize(weight, kind), whole)


@pytest.mark.parametrize("kind", PACKED)
def test_many_threads_write_what_one_writes(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_outliers()
    before = torch.get_num_threads()
    monkeypatch.setattr(gguf_quantize, "NUMBERS_A_THREAD", 1280)
    try:
        torch.set_num_threads(1)
        alone = quantize(weight, kind)
        torch.set_num_threads(3)
        np.testing.assert_array_equal(quantize(weight, kind), alone)
        weight[50, 50] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight, kind)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.usefixtures("nan_filled_empty")
def test_every_byte_is_written(kind: Kind) -> None:
    weight = ordinary(7)
    assert (numbers_of(quantize(weight, kind), kind) - weight).norm() < 0.1 * weight.norm()


def test_the_weight_stays_as_it_was() -> None:
    weight = odd_blocks()
    before = weight.clone()
    for kind in BLOCKS:
        quantize(weight, kind)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(kind: Kind, number: float) -> None:
    weight = ordinary(4)
    weight[2, 345] = number
    with pytest.raises(ValueError, match="a weight is not finite, or too large for"):
        quantize(weight, kind)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too large for torch\.float16; .* write BF16"):
        quantize(torch.full((1, 32), 1e5), "F16")
    with pytest.raises(ValueError, match="too large for the float16 factors"):
        quantize(torch.full((1, 32), 1e8), "Q8_0")


def test_rows_of_broken_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="Q4_K needs rows of a multiple of 256 numbers, got 384; write F16 instead"):
        quantize(torch.randn(4, 384), "Q4_K")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("weight_of", WEIGHTS)
def test_a_gpu_gives_the_same_bytes(weight_of: Callable[[], Tensor], kind: Kind) -> None:
    weight = weight_of()
    np.testing.assert_array_equal(quantize(weight.cuda(), kind), quantize(weight, kind))
