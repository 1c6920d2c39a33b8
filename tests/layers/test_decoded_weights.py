"""Decoded copies of NF4 weights: what they hold, how long they stay, and what a group of them looks like."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slothcore.kernels import nf4_eager
from slothcore.kernels.nf4_tensor import decoded_together
from slothcore.layers.linear import Linear, gated_mlp, keep_decoded_together, project_together

IN, OUT, RANK = 64, 96, 8


def layer(
    out: int = OUT,
    inner: int = IN,
    *,
    lora: bool = False,
    bias: bool = False,
    dropout: float = 0.0,
    double_quant: bool = True,
) -> Linear:
    """An NF4 layer in float32 on the CPU."""
    linear = Linear(inner, out, bias=bias, dtype=torch.float32, device="cpu")
    linear.set_nf4(nf4_eager.nf4_quantize(torch.randn(out, inner) / inner**0.5, double_quant=double_quant))
    if linear.bias is not None:
        torch.nn.init.normal_(linear.bias)
    if lora:
        linear.attach_lora(torch.randn(RANK, inner) / 8, torch.randn(out, RANK), scaling=0.5, dropout=dropout)
    return linear


def kept(linear: Linear) -> Tensor | None:
    return linear.base_weight().decoded


def with_decoded(**options) -> Linear:
    linear = layer(**options)
    linear.keep_decoded(torch.float32)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_kept_copy_holds_what_decoding_gives_and_is_no_part_of_the_state(dtype) -> None:
    linear = layer(lora=True)
    before = linear.state_dict()
    expected = linear.dequantized(dtype)
    linear.keep_decoded(dtype)
    assert linear.has_decoded(dtype)
    assert torch.equal(kept(linear), expected)
    assert not kept(linear).requires_grad
    assert {name for name, _ in linear.named_parameters()} == {"lora_A", "lora_B"}
    assert linear.state_dict().keys() == before.keys()
    assert linear.base_weight().nbytes == layer().base_weight().nbytes


def test_a_dense_view_of_a_weight_reads_its_copy_only_in_the_dtype_of_the_copy() -> None:
    linear = layer()
    exact = linear.dequantized(torch.float32)
    linear.keep_decoded(torch.bfloat16)
    kept(linear).zero_()  # tells who reads it
    assert not linear.dequantized(torch.bfloat16).any()
    assert torch.equal(linear.dequantized(torch.float32), exact)
    # A caller may write to what it gets.
    linear.dequantized(torch.bfloat16).fill_(1.0)
    assert not kept(linear).any()


def test_a_copy_stays_until_it_is_dropped() -> None:
    linear = with_decoded(lora=True)
    copy = weakref.ref(kept(linear))
    linear(torch.randn(3, IN, requires_grad=True)).sum().backward()
    linear.eval().requires_grad_(False)
    assert linear.base_weight() is linear.base_weight()
    assert kept(linear) is copy()
    linear.drop_decoded()
    gc.collect()
    assert kept(linear) is None
    assert copy() is None
    linear.drop_decoded()


REPLACEMENTS = {
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "to a device": lambda m: m.to("meta"),
    "parent": lambda m: torch.nn.Sequential(m).half(),
    "set_nf4": lambda m: m.set_nf4(nf4_eager.nf4_quantize(torch.randn(OUT, IN))),
    "set_dense": lambda m: m.set_dense(torch.randn(OUT, IN)),
    "load_state_dict": lambda m: m.load_state_dict(layer().state_dict()),
    "load_state_dict, assign": lambda m: m.load_state_dict(layer().state_dict(), assign=True),
    "parent's load_state_dict": lambda m: torch.nn.Sequential(m).load_state_dict(
        torch.nn.Sequential(layer()).state_dict()
    ),
    "a buffer": lambda m: setattr(m, "weight", layer().weight),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_a_copy_goes_with_the_weight_that_it_was_made_of(replacement) -> None:
    linear = with_decoded()
    copy = weakref.ref(kept(linear))
    replacement(linear)
    assert not linear.is_nf4 or kept(linear) is None
    gc.collect()
    assert copy() is None


def test_a_group_of_copies_is_one_matrix() -> None:
    group = [layer(out, double_quant=out != 32) for out in (OUT, 32, 32, 40)]
    keep_decoded_together(group, torch.float32)
    weights = [linear.base_weight() for linear in group]
    for number in range(1, 5):
        matrix = decoded_together(weights[:number], torch.float32)
        assert torch.equal(matrix, torch.cat([linear.dequantized(torch.float32) for linear in group[:number]]))
        assert matrix.data_ptr() == kept(group[0]).data_ptr(), "this is a copy"
    assert torch.equal(decoded_together(weights[2:], torch.float32)[:32], kept(group[2]))
    assert decoded_together(weights, torch.bfloat16) is None
    assert decoded_together(weights[:1], torch.bfloat16) is None
    assert decoded_together(weights[::-1], torch.float32) is None, "another order"
    assert decoded_together(weights[::2], torch.float32) is None, "a gap"
    copies = [linear.base_weight() for linear in deepcopy(group)]
    assert decoded_together(copies, torch.float32) is not None
    group[1].keep_decoded(torch.float32)
    assert decoded_together([linear.base_weight() for linear in group], torch.float32) is None, "two storages"
    group[0].drop_decoded()
    assert decoded_together([linear.base_weight() for linear in group], torch.float32) is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_kept_copies_change_no_bit_of_a_group(dropout) -> None:
    group = [layer(out, lora=True, bias=True, dropout=dropout) for out in (OUT, 32, 32)]
    gate_up, down = [layer(lora=True) for _ in "gu"], layer(IN, OUT, lora=True)
    x = torch.randn(9, IN, requires_grad=True)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        projected = project_together(x, group)
        y = gated_mlp(x, gate_up, down, activation="silu")
        module = torch.nn.ModuleList([*group, *gate_up, down])
        gradients = torch.autograd.grad(
            (projected * torch.linspace(-1, 1, projected.shape[1])).sum() + (y * torch.linspace(-1, 2, IN)).sum(),
            [x, *module.parameters()],
        )
        results.append([projected, y, *gradients])
        keep_decoded_together(group, x.dtype)
        keep_decoded_together(gate_up, x.dtype)
        down.keep_decoded(x.dtype)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dense weight \(torch.float32\) is decoded already"):
        Linear(IN, OUT, dtype=torch.float32).keep_decoded(torch.float32)
    with pytest.raises(ValueError, match="must have equal in_features"):
        keep_decoded_together([layer(), layer(inner=2 * IN)], torch.float32)
    with pytest.raises(ValueError, match="NF4 expands to"):
        layer().keep_decoded(torch.int32)
    weight = layer().base_weight()
    for wrong in (torch.zeros(IN, OUT), torch.zeros(OUT, IN, dtype=torch.int8), torch.zeros(IN, OUT).t()):
        with pytest.raises(
            ValueError, match=r"NF4 decoded must be a contiguous floating-point tensor of shape \(96, 64\)"
        ):
            replace(weight, decoded=wrong)


def results_by_codes_and_by_copies(rows: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """The output of a group on a GPU and all its gradients, twice: without decoded copies, and with them."""
    sizes = (4096, 1024, 1024)
    group = [layer(out, 4096, lora=True).to("cuda") for out in sizes]
    x = torch.randn(rows, 4096, dtype=dtype, device="cuda", requires_grad=True)
    results = []
    for _ in range(2):
        y = project_together(x, group)
        parameters = torch.nn.ModuleList(group).parameters()
        results.append([y, *torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))])
        keep_decoded_together(group, dtype)
        assert decoded_together([linear.base_weight() for linear in group], dtype).shape == (sum(sizes), 4096)
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_copies_change_no_bit_on_a_gpu(dtype) -> None:
    """With so many rows that weights are decoded first, copies or not."""
    by_codes, by_copies = results_by_codes_and_by_copies(8192, dtype)
    assert all(torch.equal(a, b) for a, b in zip(by_codes, by_copies, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [64, 512, 1024])
def test_kept_copies_agree_with_weights_decoded_in_the_product(rows, dtype) -> None:
    """With fewer rows the copies are multiplied by another kernel, which adds the same products up in another order."""
    for a, b in zip(*results_by_codes_and_by_copies(rows, dtype), strict=True):
        assert (a - b).float().norm() <= torch.finfo(dtype).eps * b.float().norm()
