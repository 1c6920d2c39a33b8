"""The product with an NF4 weight decoded in the inner loop, against dequantise-then-multiply."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slothcore.kernels import nf4_eager, nf4_gemm, nf4_gemm_eager
from slothcore.kernels.nf4_gemm import LinearConfig, linear_config
from slothcore.kernels.nf4_tensor import Nf4Tensor
from tests.numerics import assert_as_accurate_as_eager

# Odd row counts around the tile of 16, odd out_features, block counts that neither the step nor the parts divide.
SHAPES = ((1, 100, 192), (1, 33, 448), (3, 70, 64), (17, 130, 448), (33, 64, 192))
CONFIGS = {
    "default": None,
    "three parts, two blocks a step": LinearConfig(block_m=16, block_n=32, parts=3, step=2),
    "more parts than blocks": LinearConfig(block_m=32, block_n=64, parts=16),
    "one part, step beyond the end": LinearConfig(block_m=16, block_n=64, parts=1, step=8),
}
# For 16-bit x: steps of whole parts and beyond their ends, two fragments a warp, tiles wider than the weight.
PERMUTE_CONFIGS = {
    "one part": LinearConfig(16, 64, parts=1, kernel="registers"),
    "two parts, two fragments": LinearConfig(16, 128, parts=2, kernel="registers"),
    "three parts, eight warps": LinearConfig(32, 128, parts=3, num_warps=8, kernel="registers"),
    "four slices": LinearConfig(4, 16, parts=1, kernel="registers", slices=4),
    "two slices of two parts": LinearConfig(8, 64, parts=2, num_warps=8, kernel="registers", slices=2),
    "prefetched": LinearConfig(16, 64, parts=2, kernel="registers", prefetch=True, max_registers=96),
} | {f"default up to {rule.rows}": replace(rule.tile, parts=2) for rule in nf4_gemm.PERMUTE_RULES}


def operands(
    rows: int,
    out_features: int,
    in_features: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: str,
    double_quant: bool = True,
) -> tuple[Tensor, Nf4Tensor, dict[str, Tensor]]:
    """x, weight and the optional operands; rank 0 leaves LoRA and bias out."""
    dense = torch.randn(out_features, in_features, device=device) * 0.05
    weight = nf4_eager.nf4_quantize(dense, double_quant=double_quant)
    x = torch.randn(rows, in_features).to(device, dtype)
    options = {}
    if rank:
        options["lora_x"] = torch.randn(rows, rank).to(device, dtype)
        options["lora_B"] = (torch.randn(out_features, rank) * 0.1).to(device, dtype)
        options["bias"] = torch.randn(out_features).to(device, dtype)
    return x, weight, options


def exact_linear(x: Tensor, weight: Nf4Tensor, *, lora_x=None, lora_B=None, bias=None) -> Tensor:
    """The answer in float64 for the weight as rounded to x.dtype: that rounding is part of the definition."""
    y = x.double() @ nf4_eager.nf4_dequantize(weight, dtype=x.dtype).double().T
    if lora_x is not None:
        y += lora_x.double() @ lora_B.double().T
    return y if bias is None else y + bias.double()


def assert_accurate(actual: Tensor, x: Tensor, weight: Nf4Tensor, options: dict[str, Tensor]) -> None:
    eager = nf4_gemm_eager.nf4_linear(x, weight, **options)
    assert actual.dtype == x.dtype
    assert_as_accurate_as_eager(actual, eager, exact_linear(x, weight, **options))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("rank", [0, 1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_as_accurate_as_eager(kernel_device, nan_filled_empty, shape, dtype, rank, config) -> None:
    x, weight, options = operands(*shape, rank, dtype=dtype, device=kernel_device)
    assert_accurate(nf4_gemm.nf4_linear(x, weight, **options, _config=config), x, weight, options)


@pytest.mark.parametrize("config", PERMUTE_CONFIGS.values(), ids=PERMUTE_CONFIGS)
@pytest.mark.parametrize("rank", [0, 70])
@pytest.mark.parametrize("shape", [(1, 100, 192), (3, 70, 64), (17, 130, 448), (2, 130, 512)])
def test_permuting_kernel_as_accurate_as_eager(kernel_device, nan_filled_empty, shape, rank, config) -> None:
    double_quant = rank != 70
    x, weight, options = operands(*shape, rank, dtype=torch.float16, device=kernel_device, double_quant=double_quant)
    assert_accurate(nf4_gemm.nf4_linear(x, weight, **options, _config=config), x, weight, options)


@pytest.mark.parametrize("config", PERMUTE_CONFIGS.values(), ids=PERMUTE_CONFIGS)
def test_permuting_kernel_decodes_the_exact_weight(kernel_device, nan_filled_empty, config) -> None:
    """Rows of the identity pick single weights; 320 columns are one step of four blocks and a quarter."""
    x, weight, _ = operands(320, 70, 320, 0, dtype=torch.float16, device=kernel_device)
    # Some of each block, with both nibbles and both halves of a byte's word: every 7th column.
    x = torch.eye(320, device=kernel_device, dtype=torch.float16)[::7]
    dense = nf4_eager.nf4_dequantize(weight, dtype=torch.float16)
    assert torch.equal(nf4_gemm.nf4_linear(x, weight, _config=config), dense.T[::7])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("with_lora", [True, False])
def test_kernel_takes_lora_and_bias_separately(kernel_device, nan_filled_empty, rows, parts, with_lora) -> None:
    x, weight, options = operands(rows, 40, 256, 70, dtype=torch.float32, device=kernel_device, double_quant=False)
    for name in ("bias",) if with_lora else ("lora_x", "lora_B"):
        del options[name]
    config = LinearConfig(block_m=1 if rows == 1 else 16, block_n=16, parts=parts)
    assert_accurate(nf4_gemm.nf4_linear(x, weight, **options, _config=config), x, weight, options)


def test_kernel_decodes_the_exact_weight(kernel_device, nan_filled_empty) -> None:
    """Rows of the identity pick single weights, so the result must equal the dequantised weight to the last bit."""
    x, weight, _ = operands(64, 48, 64, 0, dtype=torch.float32, device=kernel_device)
    for dtype in (torch.float32, torch.float16):
        x = torch.eye(64, device=kernel_device, dtype=dtype)
        dense = nf4_eager.nf4_dequantize(weight, dtype=dtype)
        for decode in ("gather", "select", "load"):
            config = LinearConfig(block_m=16, block_n=32, parts=1, decode=decode)
            assert torch.equal(nf4_gemm.nf4_linear(x, weight, _config=config), dense.T)
        one_row = nf4_gemm.nf4_linear(x[5:6], weight)
        assert torch.equal(one_row[0], dense[:, 5])


@pytest.mark.parametrize("kernel", ["table", "registers"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("parts", [1, 2])
def test_kernel_reads_and_writes_strided_rows(kernel_device, nan_filled_empty, rows, parts, kernel) -> None:
    dtype = torch.float32 if kernel == "table" else torch.float16
    x, weight, options = operands(rows, 40, 128, 8, dtype=dtype, device=kernel_device)
    config = {
        "table": LinearConfig(block_m=1 if rows == 1 else 16, block_n=32, parts=parts),
        "registers": LinearConfig(16, 64, parts, kernel="registers"),
    }[kernel]
    expected = nf4_gemm.nf4_linear(x, weight, **options, _config=config)
    wide_x = torch.full((rows, 301), float("nan"), device=kernel_device, dtype=dtype)
    wide_x[:, 101:229] = x
    wide_out = torch.full((rows, 100), float("nan"), device=kernel_device, dtype=dtype)
    out = wide_out[:, 30:70]
    strided = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in options.items()}
    assert nf4_gemm.nf4_linear(wide_x[:, 101:229], weight, **strided, out=out, _config=config) is out
    assert torch.equal(out, expected)
    assert wide_out[:, :30].isnan().all()
    assert wide_out[:, 70:].isnan().all()
    columns_first = x.T.contiguous().T
    assert torch.equal(nf4_gemm.nf4_linear(columns_first, weight, **options, _config=config), expected)


@pytest.mark.parametrize("ops", [nf4_gemm, nf4_gemm_eager], ids=["kernel", "eager"])
def test_no_rows_give_no_rows(kernel_device, ops) -> None:
    x, weight, options = operands(0, 40, 128, 8, dtype=torch.float32, device=kernel_device)
    assert ops.nf4_linear(x, weight, **options).shape == (0, 40)


def test_eager_in_float64_multiplies_the_float32_weight() -> None:
    x, weight, options = operands(3, 10, 64, 4, dtype=torch.float64, device="cpu")
    dense = nf4_eager.nf4_dequantize(weight, dtype=torch.float32).double()
    expected = x @ dense.T + options["lora_x"] @ options["lora_B"].T + options["bias"]
    assert (nf4_gemm_eager.nf4_linear(x, weight, **options) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("ops", [nf4_gemm, nf4_gemm_eager], ids=["kernel", "eager"])
def test_bad_input_is_refused(ops) -> None:
    x, weight, options = operands(3, 10, 64, 4, dtype=torch.float32, device="cpu")
    odd = nf4_eager.nf4_quantize(torch.ones(8, 96))
    with pytest.raises(ValueError, match=r"in_features divisible by 64, got 96; dequantise"):
        ops.nf4_linear(torch.ones(2, 96), odd)
    with pytest.raises(ValueError, match="int64"):
        ops.nf4_linear(x.long(), weight)
    with pytest.raises(ValueError, match=r"x must be.*\(3, 64\).*\(3, 32\)"):
        ops.nf4_linear(x[:, :32], weight)
    with pytest.raises(ValueError, match="lora_x and lora_B together"):
        ops.nf4_linear(x, weight, lora_x=options["lora_x"])
    with pytest.raises(ValueError, match=r"lora_B must be.*\(10, 4\).*\(9, 4\)"):
        ops.nf4_linear(x, weight, lora_x=options["lora_x"], lora_B=options["lora_B"][:9])
    with pytest.raises(ValueError, match=r"lora_x must be torch.float32.*torch.float16"):
        ops.nf4_linear(x, weight, lora_x=options["lora_x"].half(), lora_B=options["lora_B"])
    with pytest.raises(ValueError, match=r"bias must be.*\(10,\).*\(9,\)"):
        ops.nf4_linear(x, weight, bias=options["bias"][:9])
    with pytest.raises(ValueError, match=r"out must be.*\(3, 10\).*\(2, 10\)"):
        ops.nf4_linear(x, weight, out=torch.empty(2, 10))
    with pytest.raises(ValueError, match="dense rows"):
        ops.nf4_linear(x, weight, out=torch.empty(10, 3).T)


def test_launch_configuration_is_sane_for_every_model_shape() -> None:
    sizes = (64, 576, 2048, 4096, 8192, 14336, 28672, 128256)
    for rows, out_features, in_features in itertools.product((1, 2, 4, 5, 16, 17, 64, 65, 300), sizes, sizes):
        for permute in (False, True):
            config = linear_config(rows, out_features, in_features, permute=permute)
            assert (config.kernel == "table") == (
                not permute or rows == 300 or (rows == 65 and in_features <= out_features)
            )
            assert (config.block_m == 1) == (rows == 1 and not permute)
            assert config.block_m >= min(16, rows)
            assert config.parts == 1 or in_features // config.parts >= 512
            if config.kernel == "registers":
                assert config.block_n * config.slices % (16 * config.num_warps) == 0
                assert config.block_m * config.slices >= 16


@pytest.mark.parametrize(("rows", "parts"), [(1, (1, 1, 1)), (16, (8, 4, 8)), (32, (8, 2, 8)), (64, (4, 2, 8))])
def test_columns_are_cut_into_as_many_parts_as_measured_fastest(rows, parts) -> None:
    shapes = ((4096, 4096), (14336, 4096), (4096, 14336))
    assert tuple(linear_config(rows, *shape, permute=True).parts for shape in shapes) == parts
    assert linear_config(128, 4096, 14336, permute=True).parts == 4


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_float32_keeps_fewer_turns_in_flight(rows) -> None:
    assert linear_config(rows, 4096, 4096, itemsize=4).num_stages == 2
    assert linear_config(rows, 4096, 4096, itemsize=4).block_m <= 128


def test_permutes_are_for_16_bit_on_hopper_only() -> None:
    x, weight, _ = operands(2, 8, 64, 0, dtype=torch.float16, device="cpu")
    assert not nf4_gemm.can_permute(x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 30, 61, 128, 300])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (1000, 2048), (896, 4864), (4864, 896)])
def test_gpu_kernel_as_accurate_as_eager(nan_filled_empty, shape, rows, dtype) -> None:
    x, weight, options = operands(rows, *shape, 16, dtype=dtype, device="cuda")
    actual = nf4_gemm.nf4_linear(x, weight, **options)
    assert_accurate(actual, x, weight, options)
    again = nf4_gemm.nf4_linear(x, weight, **options)
    assert torch.equal(actual, again), "adding the parts in a fixed order makes the result repeatable"
    assert_accurate(nf4_gemm.nf4_linear(x, weight), x, weight, {})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("decode", ["gather", "select", "load"])
def test_gpu_kernel_decodes_the_exact_weight(dtype, decode) -> None:
    _, weight, _ = operands(1, 1000, 128, 0, dtype=dtype, device="cuda")
    x = torch.eye(128, device="cuda", dtype=dtype)
    dense = nf4_eager.nf4_dequantize(weight, dtype=dtype)
    config = LinearConfig(block_m=64, block_n=64, parts=1, num_stages=2, decode=decode)
    assert torch.equal(nf4_gemm.nf4_linear(x, weight, _config=config), dense.T)


@pytest.mark.gpu
@pytest.mark.parametrize("config", PERMUTE_CONFIGS.values(), ids=PERMUTE_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_permuting_kernel_decodes_the_exact_weight(dtype, config) -> None:
    _, weight, _ = operands(1, 1000, 320, 0, dtype=dtype, device="cuda")
    if not nf4_gemm.can_permute(torch.empty(1, 320, device="cuda", dtype=dtype), weight):
        pytest.skip("needs a Hopper GPU")
    x = torch.eye(320, device="cuda", dtype=dtype)
    dense = nf4_eager.nf4_dequantize(weight, dtype=dtype)
    assert torch.equal(nf4_gemm.nf4_linear(x, weight, _config=config), dense.T)


@pytest.mark.gpu
def test_gpu_unaligned_weight_is_decoded_by_the_table() -> None:
    x, weight, _ = operands(4, 64, 256, 0, dtype=torch.float16, device="cuda")
    shifted = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(weight.packed)
    unaligned = replace(weight, packed=shifted)
    assert not nf4_gemm.can_permute(x, unaligned)
    assert_accurate(nf4_gemm.nf4_linear(x, unaligned), x, weight, {})
