"""Routing and its auxiliary loss against transformers', on bare tensors."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from slothcore.layers.moe import SparseMoe, load_balancing_loss, route


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("experts_per_token", [1, 2, 5])
def test_load_balancing_loss(experts_per_token: int) -> None:
    ours = [random_logits(17, 5, seed=layer).requires_grad_() for layer in range(3)]
    theirs = [logits.detach().clone().requires_grad_() for logits in ours]
    actual = load_balancing_loss(ours, experts_per_token=experts_per_token)
    expected = load_balancing_loss_func(tuple(theirs), 5, experts_per_token)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    actual.backward()
    expected.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-9)
    if experts_per_token < 5:
        assert actual > 1.02 * experts_per_token, "random routing is not even"


def test_even_routing_costs_what_the_docstring_says() -> None:
    logits = 9 * torch.eye(4).repeat(3, 1)
    assert load_balancing_loss([logits], experts_per_token=1) == pytest.approx(1.0, abs=1e-6)


def test_load_balancing_loss_counts_in_float32() -> None:
    """A thousand ones, and probabilities summed over a thousand rows, are more than bfloat16 can count."""
    logits = random_logits(1000, 4).bfloat16()
    exact = load_balancing_loss([logits.double()], experts_per_token=2)
    actual = load_balancing_loss([logits], experts_per_token=2)
    assert actual.dtype == torch.float32
    assert abs(actual - exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize_weights", [False, True])
def test_route(dtype: torch.dtype, normalize_weights: bool) -> None:
    logits = random_logits(33, 6).to(dtype)
    expert_ids, weights = route(logits, 2, normalize_weights=normalize_weights)
    probabilities = F.softmax(logits.float(), dim=-1)
    best = probabilities.topk(2)
    expected = best.values / best.values.sum(-1, keepdim=True) if normalize_weights else best.values
    assert torch.equal(expert_ids, best.indices)
    assert expert_ids.dtype == torch.int64
    assert torch.equal(weights, expected.to(dtype))


def test_router_logits_are_given_if_they_are_kept() -> None:
    options = {"num_experts": 4, "experts_per_token": 2, "normalize_weights": True, "activation": "silu"}
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    for keeps in (False, True):
        block = SparseMoe(16, 32, **options, expert_names=("w1", "w3", "w2"), keeps_router_logits=keeps)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        _, logits = block(x)
        if keeps:
            torch.testing.assert_close(logits, x @ block.gate.weight.T)
        else:
            assert logits is None
