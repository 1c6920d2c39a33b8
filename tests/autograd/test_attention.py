"""packed_attention: gradients, independence of documents, agreement with torch, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slothcore.autograd.attention import packed_attention
from tests.numerics import assert_as_accurate_as_eager, gradients, relative_error


def boundaries(*lengths: int, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (3, None), (None, 2.0), (2, 1.5)], ids=["plain", "window", "cap", "both"]
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_gradcheck(num_heads: int, num_kv_heads: int, window: int | None, softcap: float | None) -> None:
    qkv = 2 * torch.randn(10, num_heads + 2 * num_kv_heads, 4, dtype=torch.float64)

    def attend(x: Tensor) -> Tensor:
        return packed_attention(
            x, boundaries(4, 0, 1, 5), 5,
            num_heads=num_heads, num_kv_heads=num_kv_heads, scale=0.5, window=window, softcap=softcap,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (qkv.requires_grad_(),))


def test_equals_torch_per_document() -> None:
    lengths = (9, 30, 9, 1)
    qkv, grad = torch.randn(49, 8, 16), torch.randn(49, 4 * 16)

    def by_torch(x: Tensor) -> Tensor:
        outs = []
        for document in x.split(lengths):
            q, k, v = document.transpose(0, 1)[None].split((4, 2, 2), dim=1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
            outs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)

    def by_us(x: Tensor) -> Tensor:
        return packed_attention(x, boundaries(*lengths), 30, num_heads=4, num_kv_heads=2, scale=0.25)

    assert relative_error(by_us(qkv), by_torch(qkv)) < 1e-6
    [ours], [theirs] = gradients(by_us, qkv, grad_output=grad), gradients(by_torch, qkv, grad_output=grad)
    assert relative_error(ours, theirs) < 1e-6


def test_a_document_changes_no_gradient_of_another() -> None:
    qkv, grad = torch.randn(20, 4, 8), torch.randn(20, 16)
    changed = torch.cat([qkv[:6], torch.randn(9, 4, 8), qkv[15:]])

    def attend(x: Tensor) -> Tensor:
        return packed_attention(x, boundaries(6, 9, 5), 9, num_heads=2, num_kv_heads=1, scale=0.3)

    before, after = attend(qkv), attend(changed)
    [grad_before], [grad_after] = gradients(attend, qkv, grad_output=grad), gradients(attend, changed, grad_output=grad)
    for rows in (slice(0, 6), slice(15, 20)):
        assert torch.equal(before[rows], after[rows])
        assert torch.equal(grad_before[rows], grad_after[rows])
    assert not torch.equal(grad_before[6:15], grad_after[6:15])


def test_input_without_contiguous_rows() -> None:
    qkv, grad = torch.randn(7, 3, 16), torch.randn(7, 16)

    def attend(x: Tensor) -> Tensor:
        return packed_attention(x, boundaries(7), 7, num_heads=1, num_kv_heads=1, scale=0.25)

    def attend_transposed(x: Tensor) -> Tensor:
        return attend(x.transpose(0, 2))

    [expected] = gradients(attend, qkv, grad_output=grad)
    [result] = gradients(attend_transposed, qkv.transpose(0, 2).contiguous(), grad_output=grad)
    assert torch.equal(result.transpose(0, 2), expected)


def test_second_backward_keeps_the_saved_tensors() -> None:
    qkv = torch.randn(5, 3, 16, requires_grad=True)
    out = packed_attention(qkv, boundaries(5), 5, num_heads=1, num_kv_heads=1, scale=0.25)
    [first] = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    [second] = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "multiple of num_kv_heads"),
        ({"num_heads": 4}, "qkv must be"),
        ({"qkv": torch.zeros(4, 6, 257)}, "head_dim must be at most 256, got 257"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "must be int32"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be positive"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    arguments = {
        "qkv": torch.zeros(4, 6, 16), "cu_seqlens": boundaries(4), "max_seqlen": 4,
        "num_heads": 2, "num_kv_heads": 2, "scale": 1.0,
    }  # fmt: skip
    packed_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        packed_attention(**{**arguments, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_the_gpu(dtype: torch.dtype) -> None:
    """The Function on the GPU against the Function on the CPU, in the same dtype and in float64."""
    qkv = torch.randn(300, 12, 64).to(dtype)
    grad = torch.randn(300, 8 * 64).to(dtype)

    def attend(x: Tensor) -> Tensor:
        bounds = boundaries(130, 0, 169, 1, device=str(x.device))
        return packed_attention(x, bounds, 169, num_heads=8, num_kv_heads=2, scale=0.125, window=100)

    fused, eager, exact = (
        [attend(x), *gradients(attend, x, grad_output=g)]
        for x, g in ((qkv.cuda(), grad.cuda()), (qkv, grad), (qkv.double(), grad.double()))
    )
    for result, rounded, true in zip(fused, eager, exact, strict=True):
        assert_as_accurate_as_eager(result.cpu(), rounded, true)
