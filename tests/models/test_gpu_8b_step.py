"""One LoRA step at the widths of Llama-3.1-8B in bfloat16: no further from float32 than transformers + PEFT are.

Three models with the same weights and the same adapter take the same step: slothcore in the working dtype, transformers
+ PEFT in the working dtype, and transformers + PEFT in float32, which is the answer. The same code runs on a CPU with a
small model, so that the comparison itself is tested wherever the tests run.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import write_checkpoint
from benchmarks.shapes import LLAMA_3_1_8B, LORA_TARGETS, TINY
from slothcore.layers.linear import Linear
from slothcore.lora.adapter_io import adapter_state, load_adapter
from slothcore.models.load import load_model
from tests.lora.reference import peft_parameters
from tests.numerics import relative_error

peft = pytest.importorskip("peft")

ROWS, IGNORED = 2, 50
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """A model, the length of its rows, and where it runs."""

    config: dict[str, Any]
    length: int
    device: str


SIZES = [
    pytest.param(Size(TINY | {"vocab_size": 4096, "hidden_size": 256}, 128, "cpu"), id="small"),
    pytest.param(Size(LLAMA_3_1_8B | {"num_hidden_layers": 2}, 512, "cuda"), id="8b", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class Step:
    """What a step came to: the loss before and after it, and each gradient under PEFT's name."""

    losses: tuple[float, float]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Files:
    """The base and the adapter that all three models load."""

    size: Size
    base: Path
    adapter: Path


@pytest.fixture(scope="module", params=SIZES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    size = request.param
    folder = tmp_path_factory.mktemp("step")
    write_checkpoint(folder / "base", size.config, device=size.device)
    write_adapter(folder, size)
    yield Files(size, folder / "base", folder / "adapter")
    shutil.rmtree(folder)  # pytest would keep the gigabytes of three sessions


def write_adapter(folder: Path, size: Size) -> None:
    """An adapter as PEFT writes it, A and B both random: with B = 0 the gradient of A would be zero."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    options = {"r": 16, "lora_alpha": 16, "target_modules": LORA_TARGETS, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")


def make_batch(size: Size) -> tuple[Tensor, Tensor]:
    """Ids and labels [2, S], on the host; the first row begins with a prompt that is not learned."""
    input_ids = torch.randint(
        0, size.config["vocab_size"], (ROWS, size.length), generator=torch.Generator().manual_seed(2)
    )
    labels = input_ids.clone()
    labels[0, :IGNORED] = -100
    return input_ids, labels


def take_step(model: nn.Module, parameters: dict[str, nn.Parameter], batch: tuple[Tensor, Tensor]) -> Step:
    """Forward, backward and an AdamW update; then the loss again."""
    model.train()
    assert {name.rpartition(".layers.")[2] for name in parameters} == {
        f"{layer}.{part}_proj.lora_{factor}.weight"
        for layer in range(model.config.num_hidden_layers)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        for factor in "AB"
    }
    input_ids, labels = batch
    first = model(input_ids=input_ids, labels=labels).loss
    first.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE).step()
    with torch.no_grad():
        second = model(input_ids=input_ids, labels=labels).loss
    return Step((first.item(), second.item()), gradients)


def slothcore_step(files: Files, dtype: torch.dtype, bits: int) -> Step:
    model = load_model(files.base, bits=bits, dtype=dtype, device=files.size.device)
    load_adapter(model, files.adapter)
    return take_step(model, adapter_state(model), make_batch(files.size))


def reference_step(files: Files, dtype: torch.dtype, weights: dict[str, Tensor]) -> Step:
    """transformers + PEFT in `dtype`, with `weights` in place of those of the file."""
    device = files.size.device
    base = AutoModelForCausalLM.from_pretrained(files.base, dtype=dtype).to(device)
    for name, weight in weights.items():
        base.get_parameter(name).data.copy_(weight)
    model = peft.PeftModel.from_pretrained(base, files.adapter, is_trainable=True)
    model.config.use_cache = False
    input_ids, labels = make_batch(files.size)
    return take_step(model, peft_parameters(model), (input_ids.to(device), labels.to(device)))


def decoded_weights(files: Files, bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base weights that slothcore's NF4 stands for, on the host, as bitsandbytes decodes them; none without NF4."""
    if bits != 4:
        return {}
    functional = pytest.importorskip("bitsandbytes").functional
    dense = load_model(files.base, bits=16, dtype=torch.bfloat16, device=files.size.device)
    weights = {}
    for path, layer in dense.named_modules():
        if isinstance(layer, Linear) and path != "lm_head":
            # As one row: bitsandbytes' CPU decoder restarts its blocks at each row of a matrix.
            packed, state = functional.quantize_4bit(
                layer.weight.data.reshape(1, -1), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            decoded = functional.dequantize_4bit(packed, state).view_as(layer.weight)
            weights[f"{path}.weight"] = decoded.to(dtype).cpu()
    return weights


@pytest.mark.parametrize("bits", [16, 4])
def test_a_bfloat16_step_is_as_near_to_float32_as_transformers(files: Files, bits: int) -> None:
    dtype = torch.bfloat16
    weights = decoded_weights(files, bits, dtype)
    exact = reference_step(files, torch.float32, weights)
    theirs = reference_step(files, dtype, weights)
    ours = slothcore_step(files, dtype, bits)

    rounding = torch.finfo(dtype).eps
    # The loss is a mean: the roundings of N independent targets come to a sqrt(N)-th of one.
    targets = ROWS * (files.size.length - 1) - (IGNORED - 1)
    for when, mine, reference, expected in zip(
        ("before", "after"), ours.losses, theirs.losses, exact.losses, strict=True
    ):
        budget = 2 * abs(reference - expected) + rounding * expected / targets**0.5
        assert abs(mine - expected) <= budget, f"loss {when} the step: {mine}, exact {expected}, theirs {reference}"
    assert abs(exact.losses[1] - exact.losses[0]) > 10 * rounding * exact.losses[0] / targets**0.5, (
        "the step did nothing"
    )
    assert ours.gradients.keys() == exact.gradients.keys()
    for name, gradient in exact.gradients.items():
        assert gradient.norm() > 0, f"{name} gets no gradient"
        error = relative_error(ours.gradients[name], gradient)
        budget = 2 * relative_error(theirs.gradients[name], gradient) + rounding / 2
        assert error <= budget, f"{name}: relative error {error:.2e} exceeds {budget:.2e}"
