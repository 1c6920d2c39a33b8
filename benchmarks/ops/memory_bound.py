"""Operations that the memory bounds: norm, rotary positions, gated unit, NF4 dequantisation."""

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import OpCase, nf4_tensor, quantize_by_bitsandbytes
from benchmarks.shapes import OpShape
from slothcore.kernels import glu, nf4, rms_norm, rope

EPS = 1e-5


def norm_cases(shape: OpShape, dtype: torch.dtype, device: str) -> Iterator[OpCase]:
    """The norm with the residual add before it, as a decoder layer calls it."""
    tokens, hidden = shape.tokens, shape.hidden_size
    x, residual, dy, dh = (torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(4))
    weight = torch.rand(hidden, device=device).to(dtype)
    leaves = (x.clone().requires_grad_(), residual.clone().requires_grad_())

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return rms_norm.rms_norm_forward(x, weight, eps=EPS, residual=residual)

    def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h, (hidden,), weight, EPS), h

    _, rstd, h = forward()
    outputs = plain(*leaves)

    def backward() -> Tensor:
        return rms_norm.rms_norm_backward(dy, h, weight, rstd, dh=dh)[0]

    def plain_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, (dy, dh), retain_graph=True)

    size, moved = f"{tokens}x{hidden}", 4 * tokens * hidden * dtype.itemsize
    yield OpCase(
        "add + RMSNorm forward",
        size,
        forward,
        lambda: list(zip(forward()[::2], plain(x, residual), strict=True)),
        "torch",
        lambda: plain(x, residual),
        bytes=moved,
    )
    yield OpCase(
        "add + RMSNorm backward",
        size,
        backward,
        lambda: [(backward(), plain_backward()[0])],
        "torch",
        plain_backward,
        bytes=moved,
    )


def rope_case(shape: OpShape, dtype: torch.dtype, device: str) -> OpCase:
    """Query and key heads of a fused projection, turned in place."""
    heads, half = shape.num_heads + shape.num_kv_heads, shape.head_dim // 2
    qkv = torch.randn(shape.tokens, heads + shape.num_kv_heads, shape.head_dim, device=device).to(dtype)
    angles = torch.rand(shape.tokens, half, device=device) * 6
    cos, sin = angles.cos(), angles.sin()

    def turn(x: Tensor) -> Tensor:
        return rope.rope_rotate_(x, cos, sin, num_heads=heads)

    def plain(x: Tensor) -> Tensor:
        first, second = x[:, :heads, :half], x[:, :heads, half:]
        c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    return OpCase(
        "RoPE in place",
        f"{shape.tokens}x{heads}x{shape.head_dim}",
        lambda: turn(qkv),
        lambda: [(turn(qkv.clone())[:, :heads], plain(qkv))],
        "torch",
        lambda: plain(qkv),
        bytes=2 * shape.tokens * heads * shape.head_dim * dtype.itemsize + cos.nbytes + sin.nbytes,
    )


def glu_cases(shape: OpShape, dtype: torch.dtype, device: str) -> Iterator[OpCase]:
    tokens, inner = shape.tokens, shape.intermediate_size
    gate_up = torch.randn(tokens, 2 * inner, device=device).to(dtype)
    dy = torch.randn(tokens, inner, device=device).to(dtype)
    leaf = gate_up.clone().requires_grad_()

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    output = plain(leaf)

    def forward() -> Tensor:
        return glu.glu_forward(gate_up, activation="silu")

    def backward() -> tuple[Tensor, Tensor | None]:
        return glu.glu_backward(dy, gate_up, activation="silu")

    def plain_backward() -> Tensor:
        return torch.autograd.grad(output, leaf, dy, retain_graph=True)[0]

    size, item = f"{tokens}x{inner}", tokens * inner * dtype.itemsize
    yield OpCase(
        "SwiGLU forward",
        size,
        forward,
        lambda: [(forward(), plain(gate_up))],
        "torch",
        lambda: plain(gate_up),
        bytes=3 * item,
    )
    yield OpCase(
        "SwiGLU backward, y again",
        size,
        backward,
        lambda: list(zip(backward(), (plain_backward(), plain(gate_up)), strict=True)),
        "torch",
        plain_backward,
        bytes=6 * item,
    )


def dequantize_cases(shape: OpShape, dtype: torch.dtype, device: str) -> Iterator[OpCase]:
    for rows, columns in ((shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.hidden_size)):
        yield dequantize_case(rows, columns, dtype, device)


def dequantize_case(rows: int, columns: int, dtype: torch.dtype, device: str) -> OpCase:
    """The weight quantised by bitsandbytes, so that both expand the same bits."""
    out = torch.randn(rows, columns, device=device).to(dtype)
    packed, state = quantize_by_bitsandbytes(out)
    weight = nf4_tensor(packed, state)

    def run() -> Tensor:
        return nf4.nf4_dequantize(weight, dtype=dtype, out=out)

    def peer() -> Tensor:
        return bnb.dequantize_4bit(packed, state)

    moved = weight.nbytes + out.nbytes
    size = f"{rows}x{columns}"
    return OpCase(
        "NF4 dequantise", size, run, lambda: [(run(), peer())], "bitsandbytes", peer, bytes=moved, tolerance=0.0
    )
