"""Chunked linear + cross-entropy: gradients, chunks, sparse targets, and what must not be computed."""

import pytest
import torch
from torch import Tensor

from slothcore.autograd import cross_entropy as module
from slothcore.autograd.cross_entropy import linear_cross_entropy, max_chunk_rows
from slothcore.kernels import cross_entropy as triton_ops
from slothcore.kernels import cross_entropy_eager as eager_ops
from tests.numerics import assert_as_accurate_as_eager, relative_error, widened


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 rows, so that a handful of targets makes several."""
    monkeypatch.setattr(module, "_even_chunk_rows", lambda num_targets, most: 3)


def make_inputs(
    *, tokens: int, hidden_size: int, vocabulary: int, targets: int | None = None, dtype=torch.float64, device="cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """hidden, weight, targets, rows; `targets` of the rows have a target, all of them for None."""
    hidden = torch.randn(tokens, hidden_size, device=device).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5).to(dtype)
    rows = None if targets is None else torch.randperm(tokens, device=device)[:targets].sort().values
    return hidden, weight, torch.randint(vocabulary, (tokens if rows is None else targets,), device=device), rows


def reference(hidden, weight, targets, rows, *, num_items, softcap=None, bias=None) -> Tensor:
    """The same loss from torch's own operations, with the full logits."""
    logits = torch.nn.functional.linear(hidden if rows is None else hidden[rows], weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradcheck(sparse: bool, with_bias: bool, softcap: float | None) -> None:
    hidden, weight, targets, rows = make_inputs(tokens=8, hidden_size=5, vocabulary=11, targets=4 if sparse else None)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, rows, num_items=3, softcap=softcap, bias=bias)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_(), bias))


@pytest.mark.usefixtures("tiny_chunks", "nan_filled_empty")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_torch(sparse: bool, softcap: float | None) -> None:
    hidden, weight, targets, rows = make_inputs(
        tokens=40, hidden_size=16, vocabulary=53, targets=13 if sparse else None
    )
    bias = torch.randn(53, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    ours = linear_cross_entropy(hidden, weight, targets, rows, num_items=7, softcap=softcap, bias=bias)
    theirs = reference(hidden, weight, targets, rows, num_items=7, softcap=softcap, bias=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The loss is summed over all targets at once, so even its last bit stays, where rows round alike."""
    hidden, weight, targets, rows = make_inputs(tokens=50, hidden_size=32, vocabulary=99, targets=37, dtype=dtype)
    results = []
    for chunk_rows in (37, 10, 1):
        monkeypatch.setattr(module, "_even_chunk_rows", lambda num_targets, most, rows=chunk_rows: rows)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = linear_cross_entropy(*leaves, targets, rows, num_items=37)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    exact_leaves = [t.requires_grad_() for t in widened(hidden, weight)]
    exact_loss = linear_cross_entropy(*exact_leaves, targets, rows, num_items=37)
    exact_loss.backward()
    exact = (exact_loss.detach(), *(leaf.grad for leaf in exact_leaves))
    for chunked in results[1:]:
        for ours, whole, truth in zip(chunked, results[0], exact, strict=True):
            assert_as_accurate_as_eager(ours, whole, truth)


def test_one_target_in_500_rows_reaches_its_row_and_no_other() -> None:
    hidden, weight, targets, rows = make_inputs(
        tokens=500, hidden_size=16, vocabulary=30, targets=1, dtype=torch.float32
    )
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, rows, num_items=1).backward()
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets, rows, num_items=1), hidden)
    assert expected[rows].abs().max() > 0.01
    assert relative_error(hidden.grad, expected) < 1e-6
    others = torch.ones(500, dtype=torch.bool).index_fill(0, rows, False)
    assert (hidden.grad[others] == 0).all()


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("num_items", [0, 5, torch.tensor(0), torch.tensor(5)])
def test_no_targets_give_loss_zero_and_zero_gradients(num_items: Tensor | int) -> None:
    hidden, weight, targets, rows = make_inputs(tokens=6, hidden_size=4, vocabulary=9, targets=0, dtype=torch.float32)
    bias = torch.randn(9)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, targets, rows, num_items=num_items, bias=bias)
    assert loss.item() == 0
    loss.backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()


def test_num_items_may_be_a_tensor() -> None:
    hidden, weight, targets, rows = make_inputs(tokens=9, hidden_size=4, vocabulary=9, dtype=torch.float32)
    hidden.requires_grad_()
    results = []
    for num_items in (7, 7.0, torch.tensor(7), torch.tensor(7.0)):
        loss = linear_cross_entropy(hidden, weight, targets, rows, num_items=num_items)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-7, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=3e-7, atol=0)


def test_backward_may_run_twice() -> None:
    """Two backward passes through a retained graph add the same gradient twice."""
    hidden, weight, targets, rows = make_inputs(tokens=9, hidden_size=4, vocabulary=9)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, rows, num_items=9)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


class MatmulCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "grad_mode", "expected"),
    [
        (True, False, True, [(6, 11), (6, 4)]),
        (False, True, True, [(6, 11), (11, 4)]),
        (True, True, True, [(6, 11), (6, 4), (11, 4)]),
        (False, False, True, [(6, 11)]),
        (True, True, False, [(6, 11)]),
    ],
)
def test_only_the_gradients_asked_for_are_computed(
    hidden_grad: bool, weight_grad: bool, grad_mode: bool, expected: list[tuple[int, int]]
) -> None:
    hidden, weight, targets, rows = make_inputs(tokens=6, hidden_size=4, vocabulary=11, dtype=torch.float32)
    hidden.requires_grad_(hidden_grad)
    weight.requires_grad_(weight_grad)
    with torch.set_grad_enabled(grad_mode), MatmulCounter() as counter:
        loss = linear_cross_entropy(hidden, weight, targets, rows, num_items=6)
    assert counter.shapes == expected
    assert loss.requires_grad == (grad_mode and (hidden_grad or weight_grad))
    torch.testing.assert_close(loss, reference(hidden, weight, targets, rows, num_items=6))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float16_keeps_small_gradients(device: str) -> None:
    """Most probabilities lie near or below float16's smallest number, 6e-8, and over 512 targets even lower."""
    vocabulary = 4000
    hidden, weight, targets, rows = make_inputs(
        tokens=512, hidden_size=8, vocabulary=vocabulary, targets=4, dtype=torch.float16, device=device
    )
    hidden, weight = (7 * hidden).requires_grad_(), weight.requires_grad_()
    # The loss scale that mixed precision applies to float16 gradients.
    (2.0**16 * linear_cross_entropy(hidden, weight, targets, rows, num_items=512)).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (2.0**16 * reference(*exact, targets, rows, num_items=512)).backward()
    assert relative_error(hidden.grad, exact[0].grad) < 2e-3
    # The improbable half of the vocabulary, which no target hides.
    improbable = exact[1].grad.norm(dim=1).argsort()[: vocabulary // 2]
    assert relative_error(weight.grad[improbable], exact[1].grad[improbable]) < 5e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_gradient_is_multiplied_in_float32(dtype: torch.dtype, device: str) -> None:
    """A GPU would round a 0-dim float32 factor to the gradient's dtype first."""
    gradient = torch.linspace(1, 2, 257, device=device).to(dtype)
    factor = torch.tensor(1 + 2**-7 + 2**-10 + 2**-12, device=device)
    assert torch.equal(module._scaled(gradient, factor, dtype), (gradient.float() * factor).to(dtype))


def test_head_in_another_dtype_gets_gradients_in_it() -> None:
    hidden, weight, targets, rows = make_inputs(tokens=6, hidden_size=4, vocabulary=11, dtype=torch.bfloat16)
    weight = weight.float().requires_grad_()
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, rows, num_items=6).backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference(*exact, targets, rows, num_items=6).backward()
    assert relative_error(weight.grad, exact[1].grad) < 0.01


@pytest.mark.parametrize("vocabulary", [100, 32000, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_size(vocabulary: int, dtype: torch.dtype) -> None:
    rows = max_chunk_rows(vocabulary, dtype)
    assert rows % module.ROW_MULTIPLE == 0
    assert rows == module.MIN_CHUNK_ROWS or rows * vocabulary * dtype.itemsize <= module.LOGITS_BYTES
    for num_targets in (1, rows - 1, rows, rows + 1, 10 * rows + 1):
        chunk = module._even_chunk_rows(num_targets, rows)
        assert chunk <= rows
        assert -(-num_targets // chunk) == -(-num_targets // rows), "even chunks must not be more chunks"


def test_autocast_to_another_dtype_is_refused() -> None:
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 2, 4])
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, None, num_items=3)
        with pytest.raises(ValueError, match="leave autocast out"):
            linear_cross_entropy(hidden, weight, targets, None, num_items=3)


def test_bad_input_is_refused() -> None:
    hidden, weight, targets, rows = make_inputs(tokens=6, hidden_size=4, vocabulary=11)
    with pytest.raises(ValueError, match=r"hidden must be \[T, H\]"):
        linear_cross_entropy(hidden[:, :3], weight, targets, rows, num_items=6)
    with pytest.raises(ValueError, match="5 targets for 6 rows"):
        linear_cross_entropy(hidden, weight, targets[:5], rows, num_items=6)
    with pytest.raises(ValueError, match="int64"):
        linear_cross_entropy(hidden, weight, targets.int(), rows, num_items=6)
    with pytest.raises(ValueError, match=r"bias must be \[V\]"):
        linear_cross_entropy(hidden, weight, targets, rows, num_items=6, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="num_items must be positive, got 0"):
        linear_cross_entropy(hidden, weight, targets, rows, num_items=0)


def losses_and_gradients(inputs: tuple, **options) -> tuple[Tensor, ...]:
    hidden, weight, targets, rows = inputs
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets, rows, **options)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def compare_with_eager(monkeypatch: pytest.MonkeyPatch, inputs: tuple, **options) -> None:
    """Triton, eager and eager in float64 on one device, so that only the loss kernel differs."""
    results = {}
    for name, ops, values in (
        ("fused", triton_ops, inputs),
        ("eager", eager_ops, inputs),
        ("exact", eager_ops, widened(*inputs)),
    ):
        monkeypatch.setattr(module, "cross_entropy", ops)
        monkeypatch.setattr(module, "cross_entropy_eager", ops)
        results[name] = losses_and_gradients(values, **options)
    for fused, eager, exact in zip(*results.values(), strict=True):
        assert_as_accurate_as_eager(fused, eager, exact)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_matches_eager(monkeypatch, kernel_device: str, dtype: torch.dtype, softcap: float | None) -> None:
    inputs = make_inputs(tokens=33, hidden_size=24, vocabulary=131, targets=7, dtype=dtype, device=kernel_device)
    compare_with_eager(monkeypatch, inputs, num_items=5, softcap=softcap)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_several_chunks_on_gpu(monkeypatch, dtype: torch.dtype, softcap: float | None) -> None:
    """32003 columns (odd, so the rows are padded), 700 of 900 rows in chunks of at most 256."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 1)
    inputs = make_inputs(tokens=900, hidden_size=512, vocabulary=32003, targets=700, dtype=dtype, device="cuda")
    compare_with_eager(monkeypatch, inputs, num_items=torch.tensor(700, device="cuda"), softcap=softcap)


@pytest.mark.gpu
def test_dispatch_takes_triton_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(module, "cross_entropy_eager", None)
    inputs = make_inputs(tokens=5, hidden_size=16, vocabulary=50, dtype=torch.bfloat16, device="cuda")
    assert losses_and_gradients(inputs, num_items=5)[0].isfinite()


@pytest.mark.gpu
def test_llama_3_size_stays_within_its_memory() -> None:
    """8192 x 4096 x 128256 in bfloat16; the full logits alone would be 2004 MiB."""
    hidden, weight, targets, _ = make_inputs(
        tokens=8192, hidden_size=4096, vocabulary=128256, dtype=torch.bfloat16, device="cuda"
    )
    hidden.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(hidden, weight, targets, None, num_items=8192)
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes
    assert extra < 700 * 2**20, f"{extra / 2**20:.0f} MiB beyond the inputs and the gradient"
    # A tenth of the rows against torch's own loss, whose logits fit; a row's gradient does not depend on the others.
    sample = hidden.detach()[:819].float().requires_grad_()
    expected = reference(sample, weight.float(), targets[:819], None, num_items=8192)
    expected.backward()
    assert relative_error(hidden.grad[:819], sample.grad) < 0.01
    with torch.no_grad():
        ours = linear_cross_entropy(hidden[:819], weight, targets[:819], None, num_items=8192)
    assert relative_error(ours, expected) < 1e-3


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    inputs = make_inputs(tokens=64, hidden_size=128, vocabulary=1000, targets=9, dtype=torch.bfloat16, device="cuda")
    num_items = torch.tensor(9, device="cuda")
    losses_and_gradients(inputs, num_items=num_items)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_and_gradients(inputs, num_items=num_items)
    finally:
        torch.cuda.set_sync_debug_mode("default")
