"""Head dimensions whose half is no power of two, heads that do not fill a tile, and values that must stay untouched."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from slothcore.kernels import launch, rope, rope_eager
from tests.numerics import assert_as_accurate_as_eager

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def make_angles(num_tokens: int, rotary_dim: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin [T, P/2] for positions that restart, as in packed documents."""
    positions = torch.arange(num_tokens) % 11
    frequencies = 10000.0 ** (-torch.arange(rotary_dim // 2) * 2 / rotary_dim)
    angles = positions[:, None] * frequencies
    return angles.cos().to(device), angles.sin().to(device)


def check_against_eager(x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, inverse: bool) -> None:
    options = {"num_heads": num_heads, "inverse": inverse}
    before = x.clone()
    exact = rope_eager.rope_rotate_(x.double(), cos.double(), sin.double(), **options)
    eager = rope_eager.rope_rotate_(x.clone(), cos, sin, **options)
    result = rope.rope_rotate_(x, cos, sin, **options)
    assert result is x
    assert_as_accurate_as_eager(x[:, :num_heads], eager[:, :num_heads], exact[:, :num_heads])
    assert torch.equal(x[:, num_heads:], before[:, num_heads:])
    rotary_dim = 2 * cos.shape[-1]
    assert torch.equal(x[..., rotary_dim:], before[..., rotary_dim:])


@DTYPES
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "num_heads", "head_dim"),
    [(1, 3, 2, 64), (7, 5, 3, 80), (33, 7, 6, 20), (2, 12, 10, 256), (5, 1, 1, 2), (3, 50, 45, 96)],
)
def test_matches_eager(
    num_tokens: int, heads: int, num_heads: int, head_dim: int, inverse: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    x = torch.randn(num_tokens, heads, head_dim).to(kernel_device, dtype)
    cos, sin = make_angles(num_tokens, head_dim, kernel_device)
    check_against_eager(x, cos, sin, num_heads=num_heads, inverse=inverse)


@DTYPES
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "num_heads", "head_dim", "rotary_dim"),
    [(7, 5, 3, 80, 32), (33, 7, 6, 20, 10), (3, 3, 2, 128, 96), (5, 2, 2, 6, 2)],
)
def test_partial_rotation_matches_eager(
    num_tokens: int,
    heads: int,
    num_heads: int,
    head_dim: int,
    rotary_dim: int,
    inverse: bool,
    dtype: torch.dtype,
    kernel_device: str,
) -> None:
    x = torch.randn(num_tokens, heads, head_dim).to(kernel_device, dtype)
    cos, sin = make_angles(num_tokens, rotary_dim, kernel_device)
    check_against_eager(x, cos, sin, num_heads=num_heads, inverse=inverse)


def test_eager_rotates_a_part_as_transformers_does() -> None:
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    qkv = torch.randn(9, 6, 16)
    cos, sin = make_angles(9, 10)
    expected = apply_rotary_pos_emb(
        qkv[None, :, :3], qkv[None, :, 3:5], cos.repeat(1, 2)[None], sin.repeat(1, 2)[None], unsqueeze_dim=2
    )
    rotated = rope_eager.rope_rotate_(qkv.clone(), cos, sin, num_heads=5)
    torch.testing.assert_close(rotated[:, :3], expected[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated[:, 3:5], expected[1][0], rtol=0, atol=1e-6)


def test_eager_pairs_as_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qkv = torch.randn(9, 6, 16)
    cos, sin = make_angles(9, 16)
    queries, keys = qkv[:, :3], qkv[:, 3:5]
    expected = apply_rotary_pos_emb(
        queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]
    )
    rotated = rope_eager.rope_rotate_(qkv.clone(), cos, sin, num_heads=5)
    torch.testing.assert_close(rotated[:, :3], expected[0][0].transpose(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated[:, 3:5], expected[1][0].transpose(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(rotated[:, 5:], qkv[:, 5:])


@pytest.mark.parametrize("ops", [rope, rope_eager], ids=["fused", "eager"])
def test_strided_views_are_rotated_where_they_lie(ops: ModuleType, kernel_device: str) -> None:
    """Neither the row nor the head stride need be dense, and the angles may be halves of one table."""
    table = torch.cat(make_angles(7, 12, kernel_device), dim=1)
    cos, sin = table.chunk(2, dim=1)
    buffer = torch.randn(7, 5, 20, device=kernel_device)
    view = buffer[:, 1:4, 3:15]
    expected = buffer.clone()
    expected[:, 1:4, 3:15] = ops.rope_rotate_(view.contiguous(), cos.contiguous(), sin.contiguous(), num_heads=2)
    ops.rope_rotate_(view, cos, sin, num_heads=2)
    assert torch.equal(buffer, expected)

    head_major = torch.randn(5, 7, 12, device=kernel_device).transpose(0, 1)
    expected = ops.rope_rotate_(head_major.contiguous(), cos, sin, num_heads=5)
    assert torch.equal(ops.rope_rotate_(head_major, cos, sin, num_heads=5), expected)


@pytest.mark.parametrize("ops", [rope, rope_eager], ids=["fused", "eager"])
def test_inverse_undoes_the_rotation(ops: ModuleType, kernel_device: str) -> None:
    x = torch.randn(8, 3, 10, device=kernel_device)
    cos, sin = make_angles(8, 10, kernel_device)
    rotated = ops.rope_rotate_(x.clone(), cos, sin, num_heads=3)
    assert (rotated - x).abs().max() > 0.1
    restored = ops.rope_rotate_(rotated, cos, sin, num_heads=3, inverse=True)
    torch.testing.assert_close(restored, x, rtol=0, atol=1e-6)


def test_angles_for_more_channels_than_a_head_has_are_refused(kernel_device: str) -> None:
    cos, sin = make_angles(4, 18, kernel_device)
    for ops in (rope, rope_eager):
        with pytest.raises(AssertionError, match="angles for 18 channels, heads of 16"):
            ops.rope_rotate_(torch.zeros(4, 2, 16, device=kernel_device), cos, sin, num_heads=2)


@pytest.mark.parametrize("num_heads", [1, 5, 40, 96])
@pytest.mark.parametrize("half_dim", [1, 32, 40, 48, 64, 128])
def test_tiles_fit_the_heads(num_heads: int, half_dim: int) -> None:
    tile = launch.head_tile(num_heads, half_dim)
    assert tile.columns // 2 < half_dim <= tile.columns
    assert tile.rows // 2 < num_heads
    assert tile.rows * tile.columns <= 32 * tile.warps * 16


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_tokens", [1, 33, 4096])
def test_matches_eager_at_real_sizes(num_tokens: int, head_dim: int, inverse: bool, dtype: torch.dtype) -> None:
    """32 query, 8 key and 8 value heads."""
    x = torch.randn(num_tokens, 48, head_dim, device="cuda").to(dtype)
    cos, sin = make_angles(num_tokens, head_dim, "cuda")
    check_against_eager(x, cos, sin, num_heads=40, inverse=inverse)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 96), (96, 72), (80, 32)])
def test_partial_rotation_at_real_sizes(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(4096, 48, head_dim, device="cuda").to(dtype)
    cos, sin = make_angles(4096, rotary_dim, "cuda")
    check_against_eager(x, cos, sin, num_heads=40, inverse=False)


@pytest.mark.gpu
@pytest.mark.parametrize("strides", [(2**30, 64, 1), (64, 2**30, 1)], ids=["tokens", "heads"])
def test_offsets_beyond_32_bits(strides: tuple[int, int, int]) -> None:
    """The last of four tokens, or of four heads, starts at element 3 * 2^30."""
    near = torch.randn(4, 4, 64, device="cuda").half()
    far = torch.empty(3 * 2**30 + 256, dtype=torch.float16, device="cuda").as_strided((4, 4, 64), strides)
    far.copy_(near)
    cos, sin = make_angles(4, 64, "cuda")
    assert torch.equal(rope.rope_rotate_(far, cos, sin, num_heads=4), rope.rope_rotate_(near, cos, sin, num_heads=4))
