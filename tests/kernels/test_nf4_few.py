"""Products of few rows with NF4 weights in few launches, against dequantise-then-multiply."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels import nf4_eager, nf4_few, nf4_few_eager
from slothcore.kernels.glu import glu_forward
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_gemm import LinearConfig, linear_by_permutes
from slothcore.kernels.nf4_tensor import Nf4Tensor
from tests.kernels.few_rows import exact_linear
from tests.numerics import assert_as_accurate_as_eager

# Rows, in_features, out_features of each weight. The blocks of a row: fewer than a step, a step and one, whole steps of
# four and of eight warps; outputs that no program of 16 rows ends with.
SHAPES = (
    (1, 64, (10,)),
    (1, 320, (33, 20)),
    (3, 1024, (40, 17, 16)),
    (9, 320, (24, 24)),
    (16, 2048, (18,)),
)
RANKS = {"no LoRA": (0, 0, 0), "one without": (5, 0, 24), "longer than a step": (70, 16, 8)}


def operands(
    rows: int, in_features: int, out_features: tuple[int, ...], ranks: tuple[int, ...], *,
    dtype: torch.dtype, device: str, biased: bool = False, double_quant: bool = True,
    factor_dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[Nf4Tensor], list[Tensor | None], Terms]:  # fmt: skip
    """x, weights, every A, and the terms without u."""
    like = {"device": device, "dtype": factor_dtype or dtype}
    weights = [
        nf4_eager.nf4_quantize(torch.randn(n, in_features, device=device) * 0.05, double_quant=double_quant)
        for n in out_features
    ]
    ranks = ranks[: len(out_features)]
    lora_A = [torch.randn(r, in_features).to(**like) * 0.1 if r else None for r in ranks]
    lora_B = [torch.randn(n, r).to(**like) * 0.1 if r else None for n, r in zip(out_features, ranks, strict=True)]
    biases = [torch.randn(n).to(device, dtype) if biased else None for n in out_features]
    x = torch.randn(rows, in_features).to(device, dtype)
    return x, weights, lora_A, Terms(None, lora_B, [0.5 * (i + 1) for i in range(len(ranks))], biases)


def with_input(x: Tensor, lora_A: list[Tensor | None], terms: Terms) -> Terms:
    return terms if all(A is None for A in lora_A) else terms._replace(lora_x=nf4_few_eager.lora_input(x, lora_A))


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_as_accurate_as_eager(kernel_device, nan_filled_empty, shape, ranks) -> None:
    many = shape[0] > 3
    x, weights, lora_A, terms = operands(
        *shape, ranks, dtype=torch.float16, device=kernel_device, biased=many, double_quant=not many,
        factor_dtype=torch.float32 if many else None,
    )  # fmt: skip
    terms = with_input(x, lora_A, terms)
    eager, exact = nf4_few_eager.linear(x, weights, terms), exact_linear(x, weights, terms)
    assert_as_accurate_as_eager(nf4_few.linear(x, weights, terms), eager, exact)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("out_features", [(20, 20), (40,)], ids=["two weights", "one weight"])
@pytest.mark.parametrize("rows", [1, 11])
def test_gated_equals_both_products_and_the_activation(
    kernel_device, nan_filled_empty, rows, out_features, activation
) -> None:
    x, weights, lora_A, terms = operands(
        rows, 320, out_features, (5, 8, 0), dtype=torch.float16, device=kernel_device, biased=rows > 1
    )
    terms = with_input(x, lora_A, terms)
    eager = nf4_few_eager.gated(x, weights, terms, activation=activation)
    gate, up = exact_linear(x, weights, terms).chunk(2, dim=1)
    exact = nf4_few_eager.glu_forward(torch.cat((gate, up), dim=1), activation=activation)
    assert_as_accurate_as_eager(nf4_few.gated(x, weights, terms, activation=activation), eager, exact)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gated_of_parts_has_the_bits_of_the_operations_apart(
    kernel_device, nan_filled_empty, parts, activation
) -> None:
    x, weights, lora_A, terms = operands(11, 768, (20, 20), (5, 8, 0), dtype=torch.float16, device=kernel_device)
    terms = with_input(x, lora_A, terms)
    config = LinearConfig(16, 64, parts, kernel="registers", prefetch=True)
    gate_up = linear_by_permutes(x, weights, terms, _config=config)
    expected = glu_forward(gate_up, activation=activation)
    assert torch.equal(linear_by_permutes(x, weights, terms, activation=activation, _config=config), expected)


@pytest.mark.parametrize("in_features", [64, 320, 1024])
def test_decodes_the_exact_weight(kernel_device, nan_filled_empty, in_features) -> None:
    """Rows of the identity pick single weights, of every place in a word and of every block."""
    x, weights, _, terms = operands(1, in_features, (24, 9), (0, 0), dtype=torch.float16, device=kernel_device)
    x = torch.eye(in_features, device=kernel_device, dtype=torch.float16)[:: 7 if in_features > 64 else 1]
    dense = torch.cat([nf4_eager.nf4_dequantize(weight, dtype=torch.float16) for weight in weights])
    for rows in x.split(nf4_few.LANE_ROWS):
        assert torch.equal(nf4_few.linear(rows, weights, terms), rows @ dense.T)
    assert torch.equal(nf4_few.linear(x[: nf4_few.MOST_ROWS], weights, terms), x[: nf4_few.MOST_ROWS] @ dense.T)


@pytest.mark.parametrize("factor_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [(5,), (8, 0, 3), (1, 2, 24)], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_lora_input_as_accurate_as_eager(kernel_device, nan_filled_empty, rows, ranks, factor_dtype) -> None:
    x, _, lora_A, _ = operands(
        rows, 448, (16,) * len(ranks), ranks, dtype=torch.float16, device=kernel_device, factor_dtype=factor_dtype
    )
    rounded = torch.cat([A.to(x.dtype) for A in lora_A if A is not None])
    eager = nf4_few_eager.lora_input(x, lora_A)
    assert_as_accurate_as_eager(nf4_few.lora_input(x, lora_A), eager, x.double() @ rounded.double().T)
    wide = torch.full((rows, 512), float("nan"), dtype=x.dtype, device=kernel_device)
    wide[:, 16:464] = x
    assert torch.equal(nf4_few.lora_input(wide[:, 16:464], lora_A), nf4_few.lora_input(x, lora_A))


def test_lora_input_walks_rows_longer_than_a_program_reads(kernel_device, nan_filled_empty, monkeypatch) -> None:
    x, _, lora_A, _ = operands(2, 448, (16,), (3,), dtype=torch.float32, device=kernel_device)
    monkeypatch.setattr(nf4_few, "INPUT_COLUMNS", 128)
    exact = x.double() @ lora_A[0].double().T
    assert_as_accurate_as_eager(nf4_few.lora_input(x, lora_A), nf4_few_eager.lora_input(x, lora_A), exact)


def test_bits_of_a_row_do_not_depend_on_the_others(kernel_device, nan_filled_empty) -> None:
    """As long as the kernel of lanes has them all; u's never do."""
    x, weights, lora_A, terms = operands(9, 1024, (24, 24), (5, 8), dtype=torch.float16, device=kernel_device)
    u = nf4_few.lora_input(x, lora_A)
    assert torch.equal(nf4_few.lora_input(x[7:8], lora_A), u[7:8])
    x, together = x[: nf4_few.LANE_ROWS], terms._replace(lora_x=u[: nf4_few.LANE_ROWS])
    for rows in (slice(0, 1), slice(1, 4)):
        apart = terms._replace(lora_x=nf4_few.lora_input(x[rows], lora_A))
        assert torch.equal(nf4_few.linear(x[rows], weights, apart), nf4_few.linear(x, weights, together)[rows])
        gated = nf4_few.gated(x, weights, together, activation="silu")
        assert torch.equal(nf4_few.gated(x[rows], weights, apart, activation="silu"), gated[rows])


def test_reads_strided_rows(kernel_device, nan_filled_empty) -> None:
    x, weights, _, terms = operands(6, 256, (24,), (0,), dtype=torch.float16, device=kernel_device)
    wide = torch.full((6, 512), float("nan"), dtype=torch.float16, device=kernel_device)
    wide[:, 128:384] = x
    assert torch.equal(nf4_few.linear(wide[:, 128:384], weights, terms), nf4_few.linear(x, weights, terms))


def test_takes_what_its_kernel_can_read(monkeypatch) -> None:
    """Everything but the kind of GPU, which decides on the rest of `can_permute`."""
    monkeypatch.setattr(nf4_few, "can_permute", lambda x, weight: x.itemsize == 2)
    x, weights, lora_A, terms = operands(3, 256, (24, 16, 16), (5, 0, 8), dtype=torch.float16, device="cpu")

    def takes(x: Tensor = x, weights=weights, A=lora_A, B=terms.lora_B, biases=terms.biases) -> bool:
        return nf4_few.takes(x, weights, A, B, biases)

    assert takes()
    assert takes(x[:1].expand(nf4_few.MOST_ROWS, 256).contiguous())
    assert not takes(x[:1].expand(nf4_few.MOST_ROWS + 1, 256).contiguous())
    assert not takes(x[:0])
    assert not takes(x.float())
    assert not takes(x.T.contiguous().T)
    assert not takes(torch.zeros(3, 260, dtype=torch.float16)[:, 1:257])
    assert not takes(torch.zeros(3, 260, dtype=torch.float16)[:, :256])
    assert takes(torch.zeros(1, 260, dtype=torch.float16)[:, :256])
    assert not takes(weights=weights + weights[:1])
    assert not takes(weights=[nf4_eager.nf4_quantize(torch.randn(24, 256), double_quant=False), *weights[1:]])
    assert not takes(A=[lora_A[0].float(), None, lora_A[2]])
    assert not takes(B=[terms.lora_B[0].float(), None, terms.lora_B[2]])
    assert takes(A=[None if A is None else A.float() for A in lora_A])
    bias = torch.zeros(16, dtype=torch.float16)
    assert not takes(biases=[bias, None, bias])


LLAMA = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize(("in_features", "out_features"), LLAMA, ids=str)
def test_real_sizes_as_accurate_as_eager(
    kernel_device, nan_filled_empty, in_features, out_features, rows, dtype
) -> None:
    x, weights, lora_A, terms = operands(
        rows, in_features, out_features, (16, 16, 16), dtype=dtype, device="cuda", factor_dtype=torch.float32
    )
    assert nf4_few.takes(x, weights, lora_A, terms.lora_B, terms.biases)
    rounded = torch.cat([A.to(dtype) for A in lora_A])
    u = nf4_few.lora_input(x, lora_A)
    assert_as_accurate_as_eager(u, nf4_few_eager.lora_input(x, lora_A), x.double() @ rounded.double().T)
    terms = terms._replace(lora_x=u)
    exact = exact_linear(x, weights, terms)
    assert_as_accurate_as_eager(nf4_few.linear(x, weights, terms), nf4_few_eager.linear(x, weights, terms), exact)
    if len(weights) == 2:
        gated = nf4_few.gated(x, weights, terms, activation="silu")
        eager = nf4_few_eager.gated(x, weights, terms, activation="silu")
        assert_as_accurate_as_eager(gated, eager, nf4_few_eager.glu_forward(exact, activation="silu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [320, 4096])
def test_gpu_decodes_the_exact_weight(kernel_device, nan_filled_empty, in_features, dtype) -> None:
    _, weights, _, terms = operands(1, in_features, (1000, 72), (0, 0), dtype=dtype, device="cuda")
    dense = torch.cat([nf4_eager.nf4_dequantize(weight, dtype=dtype) for weight in weights])
    columns = torch.randperm(in_features)[:320].cuda()
    for some in (*columns.split(nf4_few.LANE_ROWS), *columns.split(nf4_few.MOST_ROWS)):
        x = torch.nn.functional.one_hot(some, in_features).to(dtype)
        assert torch.equal(nf4_few.linear(x, weights, terms), dense.T[some])
