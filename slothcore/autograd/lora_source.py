"""The input x of projections as the backward pass knows it: x itself, or the norm that made it.

A norm's output need not be kept for dA = v^T x. With x = y of an RMSNorm, whose r is one number a token,

    x[t, k] = h[t, k] r[t] s[k]     so     dA = v^T x = ((r * v)^T h) * s

and h is the residual stream, which the norm's own backward keeps anyway. r * v is [T, ranks] and s scales columns of
[ranks, K]: next to nothing. x was rounded once or twice on its way, h is what it was, so this dA is the closer one.

In float16 r * v may leave the range (r is 1 / rms(h)), and a dropout mask lies on x, not on h: there x is made again
from h, r and s, one pass over memory, to the bits that it had. At few tokens, where a launch counts for more than
arithmetic, r goes to h instead, inside the product (`slothcore.kernels.lora_grads_few`).

Shapes    x, h [T, K]; r [T]; s = weight + offset [K]; v [T, ranks]; dA [ranks, K].  T = tokens, K = in_features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slothcore.autograd.rms_norm import Normed, NormRule
from slothcore.kernels import rms_norm, rms_norm_eager
from slothcore.kernels.lora_grads_eager import ColumnScale, transposed_product


class JoinedA(NamedTuple):
    """The gradient of A of all projections side by side.

    Attributes:
        grad: [ranks, K] float32, or float64.
        scale: s, which its columns still lack; None if they lack nothing.
    """

    grad: Tensor
    scale: ColumnScale | None = None


class Source(NamedTuple):
    """What tells x.

    Attributes:
        base: x, or h if a norm made x; None if nothing will be asked of x.
        rstd: r of that norm; None if base is x.
        weight: of that norm; None if base is x.
        rule: of that norm; None if base is x.
    """

    base: Tensor | None
    rstd: Tensor | None = None
    weight: Tensor | None = None
    rule: NormRule | None = None

    @staticmethod
    def of(x: Tensor, normed: Normed | None) -> "Source":
        """Prefer the norm, if there was one."""
        if normed is None:
            return Source(x)
        return Source(normed.h, normed.rstd, normed.weight, normed.rule)

    @staticmethod
    def restored(tensors: Sequence[Tensor | None], rule: NormRule | None) -> "Source":
        """Undo `tensors`."""
        base, rstd, weight = tensors
        return Source(base, rstd, weight, rule)

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What `save_for_backward` takes of it."""
        return self.base, self.rstd, self.weight

    @property
    def scale(self) -> ColumnScale | None:
        """s; None if base is x."""
        return None if self.weight is None or self.rule is None else ColumnScale(self.weight, self.rule.weight_offset)

    def input(self) -> Tensor:
        """x [T, K], made again if a norm made it."""
        assert self.base is not None
        if self.rstd is None or self.weight is None or self.rule is None:
            return self.base
        ops = rms_norm if self.base.is_cuda else rms_norm_eager
        return ops.rms_norm_again(
            self.base,
            self.weight,
            self.rstd,
            weight_offset=self.rule.weight_offset,
            cast_before_weight=self.rule.cast_before_weight,
        )

    def times(self, v: Tensor) -> JoinedA:
        """v^T x for v [T, ranks], by way of h if that is what there is and the range allows it."""
        if self.base is None or self.rstd is None or v.dtype == torch.float16:
            return JoinedA(transposed_product(v, self.input()))
        # In the dtype of r and back: rounded once.
        scaled_v = torch.mul(v, self.rstd[:, None], out=torch.empty_like(v))
        return JoinedA(transposed_product(scaled_v, self.base), self.scale)
