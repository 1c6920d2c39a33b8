"""Attention kernels against their eager twins, and the twins against the definition."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slothcore.kernels import attention, attention_backward, attention_backward_eager, attention_eager
from slothcore.kernels.attention import Tile
from tests.numerics import assert_as_accurate_as_eager

FUSED = (attention.attention_forward, attention_backward.attention_backward)
EAGER = (attention_eager.attention_forward, attention_backward_eager.attention_backward)


class Problem(NamedTuple):
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """qkv and the gradient of the output."""
        tokens, heads = sum(self.lengths), self.num_heads + 2 * self.num_kv_heads
        qkv = torch.randn(tokens, heads, self.head_dim, device=device)
        dout = torch.randn(tokens, self.num_heads, self.head_dim, device=device)
        return qkv.to(dtype), dout.to(dtype)

    def run(self, functions, qkv: Tensor, dout: Tensor) -> dict[str, Tensor]:
        forward, backward = functions
        bounds = torch.tensor([0, *self.lengths]).cumsum(0).to(qkv.device, torch.int32)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        options = {"scale": self.head_dim**-0.5, **self.options}
        out, lse = forward(q, k, v, bounds, max(self.lengths), **options)
        dqkv = backward(dout, q, k, v, out, lse, bounds, max(self.lengths), **options)
        dq, dk, dv = dqkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    def check(self, device: str, dtype: torch.dtype) -> None:
        qkv, dout = self.inputs(device, dtype)
        fused, eager = self.run(FUSED, qkv, dout), self.run(EAGER, qkv, dout)
        exact = self.run(EAGER, qkv.double(), dout.double())
        for name, result in fused.items():
            assert_as_accurate_as_eager(result, eager[name], exact[name], what=name)


SMALL_PROBLEMS = {
    "grouped, equal lengths": Problem((33, 33), 4, 2, 16),
    "unequal lengths, some empty": Problem((0, 40, 1, 0, 7, 2, 1, 1, 1, 3, 0), 2, 1, 16),
    "one head for all, odd width": Problem((50, 3), 3, 1, 24),
    "window": Problem((70, 5), 2, 1, 16, {"window": 20}),
    "window of two keys": Problem((18,), 1, 1, 16, {"window": 2}),
    "window as long as a block": Problem((49,), 1, 1, 16, {"window": 32}),
    "soft cap": Problem((35, 2), 2, 1, 16, {"softcap": 1.0}),
    "window and soft cap": Problem((60, 30), 2, 2, 40, {"window": 17, "softcap": 3.0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", SMALL_PROBLEMS.values(), ids=SMALL_PROBLEMS.keys())
def test_fused_matches_eager(problem: Problem, dtype: torch.dtype, kernel_device: str, nan_filled_empty) -> None:
    problem.check(kernel_device, dtype)


@pytest.mark.parametrize("window", [None, 5, 21, 40])
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16)], ids=str)
def test_every_ratio_of_blocks(
    blocks: tuple[int, int], window: int | None, kernel_device: str, nan_filled_empty, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = Tile(*blocks, num_warps=4, num_stages=1)
    monkeypatch.setattr(attention, "forward_tile", lambda *_: tile)
    monkeypatch.setattr(attention_backward, "query_gradient_tile", lambda *_: tile)
    monkeypatch.setattr(attention_backward, "key_gradient_tile", lambda *_: tile)
    Problem((83, 19), 2, 1, 16, {"window": window}).check(kernel_device, torch.float32)


def test_strided_inputs(kernel_device: str, nan_filled_empty) -> None:
    """Heads need not lie side by side, and the gradient may be expanded from one number."""
    problem = Problem((21, 12), 2, 1, 16)
    qkv, _ = problem.inputs(kernel_device, torch.float32)
    spread = torch.full((33, 5, 48), float("nan"), device=kernel_device)[:, :4, :16]
    spread.copy_(qkv)
    dout = torch.full((1, 1, 1), 0.5, device=kernel_device).expand(33, 2, 16)
    expected = problem.run(FUSED, qkv, dout.contiguous())
    for name, result in problem.run(FUSED, spread, dout).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("functions", [FUSED, EAGER], ids=["fused", "eager"])
def test_documents_are_apart(functions, kernel_device: str) -> None:
    """Even a document of NaNs leaves its neighbours' outputs and gradients alone, to the last bit."""
    problem = Problem((19, 23, 5), 2, 1, 16, {"window": 9})
    qkv, dout = problem.inputs(kernel_device, torch.float32)
    before = problem.run(functions, qkv, dout)
    qkv[19:42], dout[19:42] = float("nan"), float("nan")
    after = problem.run(functions, qkv, dout)
    others = [*range(19), *range(42, 47)]
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(after[name][others], before[name][others]), name
        assert after[name][19:42].isnan().any(), name
    assert torch.equal(after["lse"][:, others], before["lse"][:, others])


def test_longer_bound_on_the_length_changes_nothing(kernel_device: str) -> None:
    problem = Problem((19, 23), 1, 1, 16)
    qkv, _ = problem.inputs(kernel_device, torch.float32)
    bounds = torch.tensor([0, 19, 42], device=kernel_device, dtype=torch.int32)
    q, k, v = qkv.split(1, dim=1)
    exact, _ = attention.attention_forward(q, k, v, bounds, 23, scale=0.25)
    loose, _ = attention.attention_forward(q, k, v, bounds, 500, scale=0.25)
    assert torch.equal(exact, loose)


@pytest.mark.parametrize("problem", [Problem((1,), 2, 1, 16), Problem((18, 1), 2, 1, 16, {"window": 1})], ids=str)
@pytest.mark.parametrize("functions", [FUSED, EAGER], ids=["fused", "eager"])
def test_a_token_alone(functions, problem: Problem, kernel_device: str, nan_filled_empty) -> None:
    """It attends to itself with probability one, whatever its query and key: their gradients are zero."""
    qkv, dout = problem.inputs(kernel_device, torch.float32)
    result = problem.run(functions, qkv, dout)
    torch.testing.assert_close(result["out"], qkv[:, 3:].expand_as(dout))
    torch.testing.assert_close(result["dv"], dout.sum(1, keepdim=True))
    torch.testing.assert_close(result["dq"], torch.zeros_like(result["dq"]))
    torch.testing.assert_close(result["dk"], torch.zeros_like(result["dk"]))


@pytest.mark.parametrize("functions", [FUSED, EAGER], ids=["fused", "eager"])
def test_no_tokens(functions, kernel_device: str) -> None:
    problem = Problem((0, 0), 2, 1, 16)
    results = problem.run(functions, *problem.inputs(kernel_device, torch.float32))
    assert results["out"].shape == (0, 2, 16)
    assert results["dk"].shape == (0, 1, 16)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 3.0), (6, 1.5)])
def test_eager_forward_is_the_definition(window: int | None, softcap: float | None) -> None:
    problem = Problem((11, 0, 7, 11), 4, 2, 8, {"window": window, "softcap": softcap})
    qkv, dout = problem.inputs("cpu", torch.float64)
    result = problem.run(EAGER, qkv, dout)
    start = 0
    for length in problem.lengths:
        for row in range(start, start + length):
            first = start if window is None else max(start, row - window + 1)
            for head in range(4):
                keys, values = qkv[first : row + 1, 4 + head // 2], qkv[first : row + 1, 6 + head // 2]
                scores = keys @ qkv[row, head] * 8**-0.5
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                torch.testing.assert_close(result["out"][row, head], scores.softmax(0) @ values)
                torch.testing.assert_close(result["lse"][head, row], scores.logsumexp(0))
        start += length


def test_eager_takes_large_groups_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem((6, 6, 6, 2), 2, 1, 8)
    qkv, dout = problem.inputs("cpu", torch.float64)
    together = problem.run(EAGER, qkv, dout)
    monkeypatch.setattr(attention_eager, "SCORES_AT_ONCE", 2 * 6 * 6 * 2)
    for name, result in problem.run(EAGER, qkv, dout).items():
        torch.testing.assert_close(result, together[name], rtol=1e-12, atol=1e-12)


REAL_PROBLEMS = {
    "head_dim 64": Problem((512, 300, 77), 8, 8, 64),
    "head_dim 80": Problem((200, 129), 4, 4, 80),
    "head_dim 96": Problem((260, 65), 4, 2, 96),
    "head_dim 128, groups of 4": Problem((1024, 513, 1), 8, 2, 128),
    "head_dim 256": Problem((300, 190), 4, 2, 256),
    "head_dim 16": Problem((300,), 2, 2, 16),
    "groups of 8": Problem((511, 257), 16, 2, 128),
    "one key head": Problem((400, 31), 8, 1, 64),
    "window": Problem((1000, 128, 700), 4, 1, 128, {"window": 256}),
    "odd window, wide heads": Problem((600, 33), 4, 2, 256, {"window": 77}),
    "soft cap": Problem((600, 128), 4, 2, 128, {"softcap": 1.5}),
    "window and soft cap": Problem((700, 200), 4, 2, 256, {"window": 130, "softcap": 4.0}),
    "many unequal documents": Problem((*range(1, 60), 700, 0, 0, *range(120, 130)), 4, 2, 64),
    "many equal documents": Problem((119,) * 40, 4, 1, 128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("problem", REAL_PROBLEMS.values(), ids=REAL_PROBLEMS.keys())
def test_real_sizes(problem: Problem, dtype: torch.dtype, nan_filled_empty) -> None:
    problem.check("cuda", dtype)


@pytest.mark.gpu
def test_same_bits_on_every_run() -> None:
    problem = Problem((1500, 900, 33), 8, 2, 128)
    qkv, dout = problem.inputs("cuda", torch.bfloat16)
    first = problem.run(FUSED, qkv, dout)
    for _ in range(5):
        for name, result in problem.run(FUSED, qkv, dout).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """The last of 2^31 elements of qkv belong to a document like any other."""
    problem = Problem((64, 64), 30, 1, 64)
    small, dout = problem.inputs("cuda", torch.bfloat16)
    row_elements = small[0].numel()
    padding = 2**31 // row_elements
    try:
        qkv = torch.zeros(padding + 128, *small.shape[1:], dtype=small.dtype, device="cuda")
    except torch.OutOfMemoryError:
        pytest.skip("needs 5 GiB of GPU memory")
    qkv[padding:] = small
    bounds = torch.tensor([0, padding, padding + 64, padding + 128], device="cuda", dtype=torch.int32)
    q, k, v = qkv.split((30, 1, 1), dim=1)
    out, _ = attention.attention_forward(q, k, v, bounds, padding, scale=0.125, window=16)
    problem = problem._replace(options={"window": 16, "scale": 0.125})
    assert torch.equal(out[padding:], problem.run(FUSED, small, dout)["out"])
