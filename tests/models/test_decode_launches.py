"""A decode step in its fewest launches gives what the operations apart give; here by the eager twins of both."""

import pytest
import torch
from torch import Tensor

import slothcore
from slothcore.autograd import lora_few
from slothcore.kernels import (
    largest,
    nf4_few,
    paged_attention,
    rms_norm_few,
    rms_norm_few_eager,
    rope_store,
)
from slothcore.layers import norm
from slothcore.models.engine import Engine
from slothcore.models.load import from_config
from slothcore.models.requests import Request
from tests.models.engines import run
from tests.models.llama_on_gpu import llama

# Wide enough for the norm with the inputs of LoRA terms.
CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 1088, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.05,
}  # fmt: skip
LLAMA = CONFIG
QWEN3 = CONFIG | {"model_type": "qwen3"}
PROMPTS = ([5, 9, 70], [8] * 20, [31])


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "no lora"])
def test_fewest_launches_give_the_same(monkeypatch: pytest.MonkeyPatch, config: dict, adapter: bool) -> None:
    torch.manual_seed(0)
    model = from_config(config, bits=4, dtype=torch.float32, device="cpu")
    if adapter:
        slothcore.add_lora(model, r=4, lora_alpha=8, init_lora_weights=False)
    requests = [Request(prompt_ids=prompt, max_new_tokens=6, logprobs=0) for prompt in PROMPTS]
    expected = run(Engine(model, capacity=64), requests)
    norms = []

    def normed(*args, **options) -> tuple[Tensor, ...]:
        norms.append(len(args[0]))
        return norm_input(*args, **options)

    norm_input = rms_norm_few_eager.rms_norm_input
    monkeypatch.setattr(rms_norm_few_eager, "rms_norm_input", normed)
    monkeypatch.setattr(norm, "is_decoding", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(lora_few, "takes", lambda x, projections: len(x) <= 4)
    actual = run(Engine(model, capacity=64), requests)
    assert [[event.token for event in events] for events in actual] == [[e.token for e in own] for own in expected]
    for own, others in zip(actual, expected, strict=True):
        for one, other in zip(own, others, strict=True):
            assert one.logprob == pytest.approx(other.logprob, rel=1e-4)
    # Five steps of two layers with two norms each, four lanes for three rows; the texts are read otherwise.
    assert norms == ([4] * 20 if adapter else [])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_gpu_to_begin_early_changes_no_bit(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Nor does it in any of many steps: a kernel that did not wait would read what the one before is still writing."""
    model = llama().eval()
    prompts = [[17 * row + i for i in range(1, 120 + row)] for row in range(rows)]
    requests = [Request(prompt_ids=prompt, max_new_tokens=150, logprobs=5) for prompt in prompts]

    def events() -> list[list[tuple]]:
        found = run(Engine(model, capacity=512), requests)
        return [[(event.token, event.logprob, event.top_logprobs) for event in own] for own in found]

    early = events()
    assert events() == early
    for module in (nf4_few, rms_norm_few, rope_store, paged_attention, largest):
        monkeypatch.setattr(module, "begins_early", lambda x: False)
    assert events() == early
