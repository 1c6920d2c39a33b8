"""Operations that the arithmetic bounds: attention, the loss with its head, a linear with LoRA."""

from collections.abc import Iterator
from functools import cache

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import OpCase, nf4_tensor, quantize_by_bitsandbytes
from benchmarks.shapes import OpShape
from slothcore.autograd.attention import packed_attention
from slothcore.autograd.cross_entropy import linear_cross_entropy
from slothcore.autograd.lora import Projection, lora_linear

LORA_RANK = 16
# Rows of the loss that are checked against the full float32 logits.
CHECKED_ROWS = 256


def attention_cases(shape: OpShape, dtype: torch.dtype, device: str) -> Iterator[OpCase]:
    """Causal attention over packed documents of equal length; checked against torch's over a batch of them."""
    tokens, dim, longest = shape.tokens, shape.head_dim, shape.document_length
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    leaf = qkv.clone().requires_grad_()
    dout = torch.randn(tokens, heads * dim, device=device).to(dtype)
    bounds = torch.arange(0, tokens + 1, longest, dtype=torch.int32, device=device)

    def ours(qkv: Tensor) -> Tensor:
        return packed_attention(qkv, bounds, longest, num_heads=heads, num_kv_heads=kv_heads, scale=dim**-0.5)

    def parts(qkv: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in qkv.split([heads, kv_heads, kv_heads], dim=1)]

    def batched(qkv: Tensor) -> Tensor:
        q, k, v = (part.unflatten(0, (shape.documents, longest)).transpose(1, 2) for part in parts(qkv))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(tokens, heads * dim)

    # Three tensors of its own, so that the peer spends nothing on putting their gradients together.
    separate = [part.requires_grad_() for part in parts(qkv)]

    def varlen() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = separate
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0)).flatten(1)

    def backward(output: Tensor) -> Tensor:
        return torch.autograd.grad(output, leaf, dout, retain_graph=True)[0]

    # The forward pass whose backward is timed runs once, when first asked for.
    our_output, varlen_output = cache(lambda: ours(leaf)), cache(varlen)
    size = f"{shape.documents}x{longest}, {heads}/{kv_heads} heads of {dim}"
    # Two products of 2 D operations for each score; those above the diagonal, half of them, are not needed.
    flops = 2 * shape.documents * heads * dim * longest**2
    yield OpCase(
        "attention forward",
        size,
        lambda: ours(qkv),
        lambda: [(ours(qkv), batched(qkv))],
        "varlen_attn",
        varlen,
        flops=flops,
    )
    yield OpCase(
        "attention backward",
        size,
        lambda: backward(our_output()),
        lambda: [(backward(our_output()), backward(batched(leaf)))],
        "varlen_attn",
        lambda: torch.autograd.grad(varlen_output(), separate, dout, retain_graph=True),
        flops=5 * flops // 2,
    )


def cross_entropy_case(shape: OpShape, dtype: torch.dtype, device: str) -> OpCase:
    """The loss of every token with the gradient of the hidden states; the head is frozen."""
    tokens, hidden_size, vocabulary = shape.tokens, shape.hidden_size, shape.vocab_size
    hidden = torch.randn(tokens, hidden_size, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) * hidden_size**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    checked = min(tokens, CHECKED_ROWS)

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, None, num_items=len(targets))

    def check() -> list[tuple[Tensor, Tensor]]:
        rows, wanted = hidden.detach()[:checked].requires_grad_(), targets[:checked]
        ours = loss(rows, wanted)
        exact = rows.detach().float().requires_grad_()
        expected = F.cross_entropy(exact @ weight.float().T, wanted)
        return [(ours, expected), (torch.autograd.grad(ours, rows)[0], torch.autograd.grad(expected, exact)[0])]

    def products() -> Tensor:
        with torch.no_grad():
            return (hidden @ weight.T) @ weight

    return OpCase(
        "linear + cross-entropy, both ways",
        f"{tokens}x{hidden_size}x{vocabulary}",
        lambda: torch.autograd.grad(loss(hidden, targets), hidden),
        check,
        "its two GEMMs",
        products,
        flops=4 * tokens * hidden_size * vocabulary,
    )


def lora_cases(shape: OpShape, dtype: torch.dtype, device: str) -> Iterator[OpCase]:
    """A linear over NF4 with LoRA, against the bare product with the dense weight: many rows, and few."""
    for tokens in (shape.tokens, max(1, shape.tokens // 16)):
        for out_features, in_features in (
            (shape.intermediate_size, shape.hidden_size),
            (shape.hidden_size, shape.intermediate_size),
        ):
            yield from lora_linear_cases(tokens, out_features, in_features, dtype, device)


def lora_linear_cases(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: str
) -> Iterator[OpCase]:
    def normal(*size: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*size, device=device)

    x, dy = normal(tokens, in_features).to(dtype).requires_grad_(), normal(tokens, out_features).to(dtype)
    packed, state = quantize_by_bitsandbytes(normal(out_features, in_features, std=in_features**-0.5).to(dtype))
    dense = bnb.dequantize_4bit(packed, state)
    lora_A = normal(LORA_RANK, in_features, std=in_features**-0.5).requires_grad_()
    lora_B = normal(out_features, LORA_RANK, std=0.1).requires_grad_()
    projection = Projection(weight=nf4_tensor(packed, state), lora_A=lora_A, lora_B=lora_B)
    leaves = (x, lora_A, lora_B)
    output = lora_linear(x, projection)

    def forward() -> Tensor:
        return lora_linear(x, projection)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, dy, retain_graph=True)

    def plain() -> Tensor:
        return F.linear(x.float(), dense.float()) + F.linear(F.linear(x.float(), lora_A), lora_B)

    size, flops = f"{tokens}x{in_features} to {out_features}", 2 * tokens * in_features * out_features
    yield OpCase(
        "NF4 + LoRA linear forward",
        size,
        forward,
        lambda: [(forward(), plain())],
        "bare matmul",
        lambda: torch.mm(x.detach(), dense.T),
        flops=flops,
    )
    yield OpCase(
        "NF4 + LoRA linear backward",
        size,
        backward,
        lambda: list(zip(backward(), torch.autograd.grad(plain(), leaves, dy.float()), strict=True)),
        "bare matmul",
        lambda: torch.mm(dy, dense),
        flops=flops,
    )
