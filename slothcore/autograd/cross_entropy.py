"""Linear layer and cross-entropy in one step, in chunks of rows, with the gradient formed in the forward pass.

Forward   l = h W^T + b,   loss = (1 / n) sum_i [ log sum_v exp(s_iv) - s_i,t(i) ],   s = c tanh(l / c) or l
Backward  with p = softmax(s) and the incoming scalar y:
          dl = (y / n) (p - onehot(t)) * (1 - (s / c)^2)
          dh = dl W,   dW = dl^T h,   db = sum_i dl_i
Shapes    h, dh [N, H] (the rows of `hidden` with a target); W, dW [V, H]; b [V]; l, s, p [N, V]; t [N].
          N = rows with a target, V = vocabulary, H = hidden_size, n = num_items.
Dtypes    l and dl in the dtype of `hidden`, the loss and its sum in float32, dW and db summed over chunks in float32.
Memory    one chunk of l, about 256 MiB, which dl overwrites. dh (and dW, db if asked for) wait for the backward pass,
          which scales the float32 dW of a float32 W where it lies: there is one [V, H] and never two. A second
          backward pass through a retained graph then raises.
Source    chunking: Hsu et al. 2024, arXiv:2410.10989; soft cap: Gemma 2, arXiv:2408.00118.

y is unknown in the forward pass, but it is one number, so the backward pass needs nothing except a multiplication.
1 / n is split as g * q with g in (1, 2] and q a power of two. The forward pass scales dl by g, the backward pass dh by
y * q: exact where y is a power of two, and dl, whose entries are at most 2, stays clear of float16's underflow, where
an entry of p / n would be lost.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from slothcore.autograd.autocast import check_autocast
from slothcore.autograd.first_order import once_differentiable
from slothcore.kernels import cross_entropy, cross_entropy_eager

LOGITS_BYTES = 256 * 2**20
MIN_CHUNK_ROWS = 256
# Rows per chunk are a multiple of a matrix product's tile height.
ROW_MULTIPLE = 128
# float16 loses what is below 6e-8. A probability of 1/V lies near that, and scaled by 2^8 does not.
FLOAT16_HEADROOM = 256.0


def max_chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Most rows whose logits are held at once: about 256 MiB of them, but at least 256 rows."""
    rows = LOGITS_BYTES // (vocabulary * dtype.itemsize)
    return max(MIN_CHUNK_ROWS, rows // ROW_MULTIPLE * ROW_MULTIPLE)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    *,
    num_items: Tensor | int | float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `hidden[rows] @ weight.T + bias` against `targets`, summed and divided by `num_items`.

    The full logits never exist. No gradient work is done for an input that needs none, and none at all when nothing
    needs one or gradients are disabled.

    Args:
        hidden: [T, H] in the compute dtype.
        weight: [V, H]; used in the dtype of `hidden`.
        targets: [N] int64, each in [0, V).
        rows: [N] int64, the distinct rows of `hidden` that the targets belong to; None means all, so N = T.
        num_items: what the sum is divided by: a positive number, or a 0-dim tensor, which is not copied to the host.
            With no targets the loss is 0 whatever it is.
        softcap: cap c of c tanh(logits / c), or None.
        bias: [V] or None.

    Returns: the loss, a 0-dim float32 tensor (float64 for float64 inputs).
    Raises: ValueError if the shapes do not fit, a number given as `num_items` is not positive, or torch.autocast asks
        for another dtype than that of `hidden`.
    """
    _check(hidden, weight, targets, rows, bias)
    check_autocast(hidden)
    if targets.numel() > 0 and not isinstance(num_items, Tensor) and not num_items > 0:
        raise ValueError(f"num_items must be positive, got {num_items}")
    differentiable = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and differentiable:
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, num_items, softcap)
    losses, _ = _losses_and_gradients(
        hidden, weight, bias, targets, rows, grad_scale=None, softcap=softcap, wanted=(False, False, False)
    )
    return _mean(losses, num_items)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, num_items, softcap):
        grad_scale, ctx.remaining_scale = _split_reciprocal(num_items, hidden) if len(targets) else (1.0, 1.0)
        losses, gradients = _losses_and_gradients(
            hidden,
            weight,
            bias,
            targets,
            rows,
            grad_scale=grad_scale,
            softcap=softcap,
            wanted=ctx.needs_input_grad[:3],
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return _mean(losses, num_items)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        scale = grad_output * ctx.remaining_scale
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            _scaled(grad_hidden, scale, hidden_dtype),
            _scaled(grad_weight, scale, weight_dtype, inplace=weight_dtype == torch.float32),
            _scaled(grad_bias, scale, bias_dtype),
            *(None, None, None, None),
        )


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    *,
    grad_scale: Tensor | float | None,
    softcap: float | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The loss of each target, and grad_scale times the gradient of their sum for each input that is wanted."""
    ops = cross_entropy if hidden.is_cuda else cross_entropy_eager
    num_targets, (vocabulary, _) = len(targets), weight.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(num_targets, dtype=wide, device=hidden.device)
    grad_hidden = None
    if wanted[0]:
        grad_hidden = torch.empty_like(hidden) if rows is None else torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if wanted[2] else None

    dense = weight.detach().to(hidden.dtype)
    offset = None if bias is None else bias.detach().to(hidden.dtype)
    chunk_rows = _even_chunk_rows(num_targets, max_chunk_rows(vocabulary, hidden.dtype))
    # Rows of the buffer start at multiples of 64 elements, whatever the vocabulary: unaligned ones halve the speed.
    buffer = torch.empty(
        (min(chunk_rows, num_targets), -(-vocabulary // 64) * 64), dtype=hidden.dtype, device=hidden.device
    )

    for start in range(0, num_targets, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_targets))
        inputs = hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])
        logits = buffer[: len(inputs), :vocabulary]
        if offset is None:
            torch.mm(inputs, dense.t(), out=logits)
        else:
            torch.addmm(offset, inputs, dense.t(), out=logits)
        losses[chunk] = ops.cross_entropy_forward_(logits, targets[chunk], grad_scale=grad_scale, softcap=softcap)
        if grad_hidden is not None:
            if rows is None:
                torch.mm(logits, dense, out=grad_hidden[chunk])
            else:
                grad_hidden.index_copy_(0, rows[chunk], torch.mm(logits, dense))
        if grad_weight is not None:
            _add_product_(grad_weight, logits.t(), inputs)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=wide)
    return losses, (grad_hidden, grad_weight, grad_bias)


def _even_chunk_rows(num_targets: int, most: int) -> int:
    """Rows per chunk so that no chunk exceeds `most` and the last is not a sliver that reads the whole weight again."""
    chunks = max(1, math.ceil(num_targets / most))
    return min(most, max(1, math.ceil(num_targets / chunks / ROW_MULTIPLE)) * ROW_MULTIPLE)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total`, which may be wider than that of `a` and `b`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _split_reciprocal(num_items: Tensor | int | float, hidden: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Factors g and q of 1 / num_items, q a power of two and g in (1, 2], times 2^8 for float16."""
    headroom = FLOAT16_HEADROOM if hidden.dtype == torch.float16 else 1.0
    mantissa: Tensor | float
    if isinstance(num_items, Tensor):
        num_items = _on_device(num_items, hidden)
        mantissa = torch.frexp(num_items).mantissa
    else:
        mantissa = math.frexp(num_items)[0]
    return headroom / mantissa, mantissa / (num_items * headroom)


def _on_device(num_items: Tensor, like: Tensor) -> Tensor:
    return num_items.to(like.device, torch.promote_types(like.dtype, torch.float32), non_blocking=True)


def _mean(losses: Tensor, num_items: Tensor | int | float) -> Tensor:
    """Sum over all targets at once, so that its order does not depend on the chunks, divided by `num_items`."""
    total = losses.sum()
    if len(losses) == 0:
        return total
    return total / (_on_device(num_items, losses) if isinstance(num_items, Tensor) else num_items)


def _scaled(
    gradient: Tensor | None, scale: Tensor, dtype: torch.dtype | None, *, inplace: bool = False
) -> Tensor | None:
    """gradient * scale in `dtype`, with the product rounded once; in its own memory if that is wanted and possible."""
    if gradient is None:
        return None
    # A 0-dim float32 factor would be rounded to a 16-bit gradient's dtype first; one with dimensions is not.
    factor = scale.reshape([1] * gradient.dim())
    reused = inplace and gradient.dtype == dtype
    return torch.mul(gradient, factor, out=gradient if reused else torch.empty_like(gradient, dtype=dtype))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [T, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.dim() != 1 or targets.dtype != torch.int64:
        raise ValueError(f"targets must be [N] int64, got {tuple(targets.shape)} {targets.dtype}")
    expected = len(hidden) if rows is None else len(rows)
    if len(targets) != expected:
        raise ValueError(f"{len(targets)} targets for {expected} rows; drop the ignored rows from both")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{len(weight)}], got {tuple(bias.shape)}")
