"""What launchers ask about the GPU and Triton."""

import sys

import pytest
import torch

from slothcore.kernels import gpu


def test_copy_engine_reads_rows_that_are_apart() -> None:
    matrix = torch.zeros(8, 64)
    assert gpu.copy_engine_takes(matrix)
    assert gpu.copy_engine_takes(matrix[:, :32])
    unreadable = {
        "transposed": matrix.t(),
        "unaligned start": matrix[:, 1:33],
        "unaligned rows": torch.zeros(8, 63),
        "expanded along rows, as the gradient of a sum over tokens": matrix[:1].expand(8, 64),
        "overlapping rows": matrix.as_strided((4, 64), (32, 1)),
        "empty": matrix[:0],
    }
    for what, view in unreadable.items():
        assert not gpu.copy_engine_takes(view), what


def test_a_triton_without_gluon_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    gpu.has_gluon.cache_clear()
    assert not gpu.has_gluon()
    gpu.has_gluon.cache_clear()


def test_the_cpu_is_no_hopper() -> None:
    assert gpu.device_capability(torch.device("cpu")) is None
    assert not gpu.is_hopper(torch.device("cpu"))
