"""Cross-entropy kernel against its eager twin, and the twin against torch's own cross-entropy."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels import cross_entropy, cross_entropy_eager
from tests.numerics import assert_as_accurate_as_eager, widened

GPU_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str, *, padding: int = 0) -> Tensor:
    """Logits with a spread of 4, in rows that are `padding` elements apart."""
    wide = 4 * torch.randn(rows, vocabulary + padding, device=device)
    return wide.to(dtype)[:, :vocabulary]


def run(ops, logits: Tensor, targets: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Loss and what became of a copy of the logits that keeps their row stride."""
    buffer = torch.full((len(logits), logits.stride(0)), 7.0, dtype=logits.dtype, device=logits.device)
    view = buffer[:, : logits.shape[1]]
    view.copy_(logits)
    loss = ops.cross_entropy_forward_(view, targets, **options)
    assert (buffer[:, logits.shape[1] :] == 7).all(), "wrote beyond the end of a row"
    return loss, view


def compare(logits: Tensor, targets: Tensor, *, grad_scale: Tensor | float, softcap: float | None) -> None:
    options = {"grad_scale": grad_scale, "softcap": softcap}
    fused = run(cross_entropy, logits, targets, **options)
    eager = run(cross_entropy_eager, logits, targets, **options)
    exact = run(cross_entropy_eager, *widened(logits, targets), **options)
    assert_as_accurate_as_eager(fused[0], eager[0], exact[0], what="loss")
    assert_as_accurate_as_eager(fused[1], eager[1], exact[1], what="gradient")


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_eager_equals_torch(softcap: float | None) -> None:
    logits = torch.randn(7, 33, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(33, (7,))
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum() * 0.3, logits)
    overwritten = logits.detach().clone()
    loss = cross_entropy_eager.cross_entropy_forward_(overwritten, targets, grad_scale=0.3, softcap=softcap)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(overwritten, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("rows", "vocabulary", "padding"), [(1, 1, 0), (7, 33, 3), (3, 1000, 0), (2, 8193, 5)])
def test_matches_eager(
    kernel_device: str, rows: int, vocabulary: int, padding: int, softcap: float | None, dtype: torch.dtype
) -> None:
    """8193 columns take two tiles, the second of one column; 1 and 33 fit in less than one."""
    logits = make_logits(rows, vocabulary, dtype, kernel_device, padding=padding)
    targets = torch.randint(vocabulary, (rows,), device=kernel_device)
    targets[-1] = vocabulary - 1
    compare(logits, targets, grad_scale=0.7, softcap=softcap)


def test_scale_may_be_a_tensor(kernel_device: str) -> None:
    logits = make_logits(3, 100, torch.float32, kernel_device)
    targets = torch.tensor([0, 50, 99], device=kernel_device)
    by_number = run(cross_entropy, logits, targets, grad_scale=0.25)[1]
    by_tensor = run(cross_entropy, logits, targets, grad_scale=torch.tensor(0.25, device=kernel_device))[1]
    assert torch.equal(by_number, by_tensor)


def test_without_a_scale_the_logits_stay(kernel_device: str) -> None:
    logits = make_logits(3, 100, torch.float32, kernel_device, padding=1)
    targets = torch.tensor([0, 50, 99], device=kernel_device)
    loss, after = run(cross_entropy, logits, targets, grad_scale=None)
    assert torch.equal(after, logits)
    assert torch.equal(loss, run(cross_entropy, logits, targets, grad_scale=1.0)[0])


def test_extreme_logits_neither_overflow_nor_cancel(kernel_device: str) -> None:
    """Huge, masked (-inf) and tiny logits; the softcap's series and its other branch meet near 0."""
    row = [1e4, -1e4, float("-inf"), 0.0, 1e-6, -0.2499 * 30, 0.2501 * 30]
    logits = torch.tensor([row, [-x if x != float("-inf") else x for x in row]], device=kernel_device)
    compare(logits, torch.tensor([0, 4], device=kernel_device), grad_scale=1.0, softcap=None)
    compare(logits[:, 3:], torch.tensor([0, 3], device=kernel_device), grad_scale=1.0, softcap=30.0)


def test_capped_small_logits_keep_their_digits(kernel_device: str) -> None:
    """Two columns of tiny logits: one rounding of 1 in tanh, times the cap of 30, would show in the loss."""
    logits = torch.linspace(-0.01, 0.01, 66, device=kernel_device).view(33, 2)
    compare(logits, torch.zeros(33, dtype=torch.int64, device=kernel_device), grad_scale=1.0, softcap=30.0)


def test_target_outside_the_row_gives_nan(kernel_device: str) -> None:
    logits = make_logits(3, 50, torch.float32, kernel_device)
    targets = torch.tensor([-100, 3, 50], device=kernel_device)
    loss = cross_entropy.cross_entropy_forward_(logits, targets, grad_scale=None)
    assert loss.isnan().tolist() == [True, False, True]


def test_targets_may_be_strided(kernel_device: str) -> None:
    logits = make_logits(3, 100, torch.float32, kernel_device)
    targets = torch.tensor([[0, 1], [50, 2], [99, 3]], device=kernel_device)
    expected = cross_entropy.cross_entropy_forward_(logits, targets[:, 0].contiguous(), grad_scale=None)
    assert torch.equal(cross_entropy.cross_entropy_forward_(logits, targets[:, 0], grad_scale=None), expected)


def test_no_rows(kernel_device: str) -> None:
    logits, targets = torch.empty(0, 50, device=kernel_device), torch.empty(0, dtype=torch.int64, device=kernel_device)
    assert cross_entropy.cross_entropy_forward_(logits, targets, grad_scale=1.0).shape == (0,)


@pytest.mark.parametrize("vocabulary", [1, 1000, 32000, 128256, 262144])
def test_launch_config_covers_a_row_with_powers_of_two(vocabulary: int) -> None:
    block, num_warps = cross_entropy._launch_config(vocabulary)
    assert block & (block - 1) == 0
    assert num_warps & (num_warps - 1) == 0
    assert block >= min(vocabulary, 8192)
    assert block >= 32 * num_warps, "every lane has a column"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocabulary", [32003, 128256, 262144])
def test_real_sizes_on_gpu(vocabulary: int, softcap: float | None, dtype: torch.dtype) -> None:
    logits = make_logits(300, vocabulary, dtype, "cuda", padding=-vocabulary % 64)
    targets = torch.randint(vocabulary, (300,), device="cuda")
    targets[0], targets[-1] = 0, vocabulary - 1
    compare(logits, targets, grad_scale=torch.tensor(1.5, device="cuda"), softcap=softcap)
