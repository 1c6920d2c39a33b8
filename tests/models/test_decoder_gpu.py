"""The whole decoder on a GPU against itself on the CPU: the same files, other kernels."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slothcore.layers.linear import Linear
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config, load_model
from tests.models.test_generation import PROMPTS, left_padded
from tests.models.test_packing import packed_batch
from tests.models.tiny import LLAMA3_ROPE, saved, tiny_llama
from tests.numerics import relative_error

pytestmark = pytest.mark.gpu

# Widths that are multiples of 64, so that the NF4 kernels take part; two key heads; a window of RoPE scaling.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": LLAMA3_ROPE,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_llama(**SIZES), tmp_path)


def both(folder: Path, bits: int, dtype: torch.dtype | None = None) -> tuple[Decoder, Decoder]:
    """A model on the GPU, and the same moved to the CPU.

    Moved, not loaded there: double quantisation takes a mean, whose last bit depends on the device's order of summing.
    """
    gpu, cpu = (load_model(folder, bits=bits, dtype=dtype, device="cuda") for _ in range(2))
    return gpu, cpu.cpu()


def loss_and_gradients(model: Decoder, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    ids, labels, cu_seqlens = (value.to(device) for value in packed_batch())
    output = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    output.loss.backward()
    return output.loss.detach(), {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("bits", [32, 4])
def test_float32_equals_the_cpu(folder: Path, bits: int) -> None:
    gpu, cpu = both(folder, bits, torch.float32)
    with torch.no_grad():
        ids, mask = left_padded(PROMPTS)
        expected = cpu(ids, attention_mask=mask).logits
        actual = gpu(ids, attention_mask=mask).logits
    assert actual.is_cuda
    assert (actual.cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("inputs_on", ["cpu", "cuda"])
def test_float32_gradients_equal_the_cpu(folder: Path, inputs_on: str, checkpointing: bool) -> None:
    gpu, cpu = both(folder, 32)
    gpu.gradient_checkpointing = checkpointing
    loss, gradients = loss_and_gradients(gpu, inputs_on)
    expected_loss, expected = loss_and_gradients(cpu)
    assert abs(loss.cpu() - expected_loss) < 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_as_near_to_exact_as_the_cpus(folder: Path, dtype: torch.dtype) -> None:
    gpu, cpu = both(folder, 16, dtype)
    exact_loss, exact = loss_and_gradients(load_model(folder, bits=32, device="cpu"))
    loss, gradients = loss_and_gradients(gpu)
    eager_loss, eager = loss_and_gradients(cpu)
    assert abs(loss.cpu() - exact_loss) <= 2 * abs(eager_loss - exact_loss) + torch.finfo(dtype).eps * exact_loss
    for name, gradient in exact.items():
        assert relative_error(gradients[name], gradient) <= 2 * relative_error(eager[name], gradient) + 1e-3, name


@pytest.mark.parametrize("bits", [32, 4])
def test_generation_equals_the_cpu(folder: Path, bits: int) -> None:
    gpu, cpu = both(folder, bits, torch.float32)
    ids, mask = left_padded(PROMPTS)
    expected = cpu.generate(ids, mask, max_new_tokens=30, repetition_penalty=1.2)
    assert torch.equal(gpu.generate(ids, mask, max_new_tokens=30, repetition_penalty=1.2).cpu(), expected)
    drawn = gpu.generate(ids, mask, max_new_tokens=30, temperature=1.0, top_k=20, top_p=0.9, seed=3)
    assert torch.equal(gpu.generate(ids, mask, max_new_tokens=30, temperature=1.0, top_k=20, top_p=0.9, seed=3), drawn)


def test_a_step_waits_for_nothing() -> None:
    """With inputs on the CPU neither the forward nor the backward pass reads a value back."""
    config = {**SIZES, "model_type": "llama", "vocab_size": 97, "num_hidden_layers": 2}
    model = from_config(config, dtype=torch.bfloat16, device="cuda")
    ids, labels, cu_seqlens = packed_batch()
    model(ids, labels=labels, cu_seqlens=cu_seqlens).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels=labels, cu_seqlens=cu_seqlens).loss.backward()
        batch, mask = left_padded(PROMPTS)
        model(batch, labels=batch, attention_mask=mask).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [32, 4])
def test_weights_are_those_that_a_cpu_loads(folder: Path, bits: int) -> None:
    """To the bit, but for the scales of double quantisation, which may fall to the neighbouring 8-bit code."""
    moved = both(folder, bits, torch.float32)[1]
    loaded = load_model(folder, bits=bits, device="cpu")
    actual = moved.state_dict()
    for name, value in loaded.state_dict().items():
        if not name.rpartition(".")[2].startswith("weight_"):
            assert torch.equal(actual[name], value), name
    for name, layer in loaded.named_modules():
        if isinstance(layer, Linear) and layer.is_nf4:
            dense = moved.get_submodule(name).dequantized(torch.float32)
            assert relative_error(dense, layer.dequantized(torch.float32)) < 1e-3, name
