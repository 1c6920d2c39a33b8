"""A clock that counts training alone, and figures that are read when the device has got there."""

import time

import pytest
import torch

from slothcore.training.meter import Mark, Meter

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_the_clock_stands_still_while_the_meter_is_entered(clock: Clock) -> None:
    meter = Meter(CPU, window_loss=0.0, window_steps=0, elapsed=50.0)
    clock.now += 10
    meter.add(torch.tensor(2.0), 300)
    with meter:
        clock.now += 1000
        assert meter.elapsed() == 60.0, "what a checkpoint stores"
    clock.now += 5
    figures = meter.read(meter.close_window(torch.tensor(0.5)))
    assert figures.elapsed == 65.0
    assert figures.tokens_per_second == 300 / 15


def test_a_line_is_of_its_own_steps_whenever_it_is_read(clock: Clock) -> None:
    meter = Meter(CPU, window_loss=1.5, window_steps=1, elapsed=0.0)
    meter.add(torch.tensor(2.0), 300)
    clock.now += 4
    first = meter.close_window(torch.tensor(0.5))
    # The next step, asked for before the line is read.
    meter.add(torch.tensor(8.0), 100)
    clock.now += 2
    second = meter.close_window(torch.tensor(float("inf")))
    clock.now += 1000
    figures = meter.read(first)
    assert (figures.loss, figures.steps, figures.grad_norm) == (3.5, 2, 0.5)
    assert (figures.tokens_per_second, figures.elapsed) == (300 / 4, 4.0)
    figures = meter.read(second)
    assert (figures.loss, figures.steps, figures.grad_norm) == (8.0, 1, None)
    assert (figures.tokens_per_second, figures.elapsed) == (100 / 2, 6.0)
    assert meter.read_loss() == 0.0


def test_skipped_steps_are_counted_line_by_line() -> None:
    meter = Meter(CPU, window_loss=1.5, window_steps=1, elapsed=0.0, window_skipped=1)
    meter.add(torch.tensor(2.0), 300, skipped=torch.tensor(True))
    meter.add(torch.tensor(2.0), 300, skipped=torch.tensor(False))
    assert meter.read_skipped() == 2
    first = meter.close_window(torch.tensor(0.5))
    assert meter.read_skipped() == 0
    meter.add(torch.tensor(2.0), 300)
    assert [meter.read(reading).skipped for reading in (first, meter.close_window(torch.tensor(0.5)))] == [2, 0]


def test_a_loss_that_is_no_number_is_not_read() -> None:
    meter = Meter(CPU, window_loss=0.0, window_steps=0, elapsed=0.0)
    meter.add(torch.tensor(float("nan")), 1)
    with pytest.raises(ValueError, match="no longer finite"):
        meter.read_loss()
    with pytest.raises(ValueError, match="no longer finite"):
        meter.read(meter.close_window(torch.tensor(1.0)))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_until_a_line_is_read() -> None:
    device = torch.device("cuda")
    meter = Meter(device, window_loss=0.0, window_steps=0, elapsed=0.0)
    # Pinned memory is allocated, and every kernel loaded: either may wait for the device.
    for _ in range(2):
        meter.add(torch.full((), 7.0, device=device), 100)
        meter.read(meter.close_window(torch.ones((), device=device)))
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # about two seconds of work
    # Made on the device: to be copied there, it would wait.
    meter.add(torch.full((), 2.0, device=device), 100)
    reading = meter.close_window(torch.ones((), device=device))
    meter.add(torch.full((), 7.0, device=device), 100)
    assert not reading.mark.passed(), "it waited"
    figures = meter.read(reading)
    assert (figures.loss, figures.grad_norm) == (2.0, 1.0)
    assert figures.elapsed > 0.1
    assert meter.read_loss() == 7.0


@pytest.mark.gpu
def test_marks_measure_the_work_of_the_gpu() -> None:
    device = torch.device("cuda")
    torch.cuda.synchronize()
    before = Mark(device)
    torch.cuda._sleep(1_000_000_000)
    after = Mark(device)
    began = time.perf_counter()
    after.wait()
    assert after.seconds_since(before) == pytest.approx(time.perf_counter() - began, rel=0.2)
