"""Where NF4 weights are decoded inside the product and where a kept copy is read instead."""

from dataclasses import replace

import pytest
import torch

from slothcore.autograd import lora_projection
from slothcore.autograd.lora_group import Group, Projection
from slothcore.autograd.lora_projection import NF4_OVER_COPY_ROWS, NF4_OVER_COPY_ROWS_OF_LARGE, decodes_in_kernel
from slothcore.kernels import nf4, nf4_gemm
from slothcore.kernels.nf4_tensor import Nf4Tensor


def with_copy(out_features: int, in_features: int) -> Nf4Tensor:
    dense = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    return replace(nf4.nf4_quantize(dense), decoded=dense)


@pytest.mark.gpu
def test_large_weights_are_decoded_over_their_copies_where_permutes_are_fast(monkeypatch) -> None:
    """On a GPU without that kernel, for an unaligned weight, and beside a small weight the copy is read sooner."""
    monkeypatch.setattr(lora_projection, "NF4_LARGE", 256 * 512)
    large, small = with_copy(256, 512), with_copy(128, 512)
    x = torch.empty(NF4_OVER_COPY_ROWS_OF_LARGE + 1, 512, device="cuda", dtype=torch.bfloat16)
    shifted = torch.empty(large.packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(large.packed)
    permutes = nf4_gemm.can_permute(x, large)
    for weights, fast in (
        ([large], permutes),
        ([large, large], permutes),
        ([large, small], False),
        ([replace(large, packed=shifted)], False),
    ):
        group = Group.of([Projection(weight) for weight in weights])
        limit = NF4_OVER_COPY_ROWS_OF_LARGE if fast else NF4_OVER_COPY_ROWS
        assert decodes_in_kernel(x[:limit], group)
        assert not decodes_in_kernel(x[: limit + 1], group)
