"""The floor of a step: what it counts, and that its attentions do the same."""

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
    assert measured.step_ms("yes") > measured.step_ms("mlp") > measured.step_ms("no") > 0
    assert measured.host > 0


def packed(out: Tensor) -> Tensor:
    """[T, 4 heads, D] from [documents, heads, length, D] or [T, heads * D]."""
    if out.dim() == 4:
        return out.transpose(1, 2).flatten(0, 1)
    return out.unflatten(-1, (4, -1)) if out.dim() == 2 else out


def test_the_floor_counts_what_a_step_cannot_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 ms a launch: 4 products a layer each way, none for the first layer's input; 2 a slice of the head."""
    monkeypatch.setattr(floor, "time_parts", lambda launches, device: ([1.0] * len(launches), 0.5))
    monkeypatch.setattr(floor, "HEAD_ROWS", 6)
    config = shapes.TINY | {"num_hidden_layers": 5}
    found = floor.measure(config, [8, 8], dtype=torch.float32, device="cpu")
    assert (found.products_forward, found.products_backward, found.gate_up) == (20.0, 19.0, 5.0)
    assert (found.attention_forward, found.attention_backward) == (5.0, 5.0)
    assert found.head == 2 * 3, "14 targets, in slices of 6, 6 and 2"
    assert found.host == 0.5
    assert [found.step_ms(way) for way in ("no", "mlp", "offload", "yes")] == [55.0, 60.0, 60.0, 80.0]
    assert found.times(2.0).step_ms("yes") == 160.0


def test_the_bare_step_has_the_models_shapes_in_the_steps_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def products(rows: int, in_features: int, out_features: int, *where: object) -> tuple[str, str]:
        name = f"{rows}x{in_features}x{out_features}"
        return f"{name} forward", f"{name} backward"

    monkeypatch.setattr(floor, "products", products)
    config = shapes.LLAMA_3_1_8B | {"num_hidden_layers": 2}
    found = list(floor.bare_step(config, [2048] * 4, "attend", "attend back", torch.bfloat16, "cpu"))
    qkv, o, gate_up, down = (f"8192x{size}" for size in ("4096x6144", "4096x4096", "4096x28672", "14336x4096"))
    layer = [f"{qkv} forward", "attend", f"{o} forward", f"{gate_up} forward", f"{down} forward"]
    back = [f"{down} backward", f"{gate_up} backward", f"{o} backward", "attend back", f"{qkv} backward"]
    head = [f"{rows}x4096x128256 {way}" for rows in (2048, 2048, 2048, 2044) for way in ("forward", "backward")]
    assert [launch for _, launch in found] == [*layer, *layer, *head, *back, *back[:-1]]
    assert {kind for kind, launch in found if launch == f"{gate_up} forward"} == {"gate_up"}


def test_the_products_of_the_floor_are_products() -> None:
    torch.manual_seed(0)
    forward, backward = floor.products(5, 7, 3, torch.float32, "cpu")
    (x, weight_t), (dy, weight) = forward.args, backward.args
    assert (x.shape, weight.shape, dy.shape) == ((5, 7), (3, 7), (5, 3))
    torch.testing.assert_close(forward(), x @ weight_t)
    torch.testing.assert_close(backward(), dy @ weight)
    assert all(operand.std() > 0.5 for operand in (x, dy, weight)), "zeros would be multiplied faster"


def test_parts_share_the_time_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The marks inside a step make it 4 ms; without them it is 2."""

    def back_to_back(launches: list, marked: list[bool], device: str, seconds: float) -> tuple[list[float], float]:
        return ([1.0, 3.0] if all(marked) else [2.0]), 0.1

    monkeypatch.setattr(floor, "back_to_back", back_to_back)
    assert floor.time_parts([lambda: None] * 2, "cpu") == ([0.5, 1.5], 0.1)


def test_steps_follow_one_another_and_each_is_timed() -> None:
    calls: list[str] = []
    launches = [lambda: calls.append("a"), lambda: calls.append("b"), lambda: calls.append("c")]
    times, host = floor.back_to_back(launches, [False, True, True], "cpu", 0.0)
    assert calls == ["a", "b", "c"] * floor.FEWEST_STEPS
    assert len(times) == 2
    assert min(times) > 0
    assert host == 0.0


def test_the_floor_is_that_of_the_typical_step() -> None:
    assert floor.typical_lengths("2x8") == [8, 8]
    case = shapes.AlpacaCase()
    drawn = sorted(sum(case.lengths(step)) for step in range(case.batches))
    assert sum(floor.typical_lengths("alpaca")) == drawn[1]


def test_long_steps_are_measured_in_part() -> None:
    assert floor.shortened([1024] * 64) == [1024] * 16
    assert floor.shortened([32768]) == [32768]
    assert floor.shortened([9000, 9000, 10]) == [9000, 9000, 10]
