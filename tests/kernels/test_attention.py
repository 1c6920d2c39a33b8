"""Attention kernels against their eager twins, and the twins against the definition."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slothcore.kernels import attention, attention_backward, attention_backward_eager, attention_eager
from slothcore.kernels.attention_tiles import (
    Tile,
    Tiles,
    attention_tiles,
    head_columns,
    key_gradient_parts,
    shared_memory_kib,
)
from slothcore.kernels.gpu import device_capability
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
        self.check_inputs(qkv, dout)

    def check_inputs(self, qkv: Tensor, dout: Tensor) -> None:
        fused, eager = self.run(FUSED, qkv, dout), self.run(EAGER, qkv, dout)
        exact = self.run(EAGER, qkv.double(), dout.double())
        for name, result in fused.items():
            assert_as_accurate_as_eager(result, eager[name], exact[name], what=name)


SMALL_PROBLEMS = {
    "grouped, equal lengths": Problem((33, 33), 4, 2, 16),
    "unequal lengths, some empty": Problem((0, 40, 1, 0, 7, 2, 1, 1, 1, 3, 0), 2, 1, 16),
    "two programs for one key head, odd width": Problem((50, 3), 8, 1, 24),
    "one program for an odd group": Problem((35, 3), 6, 2, 24, {"window": 18}),
    "window": Problem((70, 5), 2, 1, 16, {"window": 20}),
    "window of two keys": Problem((18,), 1, 1, 16, {"window": 2}),
    "window as long as a block": Problem((49,), 1, 1, 16, {"window": 32}),
    "soft cap": Problem((35, 2), 2, 1, 16, {"softcap": 1.0}),
    "window and soft cap": Problem((60, 30), 2, 2, 40, {"window": 17, "softcap": 3.0}),
    "two pieces of a head": Problem((37, 5), 2, 2, 48, {"window": 20}),
    "second piece wider than what is left": Problem((34,), 2, 1, 83, {"softcap": 2.0}),
    "enough key heads for one program each": Problem((33, 4), 8, 4, 16),
    "programs with unequal shares of a group": Problem((35, 3), 9, 1, 48, {"window": 18}),
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
    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "attention_tiles", lambda *_, **__: Tiles(tile, tile, tile))
    Problem((83, 19), 2, 1, 16, {"window": window}).check(kernel_device, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_any_number_of_programs_shares_a_group(
    parts: int, dtype: torch.dtype, kernel_device: str, nan_filled_empty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 query heads: shares of 5, of 3 and 2, of 2, 2 and 1, of 1 each."""
    monkeypatch.setattr(attention_backward, "key_gradient_parts", lambda *_: parts)
    Problem((40, 0, 9), 5, 1, 16).check(kernel_device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_dk_and_dv_in_a_launch_each(
    parts: int, dtype: torch.dtype, kernel_device: str, nan_filled_empty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit what one launch of the same tile gives, and as accurate with a tile of its own."""
    problem = Problem((45, 0, 7), 4, 2, 48, {"window": 30, "softcap": 3.0})
    qkv, dout = problem.inputs(kernel_device, dtype)
    small, large = Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)
    monkeypatch.setattr(attention_backward, "key_gradient_parts", lambda *_: parts)
    results = []
    for value_tile in (None, small, large):
        tiles = Tiles(small, small, small, value_tile)
        monkeypatch.setattr(attention_backward, "attention_tiles", lambda *_, tiles=tiles, **__: tiles)
        results.append(problem.run(FUSED, qkv, dout))
    together, apart, _ = results
    for name in ("dk", "dv"):
        assert torch.equal(apart[name], together[name]), name
    problem.check(kernel_device, dtype)


def test_pieces_of_a_head_give_what_padding_gives(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem((45, 3), 4, 2, 96, {"window": 30})
    qkv, dout = problem.inputs(kernel_device, torch.float32)
    tile = Tile(32, 16, 4, 1, pad=True)
    in_pieces = problem.run(FUSED, qkv, dout)
    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "attention_tiles", lambda *_, **__: Tiles(tile, tile, tile))
    for name, padded in problem.run(FUSED, qkv, dout).items():
        torch.testing.assert_close(in_pieces[name], padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 16, 20, 50])
def test_blocks_outside_the_window_are_never_read(window: int, kernel_device: str) -> None:
    """NaNs in what a window hides reach nothing that is further away than the window and a block on either side."""
    problem = Problem((300,), 2, 1, 16, {"window": window})
    tiles = attention_tiles(16, torch.float32, device_capability(torch.device(kernel_device)))
    reach = window + max(max(tile.block_q, tile.block_k) for tile in tiles if tile) * 2
    qkv, dout = problem.inputs(kernel_device, torch.float32)
    before = problem.run(FUSED, qkv, dout)
    qkv[:10], dout[:10] = float("nan"), float("nan")
    qkv[290:], dout[290:] = float("nan"), float("nan")
    after = problem.run(FUSED, qkv, dout)
    far = slice(10 + reach, 290 - reach)
    for name in ("out", "dq", "dk", "dv"):
        assert after[name][far].numel() > 0
        assert torch.equal(after[name][far], before[name][far]), name


@pytest.mark.parametrize(
    ("head_dim", "pieces"),
    [(4, (16, 0)), (16, (16, 0)), (24, (32, 0)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (97, (128, 0)),
     (128, (128, 0)), (160, (128, 32)), (192, (128, 64)), (193, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_pieces_of_a_head(head_dim: int, pieces: tuple[int, int]) -> None:
    assert head_columns(head_dim) == pieces
    assert sum(pieces) >= head_dim
    assert head_columns(head_dim, pad=True) == (max(16, 1 << (head_dim - 1).bit_length()), 0)


@pytest.mark.parametrize(
    ("heads", "parts"), [((32, 8), 1), ((16, 4), 1), ((8, 1), 2), ((4, 1), 1), ((14, 2), 1), ((2, 1), 1), ((2, 2), 1)]
)
def test_programs_of_a_key_head(heads: tuple[int, int], parts: int) -> None:
    assert key_gradient_parts(*heads) == parts


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_operands_of_every_tile_fit_the_device(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> None:
    """A lower bound of what a kernel needs: the blocks in flight, and where they are not streamed, its own."""
    tiles = attention_tiles(head_dim, dtype, capability, capped=True)
    kib = sum(head_columns(head_dim)) * dtype.itemsize / 1024
    memory = shared_memory_kib(capability)
    assert tiles.forward.num_stages * 2 * tiles.forward.block_k * kib <= memory
    assert tiles.query_gradient.num_stages * 2 * tiles.query_gradient.block_k * kib <= memory
    for tile in filter(None, (tiles.key_gradient, tiles.value_gradient)):
        assert tile.num_stages * 2 * tile.block_q * kib <= memory


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
    problem = Problem((19, 23, 5), 8, 1, 16, {"window": 9})
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


# A float64 score tensor of these takes at most 70 MB, so that many workers may share a GPU.
REAL_PROBLEMS = {
    "head_dim 64": Problem((512, 300, 77), 8, 8, 64),
    "head_dim 80": Problem((200, 129), 4, 4, 80),
    "head_dim 96": Problem((260, 65), 4, 2, 96),
    "head_dim 128, groups of 4": Problem((1024, 513, 1), 8, 2, 128),
    "head_dim 256": Problem((300, 190), 4, 2, 256),
    "head_dim 16": Problem((300,), 2, 2, 16),
    "groups of 8": Problem((511, 257), 16, 2, 128),
    "one key head": Problem((400, 31), 8, 1, 64),
    "window": Problem((1000, 128, 700), 8, 1, 128, {"window": 256}),
    "odd window, wide heads": Problem((300, 33), 8, 1, 256, {"window": 77}),
    "soft cap": Problem((600, 128), 4, 2, 128, {"softcap": 1.5}),
    "window and soft cap": Problem((700, 200), 4, 2, 256, {"window": 130, "softcap": 4.0}),
    "many unequal documents": Problem((*range(1, 60), 700, 0, 0, *range(120, 130)), 4, 2, 64),
    "many equal documents": Problem((119,) * 40, 8, 1, 128),
    "documents around 512": Problem((511, 512, 513, 1, 575), 8, 2, 128),
    "whole and ragged blocks": Problem((2048, 2017, 31), 4, 1, 128),
    "one long, many short": Problem((*range(1, 30), 2500), 4, 1, 128),
    "window in long documents": Problem((1500, 1111), 4, 2, 128, {"window": 300}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("problem", REAL_PROBLEMS.values(), ids=REAL_PROBLEMS.keys())
def test_real_sizes(problem: Problem, dtype: torch.dtype, nan_filled_empty) -> None:
    problem.check("cuda", dtype)


# Every head_dim of the supported models with every mask and every ratio of heads (1, 2, 4, 8 queries a key; one key
# head for all), so paired that each head_dim meets each mask, and each ratio at least two head_dims and two masks.
ZOO_HEADS = {
    "equal": (4, 4), "2 to 1": (4, 2), "4 to 1": (8, 2), "8 to 1": (16, 2), "8 on one": (8, 1), "7 to 1": (14, 2),
}  # fmt: skip
ZOO_OPTIONS = {
    "plain": {}, "cap": {"softcap": 2.0}, "window": {"window": 300}, "both": {"window": 300, "softcap": 2.0},
}  # fmt: skip
ZOO = [
    (64, "4 to 1", "plain"), (64, "7 to 1", "cap"), (64, "8 to 1", "window"), (64, "2 to 1", "both"),
    (96, "equal", "plain"), (96, "2 to 1", "cap"), (96, "equal", "window"), (96, "8 on one", "both"),
    (128, "4 to 1", "plain"), (128, "8 to 1", "cap"), (128, "4 to 1", "window"), (128, "equal", "both"),
    (256, "8 on one", "plain"), (256, "2 to 1", "cap"), (256, "4 to 1", "window"), (256, "8 on one", "window"),
    (256, "2 to 1", "both"), (256, "8 to 1", "both"),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "heads", "options"), ZOO, ids=[f"{d}, {h}, {o}" for d, h, o in ZOO])
def test_heads_of_the_models(head_dim: int, heads: str, options: str, dtype: torch.dtype, nan_filled_empty) -> None:
    Problem((700, 129, 1), *ZOO_HEADS[heads], head_dim, ZOO_OPTIONS[options]).check("cuda", dtype)


@pytest.mark.gpu
def test_window_across_a_long_document() -> None:
    """Gemma 2's soft cap and a window that the document is longer than, at a length of many whole blocks."""
    Problem((2048,), 2, 1, 256, {"window": 1000, "softcap": 50.0}).check("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1500, 900, 33), (2048, 2048)], ids=str)
@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_same_bits_on_every_run(num_kv_heads: int, lengths: tuple[int, ...]) -> None:
    problem = Problem(lengths, 8, num_kv_heads, 128)
    qkv, dout = problem.inputs("cuda", torch.bfloat16)
    first = problem.run(FUSED, qkv, dout)
    for _ in range(5):
        for name, result in problem.run(FUSED, qkv, dout).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.gpu
def test_heads_further_apart_than_32_bits() -> None:
    """The third query head starts at element 2^31 of q."""
    problem = Problem((70, 3), 3, 1, 64)
    qkv, dout = problem.inputs("cuda", torch.bfloat16)
    q, k, v = qkv.split((3, 1, 1), dim=1)
    far = torch.empty(2**31 + 73 * 64, dtype=q.dtype, device="cuda").as_strided(q.shape, (64, 2**30, 1)).copy_(q)
    bounds = torch.tensor([0, 70, 73], device="cuda", dtype=torch.int32)
    near = problem.run(FUSED, qkv, dout)
    out, lse = attention.attention_forward(far, k, v, bounds, 70, scale=0.125)
    dqkv = attention_backward.attention_backward(dout, far, k, v, out, lse, bounds, 70, scale=0.125)
    assert torch.equal(out, near["out"])
    assert torch.equal(dqkv, torch.cat([near[name] for name in ("dq", "dk", "dv")], dim=1))


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
