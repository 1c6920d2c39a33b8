"""Cross-entropy over rows of logits, with the gradient written over the logits.

Forward   s = c tanh(l / c) with a soft cap c, else s = l
          loss = z - s_t,   z = log sum_v exp(s_v)
Backward  ds_v = exp(s_v - z) - [v = t],   dl_v = g * ds_v * (1 - (s_v / c)^2)
          because d tanh(u) = 1 - tanh(u)^2; without a cap the last factor is 1.
Shapes    l, s, dl [N, V]; t, z, loss [N].  N = rows with a target, V = vocabulary.  g is a scalar.
Dtypes    l and dl float32 or 16-bit; loss and all arithmetic float32.
Rounding  l arrives rounded to its dtype, dl leaves rounded to it; nothing between is rounded.
Source    online normalizer: Milakov & Gimelshein 2018, arXiv:1805.02867; soft cap: arXiv:2408.00118.

Each program owns one row and sweeps it twice: once for z, once for the gradient. In the first sweep every lane keeps
a maximum and a sum of its own, so the warps of a row meet only once, after the last tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.math import tanh


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    grad_scale,
    softcap,
    vocabulary,
    stride_logits_row,
    HAS_SOFTCAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program owns one row of logits.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_row
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)

    # A target outside the row must not read other memory; NaN makes the mistake visible in the loss.
    in_range = (target >= 0) & (target < vocabulary)
    picked = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        picked = softcap * tanh(picked / softcap)

    # The lowest finite number instead of -inf: (-inf) - (-inf) would be NaN in lanes that saw nothing yet.
    maximum = tl.full((BLOCK,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        logits = tl.load(row_ptr + start + columns, mask=columns < vocabulary - start, other=float("-inf"))
        capped = logits.to(tl.float32)
        if HAS_SOFTCAP:
            # The cap would turn the -inf of a lane beyond the row into -c.
            capped = tl.where(columns < vocabulary - start, softcap * tanh(capped / softcap), float("-inf"))
        # Of exp(maximum - larger) and exp(capped - larger) one is exp(0): the other is all there is to compute.
        rest = tl.exp(-tl.abs(capped - maximum))
        total = tl.where(capped > maximum, total * rest + 1, total + rest)
        maximum = tl.maximum(maximum, capped)
    row_maximum = tl.max(maximum, axis=0)
    log_normalizer = row_maximum + tl.log(tl.sum(total * tl.exp(maximum - row_maximum), axis=0))
    tl.store(loss_ptr + row, log_normalizer - picked)

    if WITH_GRADIENT:
        # No warp may overwrite the target's logit before every warp has read it.
        tl.debug_barrier()
        scale = tl.load(grad_scale).to(tl.float32) if SCALE_IS_POINTER else grad_scale
        for start in range(0, vocabulary, BLOCK):
            in_row = columns < vocabulary - start
            capped = tl.load(row_ptr + start + columns, mask=in_row, other=0.0).to(tl.float32)
            slope = scale
            if HAS_SOFTCAP:
                ratio = tanh(capped / softcap)
                capped = softcap * ratio
                slope = scale * (1 - ratio * ratio)
            gradient = tl.exp(capped - log_normalizer)
            gradient = tl.where(start + columns == target, gradient - 1, gradient) * slope
            tl.store(row_ptr + start + columns, gradient.to(logits_ptr.dtype.element_ty), mask=in_row)


def _launch_config(vocabulary: int) -> tuple[int, int]:
    """Columns per tile and warps. Wide tiles keep few rows in flight, so the second sweep still finds them in L2."""
    block = min(16384, max(128, triton.next_power_of_2(vocabulary)))
    return block, max(1, min(32, block // 512))


def cross_entropy_forward_(
    logits: Tensor, targets: Tensor, *, grad_scale: Tensor | float | None, softcap: float | None = None
) -> Tensor:
    """The loss of each row; `logits` is overwritten by its gradient when `grad_scale` is not None.

    Args:
        logits: [N, V] float32 or 16-bit, last dimension contiguous; rows may be strided.
        targets: [N] int64, each in [0, V); the loss of another value is NaN.
        grad_scale: factor of the gradient, a number or a 0-dim tensor on the device of `logits` (read there, so the
            host never waits); None leaves `logits` as they are and skips the second sweep.
        softcap: cap c of s = c tanh(l / c), or None.

    Returns: [N] float32.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 or vocabulary == 1, "the columns of the logits must be contiguous"
    assert targets.shape == (rows,), f"{rows} rows of logits but targets of shape {tuple(targets.shape)}"
    assert targets.dtype == torch.int64, f"targets must be int64, got {targets.dtype}"
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return loss
    block, num_warps = _launch_config(vocabulary)
    _cross_entropy_kernel[(rows,)](
        logits,
        targets.contiguous(),
        loss,
        grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale or 0),
        float(softcap or 0),
        vocabulary,
        logits.stride(0),
        HAS_SOFTCAP=softcap is not None,
        WITH_GRADIENT=grad_scale is not None,
        SCALE_IS_POINTER=isinstance(grad_scale, Tensor),
        BLOCK=block,
        num_warps=num_warps,
    )
    return loss
