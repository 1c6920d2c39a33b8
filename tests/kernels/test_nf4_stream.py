"""Products of few rows with NF4 weights as a stream, against dequantise-then-multiply."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slothcore.kernels import nf4_eager, nf4_few_eager, nf4_stream, nf4_stream_layout
from slothcore.kernels.gpu import has_gluon
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_stream_layout import plan
from slothcore.kernels.nf4_tensor import Nf4Tensor
from tests.kernels.compiled_for import found_by
from tests.kernels.few_rows import exact_linear
from tests.numerics import assert_as_accurate_as_eager


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("in_features", [256, 3584, 4096, 14336])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_plan_has_room_for_everything(rows: int, in_features: int, nested: bool) -> None:
    space = plan(rows, in_features, nested=nested)
    ring = 8 * (2176 if nested else 2304)
    rest = 2 * 8 * 512 + 32768
    x_bytes = rows * (in_features // 64 * 144 + 64)
    if space is None:
        assert 2 * ring + rest + x_bytes + 127 > nf4_stream_layout.MOST_SHARED
        return
    assert 2 <= space.stages <= nf4_stream_layout.MOST_STAGES
    assert space.total == space.stages * ring + rest + space.x_bytes
    assert space.total % 128 == 0
    assert nf4_stream_layout.LEAST_SHARED <= space.total <= nf4_stream_layout.MOST_SHARED
    # The barriers are the last 32 bytes: behind the last token, of whose part the last 80 are padding.
    assert space.x_bytes >= x_bytes


def test_a_multiprocessor_has_one_place() -> None:
    """Of 228 KB, of which each program takes one more than it asks for; and 20 thousand registers are left over."""
    assert nf4_stream_layout.MOST_SHARED + 1024 <= 228 * 1024
    assert 2 * (nf4_stream_layout.LEAST_SHARED + 1024) > 228 * 1024
    assert 32 * nf4_stream_layout.WARPS * nf4_stream.MOST_REGISTERS <= 65536 - 20000


def test_plan_of_real_shapes() -> None:
    assert plan(1, 4096, nested=True).stages == plan(4, 4096, nested=True).stages == nf4_stream_layout.MOST_STAGES
    assert plan(4, 14336, nested=True).stages == plan(4, 14336, nested=False).stages == 2
    assert plan(4, 28672, nested=True) is None


def test_takes_whole_units_that_can_be_copied() -> None:
    weight = nf4_eager.nf4_quantize(torch.randn(24, 512))
    x = torch.zeros(4, 512, dtype=torch.bfloat16)
    assert nf4_stream.fits(x, [weight, weight])
    assert not nf4_stream.takes(x, [weight])  # not on a GPU
    assert not nf4_stream.fits(torch.zeros(5, 512, dtype=torch.bfloat16), [weight])
    assert not nf4_stream.fits(x[:, :320], [nf4_eager.nf4_quantize(torch.randn(24, 320))])
    apart = torch.zeros(weight.absmax.numel() + 1, dtype=torch.uint8)[1:]
    assert not nf4_stream.fits(x, [weight, replace(weight, absmax=apart)])
    flat = nf4_eager.nf4_quantize(torch.randn(24, 512), double_quant=False)
    assert nf4_stream.fits(x, [flat])
    apart = torch.zeros(flat.absmax.numel() + 1)[1:]
    assert not nf4_stream.fits(x, [replace(flat, absmax=apart)])


SCRIPT = """
from slothcore.kernels import nf4_eager, nf4_stream, nf4_stream_layout
from slothcore.kernels.nf4_few_eager import Terms

nf4_stream.multiprocessors = lambda device: 132
nf4_stream.begins_early = lambda x: True
for rows, count, activation, nested, dtype in (
    (1, 3, None, True, torch.bfloat16), (4, 2, "silu", True, torch.bfloat16), (2, 1, "silu", False, torch.float16),
):
    weights = [nf4_eager.nf4_quantize(torch.ones(32, 4096), double_quant=nested) for _ in range(count)]
    x, u = torch.ones(rows, 4096).to(dtype), torch.ones(rows, 8 * count).to(dtype)
    biases = [None if nested else torch.ones(32).to(dtype)] * count
    terms = Terms(u, [torch.ones(32, 8)] * count, [1.0] * count, biases)
    out = torch.empty(rows, 32 * count if activation is None else 16 * count, dtype=dtype)
    nf4_stream.launch(x, weights, terms, out, activation=activation)
    kernel = compiled.pop()
    ptx, planned = kernel.asm["ptx"], nf4_stream_layout.plan(rows, 4096, nested=nested).total
    found.append([kernel.metadata.shared, planned, ptx.count("cp.async.cg"), ptx.count("griddepcontrol.wait")])
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_gluon(), reason="this Triton has no Gluon")
def test_kernel_compiles_for_hopper_and_has_the_planned_shared_memory() -> None:
    """To the byte: the kernel counts its addresses from the first, so Triton must not put anything of its own there."""
    found = found_by(SCRIPT)
    assert len(found) == 3
    for shared, planned, copies, waits in found:
        assert shared == planned
        assert copies >= 8
        assert waits == 1


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9 or not has_gluon():
        pytest.skip("the kernel is for Hopper, and for a Triton with Gluon")


def operands(
    rows: int, in_features: int, out_features: tuple[int, ...], ranks: tuple[int, ...], *,
    dtype: torch.dtype = torch.bfloat16, factor_dtype: torch.dtype = torch.float32, biased: bool = False,
    double_quant: bool = True,
) -> tuple[Tensor, list[Nf4Tensor], Terms]:  # fmt: skip
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    weights = [nf4_eager.nf4_quantize(normal(n, in_features) * 0.05, double_quant=double_quant) for n in out_features]
    lora_B = [normal(n, r).to(factor_dtype) * 0.1 if r else None for n, r in zip(out_features, ranks, strict=True)]
    u = normal(rows, sum(ranks)).to(dtype) if any(ranks) else None
    biases = [normal(n).to(dtype) if biased else None for n in out_features]
    terms = Terms(u, lora_B, [0.5 * (i + 1) for i in range(len(ranks))], biases)
    return normal(rows, in_features).to(dtype), weights, terms


def streamed(x: Tensor, weights: list[Nf4Tensor], terms: Terms, activation: str | None = None) -> Tensor:
    """To columns of a wider tensor, whose other columns must keep their NaN."""
    assert nf4_stream.takes(x, weights)
    width = sum(weight.shape[0] for weight in weights) // (1 if activation is None else 2)
    wide = x.new_full((x.shape[0], width + 16), float("nan"))
    out = nf4_stream.launch(x, weights, terms, wide[:, 8:-8], activation=activation)
    assert out.data_ptr() == wide[:, 8:].data_ptr()
    assert wide[:, :8].isnan().all()
    assert wide[:, -8:].isnan().all()
    return out


# Rows, in_features, out_features, ranks. One unit a row, fewer units than warps, a number that the warps do not divide;
# outputs that no tile ends with, fewer tiles than multiprocessors and many; no LoRA; more ranks than the warps have.
CASES = {
    "one unit": (1, 256, (18,), (0,)),
    "fewer units than warps": (4, 1280, (40, 24), (8, 0)),
    "units left over": (2, 3584, (24, 2500), (5, 16)),
    "many ranks": (3, 4096, (512, 136, 40), (16, 0, 150)),
    "three weights": (4, 4096, (4096, 1024, 1024), (16, 16, 16)),
    "more tiles than programs": (3, 2048, (9001,), (70,)),
    "long rows": (4, 14336, (4096,), (16,)),
}
GATED = {
    "one weight": (3, 1280, (40,), (8,)),
    "two weights": (1, 4096, (2500, 2500), (16, 16)),
    "ranks that differ": (4, 2048, (520, 520), (70, 80)),
    "no LoRA": (2, 4096, (3000, 3000), (0, 0)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_accurate_as_eager(hopper, nan_filled_empty, case, dtype) -> None:
    flat = dtype == torch.float16
    x, weights, terms = operands(
        *case, dtype=dtype, factor_dtype=dtype if flat else torch.float32, biased=flat, double_quant=not flat
    )
    eager, exact = nf4_few_eager.linear(x, weights, terms), exact_linear(x, weights, terms)
    assert_as_accurate_as_eager(streamed(x, weights, terms), eager, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GATED.values(), ids=GATED)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gated_as_accurate_as_eager(hopper, nan_filled_empty, case, activation) -> None:
    x, weights, terms = operands(*case, biased=activation == "silu")
    eager = nf4_few_eager.gated(x, weights, terms, activation=activation)
    exact = nf4_few_eager.glu_forward(exact_linear(x, weights, terms), activation=activation)
    assert_as_accurate_as_eager(streamed(x, weights, terms, activation), eager, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("in_features", [512, 4096])
def test_decodes_the_exact_weight(hopper, nan_filled_empty, in_features, double_quant, dtype) -> None:
    """Rows of the identity pick single weights, of every place in a word: by the table and by permutes."""
    _, weights, terms = operands(1, in_features, (1000, 72), (0, 0), dtype=dtype, double_quant=double_quant)
    dense = torch.cat([nf4_eager.nf4_dequantize(weight, dtype=dtype) for weight in weights])
    columns = torch.arange(512, device="cuda") * (in_features // 512) + torch.arange(512, device="cuda") % 8
    columns = columns.clamp(max=in_features - 1)
    for some in columns.split(4):
        x = torch.nn.functional.one_hot(some, in_features).to(dtype)
        assert torch.equal(streamed(x, weights, terms), dense.T[some])


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "silu"])
def test_bits_of_a_row_do_not_depend_on_the_others(hopper, nan_filled_empty, activation) -> None:
    x, weights, terms = operands(4, 4096, (520, 520), (16, 40))
    together = streamed(x, weights, terms, activation)
    for rows in (slice(0, 1), slice(1, 4), slice(2, 4)):
        apart = terms._replace(lora_x=terms.lora_x[rows].contiguous())
        assert torch.equal(streamed(x[rows], weights, apart, activation), together[rows])


def graph_of(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.gpu
def test_launches_that_overlap_wait_for_each_other(hopper) -> None:
    """Each product's x is the one before's y, and both buffers are written again and again."""
    n = 4096
    _, weights, _ = operands(1, n, (n,) * 3, (0, 0, 0))
    buffers = torch.randn(1, n, device="cuda").bfloat16(), torch.empty(1, n, device="cuda").bfloat16()
    start = buffers[0].clone()

    def chain(out_of: Callable[[Tensor, Nf4Tensor, Tensor], None]) -> Tensor:
        buffers[0].copy_(start)
        for i in range(24):
            out_of(buffers[i % 2], weights[i % 3], buffers[(i + 1) % 2])
        return buffers[0]

    def overlapping(x: Tensor, weight: Nf4Tensor, out: Tensor) -> None:
        nf4_stream.launch(x, [weight], Terms(None, [None], [1.0], [None]), out)

    def alone(x: Tensor, weight: Nf4Tensor, out: Tensor) -> None:
        overlapping(x, weight, out)
        torch.cuda.synchronize()

    expected = chain(alone).clone()
    assert expected.isfinite().all()
    graph = graph_of(lambda: chain(overlapping))
    for _ in range(10):
        graph.replay()
        assert torch.equal(buffers[0], expected)
