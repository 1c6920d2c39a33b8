"""The rotation is that of `rope`; keys and values stand where the page table says, and nowhere else."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from slothcore.kernels import rope_eager, rope_store, rope_store_eager
from tests.kernels.test_rope import make_angles
from tests.numerics import assert_as_accurate_as_eager

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BOTH = pytest.mark.parametrize("ops", [rope_store, rope_store_eager], ids=["fused", "eager"])

# Tokens of three rows: the end of a text that is longer than its ring, a token of another, and of an idle row.
ROWS = torch.tensor([2, 2, 2, 2, 2, 2, 2, 0, 1])
POSITIONS = torch.tensor([9, 10, 11, 12, 13, 14, 15, 3, -1])
LENGTHS = torch.tensor([4, 0, 16])
# Rings of 6 tokens, in pages of 2.
TABLES = torch.tensor([[5, 0, 9], [1, 1, 1], [3, 8, 2]], dtype=torch.int32)


def make_cache(kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    keys = torch.full((10, 2, kv_heads, head_dim), -7.0, dtype=dtype, device=device)
    return keys, keys.clone()


def tables(device: str) -> list[Tensor]:
    return [x.to(device) for x in (TABLES, ROWS.int(), POSITIONS, LENGTHS)]


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 16, 16), (3, 3, 80, 32), (33, 11, 20, 10), (5, 1, 96, 96), (1, 1, 2, 2)],
)
def test_matches_eager(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, kernel_device: str
) -> None:
    qkv = torch.randn(len(ROWS), heads + 2 * kv_heads, head_dim).to(kernel_device, dtype)
    cos, sin = make_angles(len(ROWS), rotary_dim, kernel_device)
    fused, eager = qkv.clone(), qkv.clone()
    options = {"num_heads": heads}
    caches = [make_cache(kv_heads, head_dim, dtype, kernel_device) for _ in range(2)]
    assert rope_store.rope_store_(fused, cos, sin, *caches[0], *tables(kernel_device), **options) is fused
    assert rope_store_eager.rope_store_(eager, cos, sin, *caches[1], *tables(kernel_device), **options) is eager
    normed = heads + kv_heads
    exact = rope_eager.rope_rotate_(qkv.double(), cos.double(), sin.double(), num_heads=normed)
    assert_as_accurate_as_eager(fused, eager, exact)
    assert torch.equal(fused[:, normed:], qkv[:, normed:])
    assert torch.equal(fused[..., rotary_dim:], qkv[..., rotary_dim:])
    # What is stored is what stands in qkv, to the bit.
    rope_store_eager.rope_store_(fused.clone(), None, None, *caches[1], *tables(kernel_device), **options)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one, other)


@BOTH
def test_where_each_token_goes(ops: ModuleType, kernel_device: str) -> None:
    """By hand: of row 2, longer than its ring of 6, tokens 10 to 15 stay; the idle row writes nothing."""
    qkv = torch.arange(len(ROWS), dtype=torch.float32)[:, None, None] + torch.tensor([0.0, 0.25, 0.5])[None, :, None]
    qkv = qkv.expand(-1, -1, 4).contiguous().to(kernel_device)
    keys, values = make_cache(1, 4, torch.float32, kernel_device)
    expected = torch.full((10, 2), -7.0)
    # Position 10 begins the ring's third page, 12 its first, 14 its second; position 3 of row 0 ends its second.
    expected[2], expected[3], expected[8] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    expected[0, 1] = 7
    ops.rope_store_(qkv.clone(), None, None, keys, values, *tables(kernel_device), num_heads=1)
    stored = (expected != -7).float()
    for pages, part in ((keys, 0.25), (values, 0.5)):
        assert torch.equal(pages[:, :, 0].cpu(), (expected + part * stored)[..., None].expand(-1, -1, 4))


@BOTH
def test_pages_that_hold_one_head_after_the_other(ops: ModuleType, kernel_device: str) -> None:
    qkv = torch.randn(len(ROWS), 8, 16, device=kernel_device)
    wide = torch.randn(len(ROWS), 10, 20, device=kernel_device)
    wide[:, 1:9, 3:19] = qkv
    cos, sin = make_angles(len(ROWS), 16, kernel_device)
    plain = make_cache(2, 16, torch.float32, kernel_device)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    ops.rope_store_(qkv, cos, sin, *plain, *tables(kernel_device), num_heads=4)
    ops.rope_store_(wide[:, 1:9, 3:19], cos, sin, *by_head, *tables(kernel_device), num_heads=4)
    assert torch.equal(wide[:, 1:9, 3:19], qkv)
    for one, other in zip(plain, by_head, strict=True):
        assert torch.equal(one, other)


def test_no_tokens(kernel_device: str) -> None:
    keys, values = make_cache(1, 4, torch.float32, kernel_device)
    before = keys.clone()
    nothing = [x.to(kernel_device) for x in (TABLES, ROWS[:0], POSITIONS[:0], LENGTHS)]
    for ops in (rope_store, rope_store_eager):
        empty = torch.empty(0, 3, 4, device=kernel_device)
        assert ops.rope_store_(empty, None, None, keys, values, *nothing, num_heads=1) is empty
    assert torch.equal(keys, before)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 32, 80), (8, 1, 256), (28, 4, 96)])
@pytest.mark.parametrize("tokens", [1, 128, 5000])
def test_matches_eager_at_real_sizes(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """One text, and a row for each token."""
    width = -(-tokens // 64)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device="cuda").to(dtype)
    cos, sin = make_angles(tokens, head_dim, "cuda")
    shape = (tokens + width, 64, kv_heads, head_dim)
    one_text = (
        torch.randperm(width, device="cuda").int()[None],
        torch.zeros(tokens, dtype=torch.int32, device="cuda"),
        torch.arange(tokens, device="cuda"),
        torch.tensor([tokens], device="cuda"),
    )
    many = (
        torch.randperm(tokens, device="cuda").int()[:, None],
        torch.arange(tokens, dtype=torch.int32, device="cuda"),
        torch.arange(tokens, device="cuda") % 64,
        torch.arange(tokens, device="cuda") % 64 + 1,
    )
    for places in (one_text, many):
        results = []
        for ops in (rope_store, rope_store_eager):
            caches = [torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2)]
            results.append((ops.rope_store_(qkv.clone(), cos, sin, *caches, *places, num_heads=heads), *caches))
        normed = heads + kv_heads
        exact = rope_eager.rope_rotate_(qkv.double(), cos.double(), sin.double(), num_heads=normed)
        assert_as_accurate_as_eager(results[0][0], results[1][0], exact)
        stored = [torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2)]
        rope_store_eager.rope_store_(results[0][0].clone(), None, None, *stored, *places, num_heads=heads)
        assert torch.equal(results[0][1], stored[0])
        assert torch.equal(results[0][2], stored[1])
