"""The attention kernels with their blocks fetched by the copy engine."""

import pytest
import torch

from slothcore.kernels import attention, attention_backward
from slothcore.kernels.attention_tiles import CopyEngineFrom, Tile, Tiles, copied_pair, copy_engine_from
from tests.kernels.test_attention import FUSED, Problem


@pytest.fixture
def copy_engine(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The copy engine fetches the blocks of every kernel that it can; the list says of each launch whether it did."""
    if kernel_device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU with a copy engine")
    taken: list[bool] = []

    def noted(*arguments):
        pair = copied_pair(*arguments)
        taken.append(pair[0] is not None)
        return pair

    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "copy_engine_from", lambda *_: CopyEngineFrom(1, 1, 1))
        monkeypatch.setattr(module, "copied_pair", noted)
    return taken


COPIED_PROBLEMS = {
    "whole blocks": Problem((96, 64), 4, 2, 16),
    "ragged and empty": Problem((0, 40, 1, 0, 83, 16, 1, 3, 0), 2, 1, 16),
    "groups of 4": Problem((70, 33), 8, 2, 32),
    "two programs for one key head": Problem((50, 3), 8, 1, 16),
    "window": Problem((90, 5), 2, 1, 16, {"window": 20}),
    "window of two keys": Problem((18,), 1, 1, 16, {"window": 2}),
    "window as long as a block": Problem((49,), 1, 1, 16, {"window": 32}),
    "window and soft cap": Problem((60, 30), 2, 2, 64, {"window": 17, "softcap": 3.0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", COPIED_PROBLEMS.values(), ids=COPIED_PROBLEMS.keys())
def test_by_copy_engine(
    problem: Problem, dtype: torch.dtype, kernel_device: str, copy_engine: list[bool], nan_filled_empty
) -> None:
    problem.check(kernel_device, dtype)
    assert copy_engine == [True] * 3


@pytest.mark.parametrize("window", [None, 5, 21, 40])
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16)], ids=str)
def test_every_ratio_of_copied_blocks(
    blocks: tuple[int, int], window: int | None, kernel_device: str, copy_engine: list[bool], nan_filled_empty,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tile = Tile(*blocks, num_warps=4, num_stages=1)
    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "attention_tiles", lambda *_, **__: Tiles(tile, tile, tile))
    Problem((83, 19), 2, 1, 16, {"window": window}).check(kernel_device, torch.float16)
    assert copy_engine == [True] * 3


def test_copy_engine_leaves_documents_apart(kernel_device: str, copy_engine: list[bool]) -> None:
    """It would fetch a neighbour's rows: NaNs there must reach no output and no gradient."""
    problem = Problem((19, 70, 5), 8, 2, 16)
    qkv, dout = problem.inputs(kernel_device, torch.float16)
    before = problem.run(FUSED, qkv, dout)
    qkv[19:89], dout[19:89] = float("nan"), float("nan")
    after = problem.run(FUSED, qkv, dout)
    assert copy_engine == [True] * 6
    others = [*range(19), *range(89, 94)]
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(after[name][others], before[name][others]), name
        assert after[name][19:89].isnan().any(), name
    assert torch.equal(after["lse"][:, others], before["lse"][:, others])


def test_what_the_copy_engine_cannot_read(kernel_device: str, copy_engine: list[bool], nan_filled_empty) -> None:
    """Heads of two pieces; a gradient expanded over the tokens; rows that do not start at multiples of 16 bytes."""
    Problem((40, 3), 2, 1, 48).check(kernel_device, torch.float16)
    problem = Problem((40, 3), 2, 1, 16)
    qkv, dout = problem.inputs(kernel_device, torch.float16)
    problem.check_inputs(qkv, dout[:1].expand_as(dout))
    odd = torch.empty(43, 65, device=kernel_device, dtype=torch.float16)[:, 1:].unflatten(1, (4, 16)).copy_(qkv)
    problem.check_inputs(odd, dout)
    assert copy_engine == [False] * 3 + [True, True, False] + [False] * 3


def test_heads_apart_by_copy_engine(kernel_device: str, copy_engine: list[bool]) -> None:
    problem = Problem((40, 23), 2, 1, 16)
    qkv, dout = problem.inputs(kernel_device, torch.float16)
    spread = torch.full((63, 5, 48), float("nan"), device=kernel_device, dtype=torch.float16)[:, :4, :16].copy_(qkv)
    expected = problem.run(FUSED, qkv, dout)
    for name, result in problem.run(FUSED, spread, dout).items():
        assert torch.equal(result, expected[name]), name
    assert copy_engine == [True] * 6


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "expected"),
    [
        (128, torch.bfloat16, (9, 0), CopyEngineFrom(512, 512, 1)),
        (128, torch.float16, (9, 0), CopyEngineFrom(512, 512, 1)),
        (128, torch.float32, (9, 0), None),
        (96, torch.bfloat16, (9, 0), None),
        (128, torch.bfloat16, (8, 0), None),
        (128, torch.bfloat16, (8, 9), None),
        (128, torch.bfloat16, (12, 0), None),
        (128, torch.float16, (7, 5), None),
        (128, torch.float16, None, None),
    ],
)
def test_where_the_copy_engine_wins(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, expected: CopyEngineFrom | None
) -> None:
    assert copy_engine_from(head_dim, dtype, capability) == expected


@pytest.mark.gpu
def test_copy_engine_leaves_long_documents_apart() -> None:
    """At the sizes and in the dtype for which the rule takes the copy engine, where there is one."""
    problem = Problem((600, 777, 530), 8, 2, 128)
    qkv, dout = problem.inputs("cuda", torch.bfloat16)
    before = problem.run(FUSED, qkv, dout)
    qkv[600:1377], dout[600:1377] = float("nan"), float("nan")
    after = problem.run(FUSED, qkv, dout)
    others = [*range(600), *range(1377, 1907)]
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(after[name][others], before[name][others]), name
    assert torch.equal(after["lse"][:, others], before["lse"][:, others])
