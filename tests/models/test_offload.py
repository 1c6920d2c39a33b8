"""Offloaded activations in whole models: every gradient equal to the last bit, with less memory on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slothcore
from benchmarks.shapes import LLAMA_3_1_8B, TINY
from benchmarks.zoo_shapes import ZOO, tiny
from slothcore.layers.host_memory import CudaTransfer
from slothcore.layers.offload import ActivationOffload
from slothcore.models.decoder import Decoder
from tests.layers.late_transfer import LateTransfer

LAYERS, TOKENS = 4, 48
MIXTRAL: dict[str, Any] = TINY | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}
del MIXTRAL["rope_scaling"], MIXTRAL["attention_bias"], MIXTRAL["mlp_bias"]
FAMILIES = {
    "llama": TINY,
    "gemma2": tiny(ZOO["Gemma-2-9B"]),
    "mixtral": MIXTRAL,
    "qwen3_moe": tiny(ZOO["Qwen3-30B-A3B"]),
    "phi3": tiny(ZOO["Phi-3.5-mini"]),
}


def make_model(config: dict[str, Any], way: str, **options: Any) -> Decoder:
    """A model that trains, "full" or with an adapter: over NF4 weights, with dropout, or keeping no gate and up."""
    model = slothcore.from_config(config, **{"device": "cpu", "bits": 4 if way == "nf4" else 32} | options)
    if way != "full":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if way == "dora" and model.config.moe else "all-linear"
        options = {"lora_dropout": 0.1 if way == "dropout" else 0.0, "use_dora": way == "dora"}
        slothcore.add_lora(model, r=8, lora_alpha=16, target_modules=targets, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1)
    model.gradient_checkpointing = "mlp" if way == "mlp" else False
    return model.train()


@contextmanager
def offloaded(model: nn.Module, offload: ActivationOffload) -> Iterator[None]:
    """Run every layer of the model inside `offload.layer`."""
    layers = list(model.model.layers)

    def surround(index: int, forward: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            with offload.layer(index):
                return forward(*args, **options)

        return run

    for index, layer in enumerate(layers):
        layer.forward = surround(index, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def gradients(model: Decoder, tokens: int = TOKENS, passes: int = 1) -> dict[str, Tensor]:
    """Of a step whose loss is the sum over passes; the first document is short."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    for seed in range(passes):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, model.config.vocab_size, (tokens + 8 * seed,), generator=generator)
        boundaries = torch.tensor([0, 7, len(ids)], dtype=torch.int32)
        model(ids, labels=ids, cu_seqlens=boundaries).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 0
    unlike = [name for name, gradient in expected.items() if not torch.equal(actual[name], gradient)]
    assert not unlike, f"{len(unlike)} gradients differ, the first of {unlike[0]}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["lora", "nf4", "dropout", "dora", "mlp", "full"])
def test_gradients_are_equal_to_the_last_bit(family: str, way: str) -> None:
    model = make_model(FAMILIES[family] | {"num_hidden_layers": LAYERS}, way)
    expected = gradients(model, passes=3)
    transfer = LateTransfer()
    offload = ActivationOffload(min_bytes=256, keep_last=1, transfer=transfer)
    with offloaded(model, offload):
        for step in range(2):
            assert_equal_bits(gradients(model, passes=3), expected)
            sent, fetched = len(transfer.out), len(transfer.into)
            assert sent > 10 * LAYERS * (step + 1)
            assert fetched > 2 * LAYERS * (step + 1)
            assert fetched <= sent
    assert transfer.faults == []
    assert transfer.held() == 0
    assert transfer.slabs == 1
    weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert weights.isdisjoint(transfer.sources), "a weight was sent to the host"


def test_the_device_holds_about_one_layer_of_what_is_saved() -> None:
    layers = 10
    model = make_model(TINY | {"num_hidden_layers": layers}, "lora")
    transfer = LateTransfer()
    with offloaded(model, ActivationOffload(min_bytes=256, keep_last=0, transfer=transfer)):
        gradients(model)
    assert 0 < transfer.peak < 1.5 * sum(transfer.out) / layers


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["lora", "nf4", "mlp", "full"])
def test_a_gpu_gives_the_same_bits_with_less_memory_and_pins_no_more(way: str) -> None:
    class Counting(CudaTransfer):
        slabs = 0

        def host_memory(self, nbytes: int) -> Tensor:
            self.slabs += 1
            return super().host_memory(nbytes)

    layers, tokens = 8, 8192
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "head_dim": 128}
    config = LLAMA_3_1_8B | sizes | {"vocab_size": 4096, "num_hidden_layers": layers, "num_key_value_heads": 4}
    model = make_model(config, way, device="cuda", dtype=torch.bfloat16, bits=4 if way == "nf4" else 16)

    def step() -> tuple[dict[str, Tensor], int]:
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = gradients(model, tokens)
        torch.cuda.synchronize()
        in_layers = {name: gradient for name, gradient in found.items() if ".layers." in name}
        return in_layers, torch.cuda.max_memory_allocated() - before

    first, _ = step()
    expected, plain = step()
    assert_equal_bits(first, expected)
    transfer = Counting()
    offload = ActivationOffload(transfer=transfer)
    with offloaded(model, offload):
        for number in range(4):
            found, peak = step()
            assert_equal_bits(found, expected)
            if number == 0:
                slabs = transfer.slabs
    assert transfer.slabs == slabs > 0, "a later step pinned more memory"
    saved = offload.host_bytes / 2  # at least half of what is pinned was in use
    assert plain - peak > 0.5 * saved, f"{plain / 2**20:.0f} MiB became {peak / 2**20:.0f}"
