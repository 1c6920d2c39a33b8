"""CUDA graphs at the widths of Llama-3.1-8B: the bits of the same padded pass run by Python, and what may go wrong."""

import gc
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slothcore
from slothcore.lora.adapter_io import adapter_state
from slothcore.models.decoder import Decoder
from tests.models.graph_models import loss_of, step, trained
from tests.models.llama_on_gpu import PASSES, TWO_LAYERS, llama, tokens, without_replays
from tests.numerics import relative_error

pytestmark = pytest.mark.gpu

SMALL_EXPERTS = {
    "model_type": "mixtral",
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    """The memory of one test's models is not the next one's burden."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("checkpointing", [False, True, "mlp"])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_replay_has_the_bits_of_the_padded_pass(bits: int, checkpointing: Any) -> None:
    model = llama(bits)
    model.gradient_checkpointing = checkpointing
    plain = [step(model, tokens(lengths)) for lengths in PASSES]
    without_replays(model)
    padded = [step(model, tokens(lengths)) for lengths in PASSES]
    model.enable_graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            for lengths, expected in zip(PASSES, padded, strict=True):
                actual = step(model, tokens(lengths))
                assert all(map(torch.equal, actual, expected))
    graphs = model.graphs
    # The bucket of 896 tokens displaces that of 384, which is captured anew.
    assert (graphs.padded, graphs.replays, graphs.captures, graphs.eager) == (3, 9, 4, 0)
    for reference, results in zip(plain, padded, strict=True):
        assert all(relative_error(mine, other) < 3e-2 for mine, other in zip(results, reference, strict=True))


def test_experts_are_captured_too() -> None:
    model = llama(16, SMALL_EXPERTS)
    without_replays(model)
    expected = step(model, tokens(PASSES[0]))
    model.enable_graphs()
    for _ in range(4):
        assert all(map(torch.equal, step(model, tokens(PASSES[0])), expected))
    assert model.graphs.replays == 3


def run_steps(model: Decoder) -> list[torch.Tensor]:
    """Losses and factors of five optimizer steps of two micro-batches each."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, fused=True)
    losses = []
    for number in range(5):
        for part in range(2):
            loss = loss_of(model, tokens(PASSES[(number + part) % 3], seed=number), num_items=300)
            loss.backward()
            losses.append(loss.detach().clone())
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(parameter.detach().clone() for parameter in trained(model))]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_steps_over_several_buckets_are_those_without_replays(bits: int, use_dora: bool) -> None:
    results = []
    for enable in (without_replays, Decoder.enable_graphs):
        model = llama(bits, use_dora=use_dora)
        enable(model)
        results.append(run_steps(model))
        assert model.graphs.replays == (0 if enable is without_replays else 7)
        del model
    assert all(map(torch.equal, *results))


def test_scaled_gradients_pass_through() -> None:
    model = llama(4, dtype=torch.float16)
    without_replays(model)
    expected = step(model, tokens(PASSES[0]))[1:]
    model.enable_graphs()
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    for scale, kept in ((2.0**10, 1.0), (2.0**10, 1.0), (2.0**40, 0.5), (2.0**10, 1.0)):
        scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, tokens(PASSES[0]))).backward()
        scaler.unscale_(optimizer)
        if kept == 1.0:
            errors = [relative_error(p.grad, e) for p, e in zip(trained(model), expected, strict=True)]
            assert max(errors) < 0.1, "unscaled gradients lose what is below 6e-8"
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale * kept
    assert model.graphs.replays == 3


def test_a_loss_of_an_earlier_plain_pass_may_be_kept() -> None:
    """Its autograd graph holds the parameters' own gradient nodes, made on the default stream."""
    model = llama()
    kept = [loss_of(model, tokens(PASSES[0]))]
    kept[0].backward()
    kept.append(loss_of(model, tokens(PASSES[1])))
    model.enable_graphs(max_tokens=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = step(model, tokens(PASSES[0]))
        kept.append(loss_of(model, tokens([1200])))
        for _ in range(2):
            assert all(map(torch.equal, step(model, tokens(PASSES[0])), first))
    assert (model.graphs.captures, model.graphs.replays, model.graphs.eager) == (1, 2, 1)
    kept[1].backward()
    assert torch.rand(4, device="cuda").isfinite().all()


def test_another_thread_may_pin_memory_meanwhile() -> None:
    model, data = llama(), tokens(PASSES[0])
    model.enable_graphs()
    done = threading.Event()

    def prepare() -> None:
        size = 1
        while not done.is_set():
            torch.empty(size * 2**16, pin_memory=True)
            size = size % 64 + 1

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for lengths in PASSES:
                step(model, tokens(lengths))
                step(model, tokens(lengths))
            step(model, data)
    finally:
        done.set()
        thread.join()
    assert model.graphs.captures >= 3


def test_an_adapter_is_saved_and_loaded_between_replays(tmp_path: Path) -> None:
    model, data = llama(), tokens(PASSES[0])
    model.enable_graphs()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    for _ in range(3):
        step(model, data)
        optimizer.step()
    slothcore.save_adapter(model, tmp_path)
    assert model.graphs.replays == 2
    torch.manual_seed(0)
    other = slothcore.from_config(TWO_LAYERS, bits=4, dtype=torch.bfloat16, device="cuda")
    slothcore.load_adapter(other, tmp_path)
    stored = adapter_state(other)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapter_state(model).items())
    step(model, data)
    assert model.graphs.replays == 3
