"""The floor of a step: what it counts, and that its attentions do the same."""

import statistics

import pytest
import torch
from torch import Tensor

from benchmarks import floor, shapes
from tests.numerics import relative_error

LENGTHS = pytest.mark.parametrize("lengths", [[6, 6, 6], [1, 9, 4]])


@LENGTHS
def test_the_attentions_of_the_floor_agree(lengths: list[int]) -> None:
    (_, leaves, ours), *others = floor.attentions(shapes.TINY, lengths, torch.float32, "cpu")
    assert len(others) == (len(set(lengths)) == 1), "a batch can only have rows of one length"
    hidden = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)) == 0
    q, k, v = (part.repeat_interleave(n, 1) for part, n in zip(leaves[0].split([4, 2, 2], 1), (1, 2, 2), strict=True))
    scores = torch.einsum("qhd,khd->hqk", q, k) * shapes.TINY["head_dim"] ** -0.5
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(packed(ours(*leaves)), expected)
    for _, leaves, attend in others:
        torch.testing.assert_close(packed(attend(*leaves)), expected)


@pytest.mark.gpu
@LENGTHS
def test_every_attention_of_the_floor_runs_on_a_gpu(lengths: list[int]) -> None:
    config, long = shapes.LLAMA_3_1_8B | {"num_attention_heads": 4, "num_key_value_heads": 2}, [64 * n for n in lengths]
    found = {name: (leaves, attend) for name, leaves, attend in floor.attentions(config, long, torch.bfloat16, "cuda")}
    expected = {"slothcore", "varlen_attn"} | {
        f"SDPA {backend}_attention" for backend in ("flash", "cudnn") if len(set(lengths)) == 1
    }
    assert found.keys() == expected
    ours = packed(found["slothcore"][1](*found["slothcore"][0])).float()
    for name, (leaves, attend) in found.items():
        out = attend(*leaves)
        assert relative_error(packed(out), ours) < 0.01, name
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    measured = floor.measure(shapes.TINY | {"head_dim": 64}, long, dtype=torch.bfloat16, device="cuda")
    assert measured.step_ms(recompute=True) > measured.step_ms(recompute=False) > 0


def packed(out: Tensor) -> Tensor:
    """[T, 4 heads, D] from [documents, heads, length, D] or [T, heads * D]."""
    if out.dim() == 4:
        return out.transpose(1, 2).flatten(0, 1)
    return out.unflatten(-1, (4, -1)) if out.dim() == 2 else out


def test_the_floor_counts_what_a_step_cannot_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 ms a call: 4 products a layer each way, but no input gradient of the first; 2 in the head."""
    monkeypatch.setattr(floor, "milliseconds", lambda function, device: 1.0)
    monkeypatch.setattr(floor, "HEAD_ROWS", 7)
    config = shapes.TINY | {"num_hidden_layers": 5}
    found = floor.measure(config, [8, 8], dtype=torch.float32, device="cpu")
    assert (found.products_forward, found.products_backward) == (20.0, 19.0)
    assert (found.attention_forward, found.attention_backward) == (5.0, 5.0)
    assert found.head == pytest.approx(2 * 14 / 7), "14 targets, in slices of 7"
    assert found.step_ms(recompute=False) == pytest.approx(53.0)
    assert found.step_ms(recompute=True) == pytest.approx(78.0)


def test_the_products_of_the_floor_have_the_models_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(floor, "linear_ms", lambda *args: asked.append(args[:3]) or (1.0, 1.0))
    monkeypatch.setattr(floor, "attention_ms", lambda *args: (1.0, 1.0, ""))
    floor.measure(shapes.LLAMA_3_1_8B, [2048] * 4, dtype=torch.bfloat16, device="cpu")
    sizes = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
    assert asked == [*((8192, *size) for size in sizes), (8188, 4096, 128256)]


def test_the_floor_is_that_of_the_typical_step() -> None:
    assert floor.typical_lengths("2x8", 3, 7) == [8, 8]
    timed = [sum(shapes.AlpacaCase().lengths(step)) for step in range(3, 10)]
    assert sum(floor.typical_lengths("alpaca", 3, 7)) == statistics.median(timed)
