"""NF4: bits against bitsandbytes on the same device; the Triton kernels against the eager twin and CUDA's rules."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import NF4_CODE, Nf4Tensor, nested_code, nf4_code

# The interpreter divides by the absmax of a zero block too, as the hardware does, and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole blocks; a partial last block; odd counts; less than one block; more than one nested block, the last one partial.
SHAPES = ((64, 64), (2, 100), (3, 160), (7, 9), (1, 1), (5, 33), (129, 192))


@pytest.fixture
def bitsandbytes() -> Iterator[object]:
    """bitsandbytes.functional, without the torch.compile that it wraps around odd shapes on the CPU."""
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):
        yield functional


def random_weight(shape: tuple[int, int], dtype: torch.dtype, *, scale: float = 0.02) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, so that -0 differs from 0 and NaN equals itself."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    differing = int((bits(actual) != bits(expected).to(actual.device)).sum())
    assert differing == 0, f"{what}: {differing} of {actual.numel()} differ"


def assert_same_nf4(actual: Nf4Tensor, expected: Nf4Tensor) -> None:
    for name in ("packed", "absmax", "nested_absmax", "nested_offset", "nested_code"):
        mine, theirs = getattr(actual, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert_same_bits(mine, theirs, name)
    assert actual.shape == expected.shape


def from_bitsandbytes(packed: Tensor, state) -> Nf4Tensor:
    shape = tuple(state.shape)
    if not state.nested:
        return Nf4Tensor(packed.view(-1), state.absmax, None, None, None, shape)
    second = state.state2
    return Nf4Tensor(packed.view(-1), state.absmax, second.absmax, state.offset, second.code, shape)


def assert_equal_to_bitsandbytes(ops, functional, weight: Tensor, *, double_quant: bool) -> None:
    """Quantised parts and dequantised values of every dtype have bitsandbytes' bits on the device of `weight`."""
    packed, state = functional.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4", blocksize=64)
    mine = ops.nf4_quantize(weight, double_quant=double_quant)
    assert_same_nf4(mine, from_bitsandbytes(packed, state))
    # bitsandbytes' AVX-512 code starts a new block at each row of 32 (2i + 1) columns, though its quantiser does not.
    # One long row keeps it right.
    state.shape = torch.Size((1, weight.numel()))
    for dtype in DTYPES:
        state.dtype = dtype
        expected = functional.dequantize_4bit(packed, state).view(weight.shape)
        assert_same_bits(ops.nf4_dequantize(mine, dtype=dtype), expected, f"dequantised to {dtype}")


def threshold_weight(thresholds: Tensor) -> Tensor:
    """A block whose largest value is 1, so that scaling changes nothing: each threshold and its two neighbours."""
    infinity = torch.tensor(float("inf"))
    values = torch.cat(
        [
            thresholds,
            torch.nextafter(thresholds, infinity),
            torch.nextafter(thresholds, -infinity),
            nf4_code(torch.device("cpu")),
        ]
    )
    return torch.nn.functional.pad(values, (1, 64 - values.numel() - 1), value=1.0).view(1, 64)


def midpoints() -> Tensor:
    code = torch.tensor(NF4_CODE)
    return (code[:-1] + code[1:]) / 2


def test_code_tables_equal_bitsandbytes(bitsandbytes) -> None:
    assert_same_bits(torch.tensor(NF4_CODE), bitsandbytes.get_4bit_type("nf4", device="cpu"), "NF4 codes")
    assert_same_bits(nested_code(), bitsandbytes.create_dynamic_map(), "8-bit map")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_eager_equals_bitsandbytes(bitsandbytes, shape, dtype, double_quant) -> None:
    weight = random_weight(shape, dtype)
    assert_equal_to_bitsandbytes(nf4_eager, bitsandbytes, weight, double_quant=double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_eager_equals_bitsandbytes_over_several_chunks(bitsandbytes, double_quant) -> None:
    weight = random_weight((1031, 510), torch.float32)
    assert weight.numel() > nf4_eager.CHUNK_BLOCKS * 64, "must span chunks"
    assert_equal_to_bitsandbytes(nf4_eager, bitsandbytes, weight, double_quant=double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-36, 1e-30, 1e30], ids=lambda scale: f"scale{scale:g}")
def test_eager_equals_bitsandbytes_at_extremes(bitsandbytes, scale, double_quant) -> None:
    weight = random_weight((3, 160), torch.float32, scale=scale)  # 7.5 blocks
    assert_equal_to_bitsandbytes(nf4_eager, bitsandbytes, weight, double_quant=double_quant)


def test_eager_equals_bitsandbytes_with_some_blocks_zero(bitsandbytes) -> None:
    weight = random_weight((8, 128), torch.float32)
    weight[2:4] = 0
    weight[5, :64] = -0.0
    assert_equal_to_bitsandbytes(nf4_eager, bitsandbytes, weight, double_quant=True)


def test_eager_equals_bitsandbytes_at_ties(bitsandbytes) -> None:
    for thresholds in (midpoints(), torch.tensor(nf4.CODE_THRESHOLDS)):
        weight = threshold_weight(thresholds)
        assert_equal_to_bitsandbytes(nf4_eager, bitsandbytes, torch.cat([weight, -weight]), double_quant=False)


def test_eager_equals_bitsandbytes_for_bfloat16_ratios(bitsandbytes) -> None:
    """Quotients of 8-bit significands come close to thresholds again and again, unlike random float32 values."""
    weight = torch.randint(-256, 257, (512, 512)).to(torch.bfloat16)
    assert_equal_to_bitsandbytes(nf4_eager, bitsandbytes, weight, double_quant=True)


def test_eager_finds_the_nested_cells_of_bitsandbytes(bitsandbytes) -> None:
    """Every edge between two of the 65536 cells, from both sides, and random values of every magnitude."""
    edges = ((torch.arange(65535, dtype=torch.float64) + 0.5) / 65535 * 2 - 1).float()
    infinity = torch.tensor(float("inf"))
    spread = torch.randn(30_000) * 10.0 ** -(torch.rand(30_000) * 8)
    values = torch.cat([edges, torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity), spread])
    values[::256] = 1.0  # so that most blocks are scaled by exactly 1
    codes, nested_absmax, code_map = nf4_eager.quantize_absmax(values)
    expected, state = bitsandbytes.quantize_blockwise(values, blocksize=256)
    assert_same_bits(codes, expected, "codes")
    assert_same_bits(nested_absmax, state.absmax, "nested_absmax")
    assert_same_bits(code_map, state.code, "nested_code")


def test_eager_accepts_views_and_leaves_them_alone() -> None:
    weight = random_weight((96, 70), torch.bfloat16).T.requires_grad_()
    before = weight.detach().clone()
    assert_same_nf4(nf4_eager.nf4_quantize(weight), nf4_eager.nf4_quantize(before))
    assert torch.equal(weight, before)


def test_eager_ignores_the_default_device() -> None:
    weight = torch.randn(8, 64)
    expected = nf4_eager.nf4_quantize(weight)
    nf4_eager._nested_cells.cache_clear()
    with torch.device("meta"):
        assert_same_nf4(nf4_eager.nf4_quantize(weight), expected)


def test_kernel_thresholds_are_within_one_unit_of_the_midpoints() -> None:
    steps = torch.tensor(nf4.CODE_THRESHOLDS).view(torch.int32) - midpoints().view(torch.int32)
    assert steps.abs().max() == 1
    assert steps.count_nonzero() == 4


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_quantises_like_eager(kernel_device, nan_filled_empty, shape, dtype, double_quant) -> None:
    """Random values keep clear of the few points where CUDA and CPU rules differ (those have tests of their own)."""
    weight = random_weight(shape, dtype)
    eager = nf4_eager.nf4_quantize(weight, double_quant=False)
    kernel = nf4.nf4_quantize(weight.to(kernel_device), double_quant=double_quant)
    assert_same_bits(kernel.packed.cpu(), eager.packed, "packed")
    if not double_quant:
        assert_same_bits(kernel.absmax.cpu(), eager.absmax, "absmax")
        return
    # The nested codes may lie one apart; what they stand for may not be further from the absmax than eager's.
    eager = nf4_eager.nf4_quantize(weight)
    error = [(nf4_eager.dequantize_absmax(q).cpu() - eager_absmax(weight)).abs().max() for q in (kernel, eager)]
    assert error[0] <= error[1] * (1 + 1e-3) + 1e-12
    assert_same_bits(kernel.nested_code.cpu(), eager.nested_code, "nested_code")


def eager_absmax(weight: Tensor) -> Tensor:
    return nf4_eager.nf4_quantize(weight, double_quant=False).absmax


def test_kernel_follows_its_thresholds_at_ties(kernel_device, nan_filled_empty) -> None:
    weight = threshold_weight(torch.tensor(nf4.CODE_THRESHOLDS))
    packed = nf4.nf4_quantize(weight.to(kernel_device), double_quant=False).packed.cpu()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[1:46].view(3, 15)
    index = torch.arange(15, dtype=torch.uint8)
    assert torch.equal(codes[0], index), "a tie goes to the lower code"
    assert torch.equal(codes[1], index + 1), "just above a threshold"
    assert torch.equal(codes[2], index), "just below a threshold"


def test_kernel_gives_zero_blocks_code_zero(kernel_device, nan_filled_empty) -> None:
    """As bitsandbytes on CUDA; its CPU code gives 7. Both stand for zero."""
    for weight in (torch.zeros(2, 64), torch.full((2, 64), 1e-39), torch.zeros(3, 33)):
        quantised = nf4.nf4_quantize(weight.to(kernel_device), double_quant=False)
        assert torch.equal(quantised.packed.cpu(), torch.zeros_like(quantised.packed, device="cpu"))
        assert torch.equal(quantised.absmax.cpu(), torch.zeros_like(quantised.absmax, device="cpu"))
        assert nf4.nf4_dequantize(quantised, dtype=torch.float32).abs().max() == 0


def search_like_cuda(code_map: list[float], value: float) -> int:
    """bitsandbytes' binary search on CUDA, one value at a time, in float32."""
    pivot, lower_pivot, upper_pivot = 127, 0, 255
    step = 64
    while step:
        if value > code_map[pivot]:
            lower_pivot, pivot = pivot, pivot + step
        else:
            upper_pivot, pivot = pivot, pivot - step
        step //= 2
    half = torch.tensor(0.5)
    if value > code_map[pivot]:
        middle = (torch.tensor(code_map[upper_pivot]) + torch.tensor(code_map[pivot])) * half
        return upper_pivot if value > middle.item() else pivot
    middle = (torch.tensor(code_map[lower_pivot]) + torch.tensor(code_map[pivot])) * half
    return lower_pivot if value < middle.item() else pivot


def test_kernel_searches_the_map_like_cuda(kernel_device, nan_filled_empty) -> None:
    """Every value of the map, every midpoint and its neighbours, in nested blocks whose largest magnitude is 1."""
    code_map = nested_code()
    middles = (code_map[:-1] + code_map[1:]) * 0.5
    infinity = torch.tensor(float("inf"))
    values = torch.cat([code_map, middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)])
    groups = values[: values.numel() // 255 * 255].view(-1, 255)
    centred = torch.cat([torch.ones(groups.shape[0], 1), groups], dim=1).view(-1)[:-40].contiguous()
    codes, nested_absmax, _ = nf4.quantize_absmax(centred.to(kernel_device))
    expected = [search_like_cuda(code_map.tolist(), value) for value in centred.tolist()]
    assert codes.tolist() == expected
    assert torch.equal(nested_absmax.cpu(), torch.ones(groups.shape[0]))


def test_kernel_quantises_zero_nested_blocks(kernel_device, nan_filled_empty) -> None:
    codes, nested_absmax, _ = nf4.quantize_absmax(torch.zeros(300, device=kernel_device))
    assert codes.count_nonzero() == 0
    assert nested_absmax.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("decode", ["gather", "select", "load"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (7, 9), (5, 33), (70, 130)])
def test_kernel_dequantises_like_eager(kernel_device, nan_filled_empty, shape, double_quant, decode) -> None:
    """bfloat16 is left to the GPU: the interpreter truncates where the hardware rounds."""
    weight = nf4_eager.nf4_quantize(random_weight(shape, torch.float32).to(kernel_device), double_quant=double_quant)
    config = nf4.DequantizeConfig(decode=decode)
    for dtype in (torch.float32, torch.float16):
        actual = nf4.nf4_dequantize(weight, dtype=dtype, _config=config)
        assert_same_bits(actual, nf4_eager.nf4_dequantize(weight, dtype=dtype), f"{decode}, {dtype}")


@pytest.mark.parametrize("ops", [nf4, nf4_eager], ids=["kernel", "eager"])
def test_dequantise_writes_only_the_given_rows(kernel_device, ops) -> None:
    weight = nf4_eager.nf4_quantize(random_weight((6, 96), torch.float32).to(kernel_device))
    buffer = torch.full((12, 96), float("nan"), device=kernel_device)
    rows = buffer[3:9]
    assert ops.nf4_dequantize(weight, dtype=torch.float32, out=rows) is rows
    assert_same_bits(rows, nf4_eager.nf4_dequantize(weight, dtype=torch.float32), "rows")
    assert buffer[:3].isnan().all()
    assert buffer[9:].isnan().all()


def quantised_group(rows: Sequence[int], width: int, *, device: str, nested: Sequence[bool]) -> list[Nf4Tensor]:
    return [
        nf4_eager.nf4_quantize(random_weight((n, width), torch.float32).to(device), double_quant=double_quant)
        for n, double_quant in zip(rows, nested, strict=True)
    ]


@pytest.mark.parametrize("ops", [nf4, nf4_eager], ids=["kernel", "eager"])
@pytest.mark.parametrize("nested", [(True,) * 4, (False,) * 4, (True, False, True, True)])
@pytest.mark.parametrize("width", [64, 33])
@pytest.mark.parametrize("rows", [(70,), (6, 9), (70, 65, 1), (1, 130, 70), (3, 4, 5, 6)])
def test_group_has_the_bits_of_each_weight_alone(
    kernel_device, nan_filled_empty, ops, rows: tuple[int, ...], width: int, nested: tuple[bool, ...]
) -> None:
    """One weight, several, more than one launch takes, mixed kinds; partial blocks and programs at every border."""
    weights = quantised_group(rows, width, device=kernel_device, nested=nested[: len(rows)])
    for dtype in (torch.float32, torch.float16):
        expected = torch.cat([nf4_eager.nf4_dequantize(weight, dtype=dtype) for weight in weights])
        assert_same_bits(ops.nf4_dequantize_group(weights, dtype=dtype), expected, str(dtype))
    buffer = torch.full((sum(rows) + 4, width), float("nan"), device=kernel_device)
    middle = buffer[2:-2]
    assert ops.nf4_dequantize_group(weights, dtype=torch.float32, out=middle) is middle
    assert not middle.isnan().any()
    assert buffer[:2].isnan().all()
    assert buffer[-2:].isnan().all()


@pytest.mark.parametrize("ops", [nf4, nf4_eager], ids=["kernel", "eager"])
def test_bad_groups_are_refused(ops) -> None:
    weight, narrow = nf4_eager.nf4_quantize(torch.ones(2, 64)), nf4_eager.nf4_quantize(torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"equal in_features.*expand each alone"):
        ops.nf4_dequantize_group([weight, narrow], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"out must be.*\(4, 64\).*\(2, 64\)"):
        ops.nf4_dequantize_group([weight, weight], dtype=torch.float32, out=torch.empty(2, 64))
    with pytest.raises(ValueError, match="int32"):
        ops.nf4_dequantize_group([weight, weight], dtype=torch.int32)


def test_eager_expands_to_float64_without_rounding() -> None:
    weight = nf4_eager.nf4_quantize(random_weight((4, 64), torch.float32))
    exact = nf4_eager.nf4_dequantize(weight, dtype=torch.float64)
    assert torch.equal(exact, nf4_eager.nf4_dequantize(weight, dtype=torch.float32).double())


def test_nf4_is_about_half_a_byte_a_value() -> None:
    weight = nf4_eager.nf4_quantize(random_weight((256, 1024), torch.float32))
    values = 256 * 1024
    assert weight.nbytes == values // 2 + values // 64 + 4 * (values // 64 // 256) + 4 + 4 * 256


@pytest.mark.parametrize("ops", [nf4, nf4_eager], ids=["kernel", "eager"])
def test_bad_input_is_refused(ops) -> None:
    with pytest.raises(ValueError, match=r"float64.*convert the weight"):
        ops.nf4_quantize(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"non-empty matrix.*\(64,\)"):
        ops.nf4_quantize(torch.zeros(64))
    with pytest.raises(ValueError, match=r"non-empty matrix.*\(0, 64\)"):
        ops.nf4_quantize(torch.zeros(0, 64))
    weight = nf4_eager.nf4_quantize(torch.ones(2, 64))
    with pytest.raises(ValueError, match="int32"):
        ops.nf4_dequantize(weight, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"out must be.*\(3, 64\)"):
        ops.nf4_dequantize(weight, dtype=torch.float32, out=torch.empty(3, 64))
    with pytest.raises(ValueError, match="contiguous"):
        ops.nf4_dequantize(weight, dtype=torch.float32, out=torch.empty(2, 128)[:, :64])


def test_parts_that_do_not_belong_together_are_refused() -> None:
    weight = nf4_eager.nf4_quantize(torch.ones(4, 64))
    with pytest.raises(ValueError, match=r"NF4 packed must be.*\(256,\).*got.*\(128,\)"):
        replace(weight, shape=(8, 64))
    with pytest.raises(ValueError, match=r"absmax must be torch.uint8.*float32"):
        replace(weight, absmax=weight.absmax.float())
    with pytest.raises(ValueError, match="together"):
        replace(weight, nested_offset=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1000, 333), (7, 9), (2, 100)])
def test_gpu_kernel_equals_bitsandbytes(bitsandbytes, shape, dtype) -> None:
    weight = random_weight(shape, torch.float32).to("cuda", dtype)
    for double_quant in (True, False):
        assert_equal_to_bitsandbytes(nf4, bitsandbytes, weight, double_quant=double_quant)


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
def test_gpu_kernel_equals_bitsandbytes_at_ties_and_extremes(bitsandbytes, double_quant) -> None:
    ratios = torch.randint(-256, 257, (4096, 1024)).to(torch.bfloat16)
    ties = torch.cat([threshold_weight(midpoints()), threshold_weight(torch.tensor(nf4.CODE_THRESHOLDS))])
    zeros = random_weight((64, 256), torch.float32)
    zeros[5:40] = 0
    small, large = (random_weight((64, 256), torch.float32, scale=scale) for scale in (1e-30, 1e30))
    for weight in (ratios, ties, -ties, zeros, small, large):
        assert_equal_to_bitsandbytes(nf4, bitsandbytes, weight.cuda(), double_quant=double_quant)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["gather", "select", "load"])
def test_gpu_every_launch_configuration_gives_the_same_bits(decode) -> None:
    weight = nf4.nf4_quantize(random_weight((1024, 4096), torch.float32).cuda())
    for dtype in DTYPES:
        expected = nf4_eager.nf4_dequantize(weight, dtype=dtype)
        for blocks, num_warps in ((16, 4), (32, 8), (64, 4), (128, 8)):
            config = nf4.DequantizeConfig(blocks=blocks, num_warps=num_warps, decode=decode)
            assert_same_bits(nf4.nf4_dequantize(weight, dtype=dtype, _config=config), expected, str(config))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((1000, 7, 333), 333)])
def test_gpu_group_has_the_bits_of_each_weight_alone(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    for nested in (True, False):
        weights = quantised_group(rows, width, device="cuda", nested=[nested] * len(rows))
        expected = torch.cat([nf4.nf4_dequantize(weight, dtype=dtype) for weight in weights])
        assert_same_bits(nf4.nf4_dequantize_group(weights, dtype=dtype), expected, f"nested={nested}")
