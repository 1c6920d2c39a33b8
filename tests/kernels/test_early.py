"""Which launches begin while the kernel in front of them ends."""

import pytest
import torch

from slothcore.autograd import rms_norm
from slothcore.kernels import early


def test_few_rows_on_hopper_begin_early(monkeypatch) -> None:
    monkeypatch.setattr(early, "is_hopper", lambda device: True)
    assert not early.begins_early(torch.zeros(1, 8)), "a CPU has no launches"

    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, rows: int) -> None:
            self.shape = (rows, 8)

    assert early.begins_early(OnGpu(early.MOST_ROWS))
    assert not early.begins_early(OnGpu(early.MOST_ROWS + 1))
    monkeypatch.setattr(early, "is_hopper", lambda device: False)
    assert not early.begins_early(OnGpu(1))


def test_training_launches_as_ever(monkeypatch) -> None:
    monkeypatch.setattr(rms_norm, "begins_early", lambda x: True)
    assert not rms_norm.is_decoding(torch.zeros(1, 8))
    with torch.no_grad():
        assert rms_norm.is_decoding(torch.zeros(1, 8))


@pytest.mark.gpu
def test_gpu_norms_that_begin_early_have_the_same_bits() -> None:
    x, residual, weight = torch.randn(2, 4096).cuda(), torch.randn(2, 4096).cuda(), torch.randn(4096).cuda()
    options = {"eps": 1e-5, "weight_offset": 0.0, "cast_before_weight": True, "residual": residual}
    late = rms_norm.fused.rms_norm_forward(x, weight, **options)
    if not early.begins_early(x):
        pytest.skip("for Hopper")
    for _ in range(50):
        actual = rms_norm.fused.rms_norm_forward(x, weight, **options, early=True)
        assert all(map(torch.equal, actual, late))
