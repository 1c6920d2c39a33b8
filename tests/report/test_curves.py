"""Thinned and smoothed: nothing that stands out is lost, nothing is invented."""

import random

import pytest

from slothcore.report.curves import FEWEST_SMOOTHED, MOST_POINTS, curves, in_order, smooth, thin
from slothcore.report.run_log import Column, RunLog
from tests.report.made_up import add_lines, write_run


@pytest.mark.parametrize("count", [MOST_POINTS + 1, 10_000, 123_457])
def test_thinning_keeps_lows_highs_and_ends(count: int) -> None:
    generator = random.Random(count)
    steps, values = list(range(1, count + 1)), [generator.gauss(0, 1) for _ in range(count)]
    spike, dip = count // 3, 2 * count // 3
    values[spike], values[dip] = 99.0, -99.0
    kept_steps, kept = thin(steps, values)
    assert MOST_POINTS / 2 <= len(kept_steps) <= MOST_POINTS
    assert sorted(set(kept_steps)) == list(kept_steps)
    assert all(values[step - 1] == value for step, value in zip(kept_steps, kept, strict=True))
    assert (kept_steps[0], kept_steps[-1]) == (1, count)
    assert {spike + 1, dip + 1} <= set(kept_steps)
    # Of each stretch: no point lies outside what is drawn there.
    buckets = (MOST_POINTS - 2) // 2
    for bucket in generator.sample(range(buckets), 50):
        stretch = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        drawn = [v for s, v in zip(kept_steps, kept, strict=True) if s - 1 in stretch]
        assert (min(drawn), max(drawn)) == (min(values[i] for i in stretch), max(values[i] for i in stretch))


def test_few_points_are_all_kept() -> None:
    steps, values = list(range(MOST_POINTS)), [float(i % 7) for i in range(MOST_POINTS)]
    assert thin(steps, values) == (steps, values)


def test_smoothing_leaves_a_constant_and_a_slope_alone() -> None:
    assert smooth([2.5] * 100) == pytest.approx([2.5] * 100)
    slope = [3 * i + 1 for i in range(1000)]
    # A lagging average would be off by half its window, here 15 steps of 3.
    assert smooth(slope)[100:900] == pytest.approx(slope[100:900])


def test_smoothing_takes_noise_away_and_stays_in_bounds() -> None:
    generator = random.Random(0)
    values = [5 + generator.gauss(0, 1) for _ in range(2000)]
    smoothed = smooth(values)
    assert len(smoothed) == len(values)
    assert max(abs(value - 5) for value in smoothed[100:-100]) < 0.6
    assert min(values) <= min(smoothed)
    assert max(smoothed) <= max(values)


def test_the_trend_is_of_all_points_not_of_those_that_are_drawn(tmp_path) -> None:
    """Lows and highs alone would move the trend: here to 5, where the mean is 0.1."""
    folder = write_run(tmp_path, steps=3)
    (folder / "log.jsonl").write_text("")
    add_lines(folder, *({"step": step, "loss": 10.0 if step % 100 == 0 else 0.0} for step in range(1, 20_001)))
    log = RunLog(folder / "log.jsonl")
    log.update()
    drawn = curves(log)["series"]
    assert sum(drawn["loss_smooth"][1]) / len(drawn["loss_smooth"][1]) == pytest.approx(0.1, abs=0.02)
    assert max(drawn["loss"][1]) == 10


def test_a_short_curve_has_no_trend(tmp_path) -> None:
    for steps, expected in ((FEWEST_SMOOTHED - 1, False), (FEWEST_SMOOTHED, True)):
        log = RunLog(write_run(tmp_path / str(steps), steps=steps) / "log.jsonl")
        log.update()
        assert ("loss_smooth" in curves(log)["series"]) is expected


def test_points_are_put_in_order() -> None:
    assert in_order(Column([3, 1, 2], [30.0, 10.0, 20.0])) == ([1, 2, 3], [10.0, 20.0, 30.0])


def test_the_axis_starts_at_nothing_and_ends_at_the_end(tmp_path) -> None:
    log = RunLog(write_run(tmp_path, steps=3000) / "log.jsonl")
    log.update()
    axis = curves(log)["axis"]
    assert (axis["tokens_steps"][0], axis["tokens"][0]) == (0, 0)
    assert (axis["tokens_steps"][-1], axis["tokens"][-1]) == (3000, 3_000_000)
    assert len(axis["tokens"]) < 500
    assert all(tokens == 1000 * step for step, tokens in zip(axis["tokens_steps"], axis["tokens"], strict=True))
