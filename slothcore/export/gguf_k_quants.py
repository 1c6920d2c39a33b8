"""The K-quants of GGUF: blocks of 256 numbers in groups, each group with a small integer scale (and minimum) of its
own.

Q4_K, Q5_K  groups of 32:  x ~ d * s * q - m * t,     q in 0..15 or 0..31,  s and t in 0..63
Q6_K        groups of 16:  x ~ d * s * (q - 32),      q in 0..63,           s in -128..127
with d and m float16, one a block; s and t integers, one a group.

Each group is fitted by itself first: several trial steps round its numbers to integers, least squares gives the scale
(and minimum) that suit those integers best, and the trial with the smallest weighted error is kept. Then the groups'
scales are rounded to integers, and all numbers are rounded once more with what these make.

Layout      x [numbers of a group, groups], so that every number of a group has a row of its own: all groups are fitted
            at once, and a sum over a group adds whole rows.
Exactness   every sum adds in the order of a loop over the group, in float32 without fused products, and every quotient
            is a true division; so on a CPU the bytes are those of llama.cpp built for x86-64 (`quantize_row_q4_K_ref`
            and its siblings in `ggml-quants.c`, whose searches these are).
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Below this, llama.cpp takes a group's numbers for zeros.
NOTHING = 1e-15

Pack = Callable[[Tensor], Tensor]


def q4_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 to [n, 144] uint8: d, m, scales and minima of 6 bits, two numbers a byte."""
    d, m, scales, minima, q = _fit_scale_and_minimum(blocks, top=15, first_trial=-1.0, trials=21)
    return torch.cat((half_bytes(d), half_bytes(m), _six_bits(scales, minima), _nibbles(q)), 1)


def q5_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 to [n, 176] uint8: as Q4_K, with the fifth bits of the eight groups together in 32 bytes."""
    d, m, scales, minima, q = _fit_scale_and_minimum(blocks, top=31, first_trial=-0.5, trials=16)
    fifth = _join(q >> 4, bits=1)
    return torch.cat((half_bytes(d), half_bytes(m), _six_bits(scales, minima), fifth, _nibbles(q & 15)), 1)


def q6_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 to [n, 210] uint8: lower four bits, upper two bits, scales of 8 bits, d."""
    d, scales, q = _fit_scale(blocks)
    # Halves of 128 numbers; in each, numbers 0..31 share bytes with 64..95, and 32..63 with 96..127.
    quarters = q.reshape(-1, 2, 4, 32)
    low = quarters & 15
    low = low[:, :, :2] | low[:, :, 2:] << 4
    high = _join((quarters >> 4).flatten(0, 1), bits=2)
    count = len(blocks)
    return torch.cat((low.reshape(count, 128), high.reshape(count, 64), scales.view(torch.uint8), half_bytes(d)), 1)


def half_bytes(d: Tensor) -> Tensor:
    """Factors [n, 1] as float16, [n, 2] uint8. Raises: ValueError if one is not finite."""
    half = d.half()
    if not half.isfinite().all():
        raise ValueError(
            "a weight is not finite, or too large for the float16 factors of this kind; check the model, or write BF16"
        )
    return half.view(torch.uint8)


def quotient(numerator: float | Tensor, denominator: Tensor) -> Tensor:
    """A true division also where torch would multiply by a reciprocal, which rounds twice."""
    if isinstance(numerator, float):
        numerator = denominator.new_full((), numerator)
    return torch.div(numerator, denominator)


def extreme(x: Tensor) -> Tensor:
    """The number of each column with the largest magnitude, the first of several, with its sign, [columns]."""
    high, low = x.amax(0), x.amin(0)
    found = torch.where(high > -low, high, low)
    # Both signs reach it in few columns; argmax over all would take longer than a search.
    tied = ((high == -low) & (high != 0)).nonzero()[:, 0]
    if len(tied):
        columns = x[:, tied]
        found[tied] = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    # Plus zero, so that there is no negative one.
    return found + 0.0


def _fit_scale_and_minimum(
    blocks: Tensor, *, top: int, first_trial: float, trials: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d [n, 1] and m [n, 1] float16 values, scales and minima [n, 8] uint8, numbers [n, 8, 32] uint8."""
    count = len(blocks)
    x = blocks.reshape(-1, 32).t().contiguous()
    fit = _AffineFit(x, top)
    for trial in range(trials):
        fit.improve(float(np.float32(first_trial) + np.float32(0.1) * np.float32(trial) + np.float32(top)))
    scales, minima = fit.scale.reshape(count, 8), 0.0 - fit.minimum.reshape(count, 8)
    d, scales = _to_six_bits(scales)
    m, minima = _to_six_bits(minima)
    step = d.half().float() * scales
    offset = m.half().float() * minima
    q = blocks.reshape(count, 8, 32) + offset.unsqueeze(2)
    q = q.div_(step.unsqueeze(2)).round_().clamp_(0, top)
    # A group whose scale is nothing beside its block's keeps the integers of its own fit, as llama.cpp leaves them.
    q = torch.where(step.unsqueeze(2) == 0, fit.integers().t().reshape(q.shape), q)
    return d, m, scales.to(torch.uint8), minima.to(torch.uint8), q.to(torch.uint8)


class _AffineFit:
    """The best x ~ scale * q + minimum so far, q in 0..top, for every group at once.

    `step` and `shift` are what the kept integers were rounded with: q = round((x - shift) * step).
    """

    def __init__(self, x: Tensor, top: int) -> None:
        self.x, self.top = x, top
        self.weights = x.abs()
        # The root in float64, because torch's float32 root may be off by a bit.
        self.weights.add_((_sum_rows(x * x) / 32).double().sqrt_().float())
        self.sum_w = _sum_rows(self.weights)
        self.sum_x = _sum_rows(self.weights * x)
        self.largest = x.amax(0)
        self.minimum = x.amin(0).clamp_(max=0)
        spread = self.largest - self.minimum
        is_flat = spread == 0
        self.step, self.shift = quotient(float(top), spread.masked_fill_(is_flat, 1)), self.minimum.clone()
        self.scale = quotient(1.0, self.step).masked_fill_(is_flat, 0)
        self.q, self.products = torch.empty_like(x), x.new_empty(len(x), 3, x.shape[1])
        self.wq, self.wqq, self.wqx = self.products.unbind(1)
        self._round(self.step)
        self.error = self._error(self.scale, self.minimum)

    def improve(self, steps: float) -> None:
        """Try the spread in so many steps; keep what has a smaller error."""
        # A group without a spread comes out as NaN, which is no better.
        step = quotient(steps, self.largest - self.minimum)
        self._round(step)
        torch.mul(self.weights, self.q, out=self.wq)
        torch.mul(self.wq, self.q, out=self.wqq)
        torch.mul(self.wq, self.x, out=self.wqx)
        sum_q, sum_qq, sum_qx = _sum_rows(self.products)
        determinant = self.sum_w * sum_qq - sum_q * sum_q
        scale = (self.sum_w * sum_qx - self.sum_x * sum_q) / determinant
        minimum = (sum_qq * self.sum_x - sum_q * sum_qx) / determinant
        scale = torch.where(minimum > 0, sum_qx / sum_qq, scale)
        minimum.clamp_(max=0)
        error = self._error(scale, minimum)
        is_better = (determinant > 0) & (error < self.error)
        _replace(self.step, step, is_better)
        _replace(self.shift, self.minimum, is_better)
        _replace(self.error, error, is_better)
        _replace(self.scale, scale, is_better)
        # From here on the spread is counted from the minimum that was found.
        _replace(self.minimum, minimum, is_better)

    def integers(self) -> Tensor:
        """q of what was kept, [32, groups]."""
        return ((self.x - self.shift) * self.step).round_().clamp_(0, self.top)

    def _round(self, step: Tensor) -> None:
        torch.sub(self.x, self.minimum, out=self.q).mul_(step).round_().clamp_(0, self.top)

    def _error(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Weighted squares of what is left over; overwrites q."""
        return _sum_rows(self.q.mul_(scale).add_(minimum).sub_(self.x).square_().mul_(self.weights))


def _fit_scale(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d [n, 1], scales [n, 16] int8 and numbers [n, 16, 16] uint8 of Q6_K."""
    count = len(blocks)
    x = blocks.reshape(-1, 16).t().contiguous()
    weights = x * x
    weighted = weights * x
    largest = extreme(x)
    is_nothing = largest.abs() < NOTHING
    largest.masked_fill_(is_nothing, 1)
    q, products = torch.empty_like(x), x.new_empty(16, 2, x.shape[1])
    xq, qq = products.unbind(1)
    scale, best, kept = (torch.zeros_like(largest) for _ in range(3))
    for trial in (0, *range(-9, 0), *range(1, 10)):
        step = quotient(-float(np.float32(32) + np.float32(0.1) * np.float32(trial)), largest)
        torch.mul(x, step, out=q).round_().clamp_(-32, 31)
        torch.mul(weighted, q, out=xq)
        torch.mul(weights, q, out=qq).mul_(q)
        sum_xq, sum_qq = _sum_rows(products)
        is_better = sum_qq > 0
        if trial != 0:
            # It explains more of the squares.
            is_better &= sum_xq * sum_xq > best * sum_qq
        found = sum_xq / sum_qq
        _replace(kept, step, is_better)
        _replace(scale, found, is_better)
        _replace(best, found * sum_xq, is_better)
    # What is not finite compares as no better, and would come out as zero.
    scale.masked_fill_(is_nothing, 0).masked_fill_(~largest.isfinite(), torch.nan)
    fitted = (x * kept).round_().clamp_(-32, 31).add_(32).masked_fill_(is_nothing, 0)
    scales = scale.reshape(count, 16)
    largest_scale = extreme(scales.t()).unsqueeze(1)
    is_zero = largest_scale.abs() < NOTHING
    step = quotient(-128.0, largest_scale)
    d = quotient(1.0, step).masked_fill_(is_zero, 0)
    scales = (scales * step).round_().clamp_(max=127).masked_fill_(is_zero, 0)
    factor = (d.half().float() * scales).unsqueeze(2)
    numbers = (blocks.reshape(count, 16, 16) / factor).round_().clamp_(-32, 31).add_(32)
    numbers = torch.where(factor == 0, fitted.t().reshape(numbers.shape), numbers)
    numbers.masked_fill_(is_zero.unsqueeze(2), 0)
    return d, scales.to(torch.int8), numbers.to(torch.uint8)


def _to_six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Their common factor [n, 1], and what they are of it [n, 8], integers in 0..63 as float32."""
    largest = values.amax(1, keepdim=True).clamp_(min=0)
    inverse = quotient(63.0, largest).masked_fill_(largest == 0, 0)
    # A negative scale is nonsense that llama.cpp wraps around; so it comes out as the largest one.
    integers = ((values * inverse).round_().to(torch.int32) & 255).clamp_(max=63)
    return quotient(largest, torch.full_like(largest, 63)), integers.float()


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """[n, 8] and [n, 8] in 12 bytes: the first four of each whole, with the upper bits of the last four above them."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return torch.cat((first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4), 1)


def _nibbles(q: Tensor) -> Tensor:
    """[n, 8, 32] in [n, 128] bytes: the numbers of an even group low, those of the next group high."""
    return (q[:, 0::2] | q[:, 1::2] << 4).flatten(1)


def _join(q: Tensor, *, bits: int) -> Tensor:
    """[n, groups, 32] in [n, 32] bytes, so many bits of each group, the first group lowest."""
    joined = q[:, 0].clone()
    for group in range(1, q.shape[1]):
        joined |= q[:, group] << bits * group
    return joined


def _replace(kept: Tensor, found: Tensor, where: Tensor) -> None:
    torch.where(where, found, kept, out=kept)


def _sum_rows(x: Tensor) -> Tensor:
    """[rows, ...] to [...], one row after the other; torch's own sum takes another order."""
    if x.is_cuda:
        total = x[0].clone()
        for row in x[1:]:
            total.add_(row)
        return total
    # The same in one call, so that many threads need not wait for Python. (On a GPU it has no order.)
    return x.new_zeros(1, *x.shape[1:]).index_add_(0, _zeros(len(x)), x)[0]


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)
