"""Causal attention of equally long documents by cuDNN, forward only.

What it computes is in `attention.py`; here is when cuDNN computes it, and how the packed stream looks to it.

| must hold                                     | because                                                            |
| --------------------------------------------- | ------------------------------------------------------------------ |
| Hopper or a data-centre Blackwell             | elsewhere cuDNN was not measured, or lacks the kernel              |
| bfloat16 or float16; head_dim 64 or 128       | what its fast kernels take                                         |
| no window that hides a key, no soft cap       | torch hands cuDNN the causal mask only                             |
| every document max_seqlen tokens long         | views [documents, heads, length, D] then need no copy, and the     |
|                                               | host knows it without asking the device: T = documents * max_seqlen|
| max_seqlen a multiple of 512                  | a shape seen for the first time costs 60-100 ms of planning, so    |
|                                               | only shapes that come again                                        |
| at least 4096 tokens                          | less saves at most 0.05 ms a call                                  |
| rows in units of 16 bytes, 32-bit offsets     | its loads                                                          |

Measured on an H100, 32/8 heads of 128, bfloat16: 4x2048 0.257 ms against 0.317 by our kernel, 1x8192 0.890 against
1.038, 16x512 0.098 against 0.145. The rule reads shapes only, so a resumed run takes the same path, and the forward
pass has one order of summation. The backward pass stays ours: cuDNN adds up dq with atomics on these GPUs (torch does
not pass its option for a fixed order on), and joining its three gradients would cost 0.07 ms at 8192 tokens.
"""

from functools import cache

import torch
from torch import Tensor

from slothcore.kernels.attention_tiles import aligned_rows
from slothcore.kernels.gpu import device_capability

LENGTHS = 512
FEWEST_TOKENS = 4096


@cache
def cudnn_serves(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether cuDNN has a fast kernel for such heads on a device of that capability, and torch has cuDNN."""
    return (
        capability is not None
        and capability[0] in (9, 10)
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and torch.backends.cudnn.is_available()
    )


def cudnn_fits(
    q: Tensor, k: Tensor, v: Tensor, documents: int, max_seqlen: int, *, window: int | None, softcap: float | None
) -> bool:
    """Whether cuDNN takes the forward pass over [T, heads, D]; a function of shapes, strides and the device."""
    tokens, _, head_dim = q.shape
    return (
        cudnn_serves(head_dim, q.dtype, device_capability(q.device))
        and tokens >= FEWEST_TOKENS
        # No document is longer than max_seqlen, so their lengths add up to this only if each is as long.
        and tokens == documents * max_seqlen
        and max_seqlen % LENGTHS == 0
        and softcap is None
        and (window is None or window >= max_seqlen)
        and all(aligned_rows(x) and tokens * x.stride(0) < 2**31 for x in (q, k, v))
    )


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, documents: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `attention.attention_forward`, for `documents` equally long ones; see `cudnn_fits`."""
    tokens, num_heads, head_dim = q.shape
    by_document = [x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v)]
    # Positions: no bias, with the log-sum-exp, no dropout, causal, no debug mask.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *by_document, None, True, 0.0, True, False, scale=scale
    )
    # cuDNN lays out the output as q is, token by token, so nothing is copied; lse [documents, Hq, length, 1] is.
    out = out.transpose(1, 2).reshape(tokens, num_heads, head_dim).contiguous()
    lse = lse.reshape(documents, num_heads, -1).transpose(0, 1).reshape(num_heads, tokens)
    return out, lse
