"""Causal attention over packed documents as one autograd step; the derivation is in `kernels/attention_backward.py`.

Saved for backward: qkv, the output and one float32 a query head and token (lse). No scores are stored.
"""

from typing import Any

import torch
from torch import Tensor

from slothcore.autograd.first_order import once_differentiable
from slothcore.kernels import attention, attention_backward, attention_backward_eager, attention_eager

LARGEST_HEAD_DIM = 256


class PackedAttention(torch.autograd.Function):
    """out = attention(qkv), where qkv holds the heads of q, k and v side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ops = attention if qkv.is_cuda else attention_eager
        ctx.heads = (num_heads, num_kv_heads, num_kv_heads)
        ctx.max_seqlen = max_seqlen
        ctx.options = {"scale": scale, "window": window, "softcap": softcap}
        q, k, v = qkv.split_with_sizes(ctx.heads, 1)
        out, lse = ops.attention_forward(q, k, v, cu_seqlens, max_seqlen, **ctx.options)
        flat_out = out.flatten(1)
        ctx.save_for_backward(qkv, flat_out, lse, cu_seqlens)
        return flat_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, flat_out, lse, cu_seqlens = ctx.saved_tensors
        ops = attention_backward if qkv.is_cuda else attention_backward_eager
        q, k, v = qkv.split_with_sizes(ctx.heads, 1)
        grad_qkv = ops.attention_backward(
            grad_out.reshape(q.shape), q, k, v, flat_out.view(q.shape), lse, cu_seqlens, ctx.max_seqlen, **ctx.options
        )
        return grad_qkv, None, None, None, None, None, None, None


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each document of a packed stream.

    Args:
        qkv: [T, num_heads + 2 num_kv_heads, D], the heads of q, then k, then v; D at most 256. Query head h reads
            key head h // (num_heads / num_kv_heads).
        cu_seqlens: [documents + 1] int32 on the device of qkv: where each document starts, from 0, and T at the end.
            Documents may be empty.
        max_seqlen: length of the longest document, or any bound on it.
        scale: positive factor of the scores, usually D ** -0.5.
        window: a query sees at most this many keys, its own included; None for all before it.
        softcap: scores s become softcap * tanh(s / softcap); None for no cap.
    Returns: [T, num_heads * D]. Its gradient with respect to qkv is a fresh contiguous tensor.
    Raises: ValueError for head counts that do not divide or fit qkv, and for options out of range.
    Source: Dao 2023, arXiv:2307.08691.
    """
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
    if qkv.dim() != 3 or qkv.shape[1] != num_heads + 2 * num_kv_heads:
        raise ValueError(
            f"qkv must be [tokens, {num_heads} + 2 * {num_kv_heads} heads, head_dim], got {tuple(qkv.shape)}"
        )
    if qkv.shape[2] > LARGEST_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {LARGEST_HEAD_DIM}, got {qkv.shape[2]}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}; use None for no cap")
    if qkv.stride(2) != 1:
        qkv = qkv.contiguous()
    return PackedAttention.apply(qkv, cu_seqlens, max_seqlen, num_heads, num_kv_heads, scale, window, softcap)
