"""Stacked NF4 experts: the bits of each alone, and their expansion."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from slothcore.kernels import nf4, nf4_eager, nf4_experts, nf4_experts_eager
from slothcore.kernels.nf4_experts import Nf4Experts

OPS = pytest.mark.parametrize("ops", [nf4_experts, nf4_experts_eager], ids=["kernel", "eager"])
# Whole blocks; more blocks than one program takes, in two nested blocks; a partial last block; an odd number of values.
SHAPES = [(3, 8, 64), (2, 150, 128), (3, 10, 15), (2, 7, 11)]


def quantized(shape: tuple[int, int, int], *, double_quant: bool = True, dtype=torch.float32) -> Nf4Experts:
    scales = torch.linspace(0.1, 10.0, shape[0])[:, None, None]
    weights = (torch.randn(shape) * scales).to(dtype)
    return Nf4Experts.stack([nf4_eager.nf4_quantize(w, double_quant=double_quant) for w in weights])


@pytest.mark.parametrize("double_quant", [True, False])
def test_each_expert_has_the_bits_of_bitsandbytes(double_quant) -> None:
    weights = torch.randn(3, 40, 128)
    experts = Nf4Experts.stack([nf4_eager.nf4_quantize(w, double_quant=double_quant) for w in weights])
    for index, weight in enumerate(weights):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant)
        ours = experts.expert(index)
        assert torch.equal(ours.packed, packed.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        if double_quant:
            assert torch.equal(ours.nested_absmax, state.state2.absmax)
            assert torch.equal(ours.nested_offset, state.offset)
        expected = bnb.dequantize_4bit(packed, state)
        assert torch.equal(nf4_experts_eager.nf4_experts_dequantize(experts, dtype=torch.float32)[index], expected)


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_expansion_is_that_of_each_expert(nan_filled_empty, ops, shape, double_quant, dtype) -> None:
    device = "cuda" if torch.cuda.is_available() and ops is nf4_experts else "cpu"
    experts = moved(quantized(shape, double_quant=double_quant), device)
    dense = ops.nf4_experts_dequantize(experts, dtype=dtype)
    for index in range(shape[0]):
        assert torch.equal(dense[index], nf4_eager.nf4_dequantize(experts.expert(index), dtype=dtype))
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    assert ops.nf4_experts_dequantize(experts, dtype=dtype, out=out) is out
    assert torch.equal(out, dense)


@OPS
def test_each_expert_has_its_own_8_bit_map(ops) -> None:
    """Published files hold one with every weight, and nothing makes them equal."""
    device = "cuda" if torch.cuda.is_available() and ops is nf4_experts else "cpu"
    first, second = (nf4_eager.nf4_quantize(weight) for weight in torch.randn(2, 150, 128))
    second = replace(second, nested_code=second.nested_code * 0.5)
    experts = moved(Nf4Experts.stack([first, second]), device)
    dense = ops.nf4_experts_dequantize(experts, dtype=torch.float32).cpu()
    for index, weight in enumerate((first, second)):
        assert torch.equal(dense[index], nf4_eager.nf4_dequantize(weight, dtype=torch.float32))


def moved(experts: Nf4Experts, device: str) -> Nf4Experts:
    return replace(experts, **{name: p.to(device) for name, p in vars(experts).items() if isinstance(p, torch.Tensor)})


def test_parts_of_an_expert_are_views() -> None:
    experts = quantized((3, 8, 64))
    one = experts.expert(1)
    assert one.packed.data_ptr() == experts.packed[1].data_ptr()
    assert one.absmax.data_ptr() == experts.absmax[1].data_ptr()
    assert (
        experts.nbytes
        == sum(p.nbytes for p in (experts.packed, experts.absmax, experts.nested_absmax, experts.nested_offset))
        + experts.nested_code.nbytes
    )


def test_bad_input_is_refused() -> None:
    one, other = nf4_eager.nf4_quantize(torch.ones(8, 64)), nf4_eager.nf4_quantize(torch.ones(8, 128))
    flat = nf4_eager.nf4_quantize(torch.ones(8, 64), double_quant=False)
    with pytest.raises(ValueError, match="at least one expert"):
        Nf4Experts.stack([])
    with pytest.raises(ValueError, match=r"agree in shape and double.*\(8, 64\).*expert 1 has.*\(8, 128\)"):
        Nf4Experts.stack([one, other])
    with pytest.raises(ValueError, match="agree in shape and double quantisation"):
        Nf4Experts.stack([one, flat])
    experts = Nf4Experts.stack([one, one])
    with pytest.raises(ValueError, match=r"NF4 packed of experts.*\(2, 256\)"):
        replace(experts, packed=experts.packed[:, :-1])
    with pytest.raises(ValueError, match="together"):
        replace(experts, nested_offset=None)
    for ops in (nf4_experts, nf4_experts_eager):
        with pytest.raises(ValueError, match="int64"):
            ops.nf4_experts_dequantize(experts, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"out must be contiguous.*\(2, 8, 64\)"):
            ops.nf4_experts_dequantize(experts, dtype=torch.float32, out=torch.empty(2, 8, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_expansion_is_that_of_each_expert(nan_filled_empty, dtype) -> None:
    """Experts of Qwen3-30B-A3B's width."""
    weights = torch.randn(16, 768, 2048, device="cuda", dtype=dtype)
    experts = Nf4Experts.stack([nf4.nf4_quantize(w) for w in weights])
    dense = nf4_experts.nf4_experts_dequantize(experts, dtype=dtype)
    for index in range(16):
        assert torch.equal(dense[index], nf4.nf4_dequantize(experts.expert(index), dtype=dtype))
