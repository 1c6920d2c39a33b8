"""Where NF4 weights are decoded inside the product and where a kept copy is read instead."""

from dataclasses import replace

import pytest
import torch

from slothcore.autograd import lora_projection
from slothcore.autograd.lora_group import Group, Projection
from slothcore.autograd.lora_projection import (
    NF4_OVER_COPY_ROWS,
    NF4_OVER_COPY_ROWS_OF_LARGE,
    decoded_beside_products,
    decodes_in_kernel,
    input_grad,
    project,
)
from slothcore.kernels import nf4, nf4_gemm, nf4_gemm_group
from slothcore.kernels.nf4_tensor import Nf4Tensor
from tests.numerics import relative_error


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


@pytest.mark.gpu
def test_some_hundred_rows_are_multiplied_while_weights_are_decoded(monkeypatch) -> None:
    """Both directions; not where a copy is kept, in float32, or beside a dense weight; and close to decoding first."""
    if torch.cuda.get_device_capability()[0] != 9 or not nf4_gemm_group.has_gluon():
        pytest.skip("the kernel is for Hopper, and for a Triton with Gluon")
    monkeypatch.setattr(nf4_gemm_group, "LEAST_WEIGHTS", 768 * 512)
    kept = with_copy(256, 512)
    weights = [replace(with_copy(n, 512), decoded=None) for n in (512, 256)]
    group = Group.of([Projection(weight) for weight in weights])
    x = torch.randn(nf4_gemm_group.MOST_ROWS, 512, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(nf4_gemm_group.MOST_ROWS, 768, device="cuda", dtype=torch.bfloat16)

    def taken(left: torch.Tensor, group: Group) -> bool:
        return all(
            decoded_beside_products(left, group, (), backward=backward) is not None for backward in (False, True)
        )

    assert taken(x, group)
    assert not taken(x.float(), group)
    assert not taken(torch.cat([x, x[:1]]), group)
    assert not taken(x, Group.of([Projection(weights[0])])), "too small a weight"
    assert not taken(x, Group.of([Projection(weights[0]), Projection(kept)]))
    assert kept.decoded is not None
    assert not taken(x, Group.of([Projection(weights[0]), Projection(kept.decoded)]))
    y, dx = project(x, None, group, None, None), input_grad(dy, None, group, None)
    monkeypatch.setattr(nf4_gemm_group, "MOST_ROWS", 0)
    assert not taken(x, group)
    for beside, first in ((y, project(x, None, group, None, None)), (dx, input_grad(dy, None, group, None))):
        assert relative_error(beside, first) < torch.finfo(torch.bfloat16).eps
