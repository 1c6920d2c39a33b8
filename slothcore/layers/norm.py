"""Root-mean-square normalisation, alone or fused with the residual add before it and the norm before that."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slothcore.autograd import lora_few
from slothcore.autograd.rms_norm import Normed, NormRule, add_rms_norm, is_decoding, rms_norm
from slothcore.autograd.sandwich_norm import post_norm_add_norm
from slothcore.layers.linear import Linear


class RMSNorm(nn.Module):
    """y = x / rms(x) * (weight + weight_offset) over the last dimension.

    Args:
        hidden_size: width of the last dimension.
        eps: added to the mean square.
        weight_offset: added to the weight (Gemma stores the weight minus one).
        cast_before_weight: round x / rms(x) to the dtype of x before the weight (Llama), or only the result (Gemma).
    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        weight_offset: float = 0.0,
        cast_before_weight: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device))
        self.eps = eps
        self.weight_offset = weight_offset
        self.cast_before_weight = cast_before_weight

    @property
    def rule(self) -> NormRule:
        """What it does beside multiplying by its weight."""
        return NormRule(self.eps, self.weight_offset, self.cast_before_weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, read_by: Sequence[Linear] = ()) -> Normed:
        """Normalise x [T, H] or, with `residual` [T, H], h = x + residual.

        Args:
            read_by: the layers that will read y together; with a few rows, the inputs of their LoRA terms are made too.
        Returns: (y, h, ...): y [T, H] is the norm, h [T, H] what was normalised; the rest lets those who read y make it
            again instead of keeping it.
        """
        rule = self.rule
        if read_by and is_decoding(x):
            readers = [linear.projection() for linear in read_by]
            normed = lora_few.normed(x, residual, self.weight, rule, readers)
            if normed is not None:
                return normed
        if residual is None:
            return rms_norm(x, self.weight, **rule._asdict())
        return add_rms_norm(x, residual, self.weight, **rule._asdict())

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, weight_offset={self.weight_offset}"


def norm_add_norm(branch: Tensor, residual: Tensor, *, post: RMSNorm, pre: RMSNorm) -> Normed:
    """The step between two branches with sandwich norms: h = residual + post(branch), y = pre(h), as one operation.

    Args:
        branch, residual: [T, H].
        post: the norm that ends the branch.
        pre: the norm that begins the next; of the same rule.
    Returns: (y, h, ...), both [T, H], as `RMSNorm` returns them.
    """
    rule = pre.rule
    assert rule == post.rule, "the two norms follow different rules"
    return post_norm_add_norm(branch, residual, post.weight, pre.weight, **rule._asdict())
