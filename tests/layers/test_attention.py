"""Self-attention as a module, and its reading of the key-value cache, against a dense formula."""

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.layers.attention import SelfAttention
from slothcore.layers.kv_cache import KvCache
from slothcore.layers.norm import RMSNorm
from slothcore.layers.packed import Documents
from slothcore.layers.rope import RopeParameters, RotaryEmbedding
from tests.layers.cache_passes import begin_prompt, begin_tokens

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 12, 4, 2, 6
LENGTHS = (5, 1, 8)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 3},
    {"softcap": 1.5},
    {"window": 2, "softcap": 0.7, "qkv_bias": True, "output_bias": True},
    {"fused_qkv": True, "qkv_bias": True},
    {"window": 3, "head_norm": partial(RMSNorm, HEAD_DIM, eps=1e-3, dtype=torch.float64)},
    {"fused_qkv": True, "head_norm": partial(RMSNorm, HEAD_DIM, eps=1e-3, weight_offset=1.0, dtype=torch.float64)},
]


@pytest.fixture(params=OPTIONS, ids=lambda options: "-".join(options) or "plain")
def attention(request: pytest.FixtureRequest) -> SelfAttention:
    module = SelfAttention(
        HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        scale=0.8,
        dtype=torch.float64,
        **request.param,
    )
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return module


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of x [T, heads, D], written with complex numbers."""
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    """RMSNorm over the heads of x [T, heads, D]."""
    if norm is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.weight + norm.weight_offset)


def dense_attention(module: SelfAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One document, every score written out."""
    length = len(x)
    named = dict(module.named_children())
    linears = [named["qkv_proj"]] if "qkv_proj" in named else [named[f"{letter}_proj"] for letter in "qkv"]
    qkv = torch.cat([x @ m.weight.T + (0 if m.bias is None else m.bias) for m in linears], -1)
    query, key, value = qkv.view(length, -1, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    query, key = (
        rotate(normed(heads, norm), cos, sin) for heads, norm in ((query, module.q_norm), (key, module.k_norm))
    )
    output = torch.zeros(length, HEADS, HEAD_DIM, dtype=x.dtype)
    for i in range(length):
        first = 0 if module.window is None else max(0, i + 1 - module.window)
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = key[first : i + 1, shared] @ query[i, head] * module.scale
            if module.softcap is not None:
                scores = module.softcap * torch.tanh(scores / module.softcap)
            output[i, head] = scores.softmax(0) @ value[first : i + 1, shared]
    o_proj = module.o_proj
    return output.flatten(1) @ o_proj.weight.T + (0 if o_proj.bias is None else o_proj.bias)


def stream() -> tuple[Tensor, Tensor, Tensor, Documents]:
    x = torch.randn(sum(LENGTHS), HIDDEN, dtype=torch.float64)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    cos, sin = RotaryEmbedding(RopeParameters(rope_theta=50.0), HEAD_DIM)(positions)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return x, cos, sin, Documents(cu_seqlens, max(LENGTHS))


def test_formula_in_each_document(attention: SelfAttention) -> None:
    x, cos, sin, documents = stream()
    actual = attention(x, cos, sin, documents)
    parts = zip(x.split(LENGTHS), cos.double().split(LENGTHS), sin.double().split(LENGTHS), strict=True)
    expected = torch.cat([dense_attention(attention, *part) for part in parts])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradients_against_the_formula(attention: SelfAttention) -> None:
    x, cos, sin, documents = stream()
    x.requires_grad_()
    weights = list(attention.parameters())
    direction = torch.randn(len(x), HIDDEN, dtype=torch.float64)
    actual = torch.autograd.grad((attention(x, cos, sin, documents) * direction).sum(), [x, *weights])
    parts = zip(x.split(LENGTHS), cos.double().split(LENGTHS), sin.double().split(LENGTHS), strict=True)
    expected_output = torch.cat([dense_attention(attention, *part) for part in parts])
    expected = torch.autograd.grad((expected_output * direction).sum(), [x, *weights])
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


def test_cache_gives_what_the_packed_stream_gives(attention: SelfAttention) -> None:
    """Each row: all but its last two tokens as a prompt, then two tokens from the cache."""
    lengths = (5, 3, 8)
    x = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    rope = RotaryEmbedding(RopeParameters(rope_theta=50.0), HEAD_DIM)
    ends = torch.tensor(lengths).cumsum(0)
    whole = Documents(torch.cat([torch.zeros(1), ends]).int(), max(lengths))
    cache = KvCache(
        windows=[attention.window],
        rows=3,
        capacity=9,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        expected = attention(x, *rope(positions), whole)
        is_prompt = torch.cat([torch.arange(length) < length - 2 for length in lengths])
        prompts = Documents(torch.tensor([0, 3, 4, 10], dtype=torch.int32), 6)
        begin_prompt(cache, {0: 3, 1: 1, 2: 6})
        actual = attention(x[is_prompt], *rope(positions[is_prompt]), prompts, cache.layer(0))
        torch.testing.assert_close(actual, expected[is_prompt])
        for back in (2, 1):
            rows = ends - back
            at = begin_tokens(cache)
            assert torch.equal(at, positions[rows])
            actual = attention(x[rows], *rope(at), prompts, cache.layer(0))
            torch.testing.assert_close(actual, expected[rows])


def test_a_cache_is_freed_as_soon_as_nothing_uses_it() -> None:
    """Without waiting for the garbage collector: on a GPU it may hold gigabytes."""
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    cache = KvCache(windows=[None, None], rows=1, capacity=4, num_kv_heads=1, head_dim=2, **options)
    assert cache.layer(1).is_prompt
    released = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert released() is None
    finally:
        gc.enable()
