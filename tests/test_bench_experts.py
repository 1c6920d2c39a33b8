"""The benchmark of routed experts on tiny ones: both sides agree, forward and backward."""

import pytest
import torch

from benchmarks.ops.bench_experts import ExpertShape, cases
from benchmarks.ops.bench_ops import wrong_result


@pytest.mark.parametrize("is_nf4", [False, True])
def test_both_sides_agree(is_nf4: bool) -> None:
    shape = ExpertShape(experts=5, experts_per_token=2, hidden_size=64, intermediate_size=128)
    found = list(cases("tiny", shape, [1, 17], is_nf4=is_nf4, dtype=torch.float32, device="cpu"))
    assert [case.op for case in found] == ["experts forward", "experts backward"] * 2
    for case in found:
        assert wrong_result(case) == ""
        assert case.flops == 2 * int(case.shape.split()[1]) * 2 * 3 * 64 * 128
        case.run()
        case.peer()
