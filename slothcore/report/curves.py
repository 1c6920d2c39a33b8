"""From columns of the log to the points of a curve: smoothed over all of them, then thinned to what a screen shows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from slothcore.report.run_log import Column, RunLog

# Points of a curve. A desktop's chart is some 1,200 pixels wide, so thinning hides nothing unless one zooms far in.
MOST_POINTS = 2000
# Points of the table that turns steps into time and tokens; both grow almost evenly.
MOST_AXIS_POINTS = 400
# Width of the smoothing window, as a share of all points.
SMOOTHING = 0.03
# Fewer points than this are their own trend.
FEWEST_SMOOTHED = 40
# Enough for a chart; more would only make the page bigger.
DIGITS = 6

Points = tuple[Sequence[int], Sequence[float]]


def curves(log: RunLog, *, best: int | None = None) -> dict[str, Any]:
    """The curves of one log, `{"loss": [steps, values], ...}`, and `axis`, which maps steps to time and tokens.

    Args:
        best: the step of the evaluation that is marked.
    """
    series: dict[str, Any] = {}
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "host_memory_gib"):
        steps, values = in_order(log.columns[name])
        if not steps:
            continue
        series[name] = _rounded(thin(steps, values))
        if name in ("loss", "grad_norm", "tokens_per_second") and len(steps) >= FEWEST_SMOOTHED:
            series[f"{name}_smooth"] = _rounded(thin(steps, smooth(values)))
    if log.columns["eval_loss"]:
        steps, values = in_order(log.columns["eval_loss"])
        series["eval_loss"] = _rounded(thin(steps, values))
        if best is not None and best in steps:
            series["eval_best"] = _rounded(([best], [values[list(steps).index(best)]]))
    return {"series": series, "axis": _axis(log), "lines": len(log.columns["loss"].steps)}


def in_order(column: Column) -> Points:
    """The points of a column by rising step, as they nearly always are already."""
    steps, values = column.steps, column.values
    if all(a <= b for a, b in pairwise(steps)):
        return steps, values
    order = sorted(range(len(steps)), key=steps.__getitem__)
    return [steps[i] for i in order], [values[i] for i in order]


def smooth(values: Sequence[float]) -> list[float]:
    """A centred moving average, taken twice, so that the ends of its window weigh less. It does not lag behind.

    At the start the window is a quarter as wide, so that a steep fall keeps most of its height; at the end it is cut
    off, so that the last value alone makes no trend.
    """
    half = max(1, round(len(values) * SMOOTHING / 2))
    averages: list[float] = _moving_average(_moving_average(np.asarray(values, dtype=np.float64), half), half).tolist()
    return averages


def _moving_average(values: np.ndarray, half: int) -> np.ndarray:
    sums = np.concatenate(([0.0], np.cumsum(values)))
    middle = np.arange(len(values))
    reach = np.minimum(middle + half // 4, half)
    first, end = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def thin(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> Points:
    """At most `most` of the points: the first, the last, and the lowest and highest of equal stretches between.

    A spike of one step is kept; an average, or every n-th point, would lose it. None is invented or moved.
    """
    count = len(steps)
    if count <= most:
        return steps, values
    buckets = (most - 2) // 2
    kept = {0, count - 1}
    for bucket in range(buckets):
        stretch = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        kept.add(min(stretch, key=values.__getitem__))
        kept.add(max(stretch, key=values.__getitem__))
    chosen = sorted(kept)
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _axis(log: RunLog) -> dict[str, list[float]]:
    """For some steps, the seconds and tokens until there. Starts with 0, where all start."""
    axis: dict[str, list[float]] = {}
    for name in ("elapsed", "tokens"):
        steps, values = in_order(log.columns[name])
        every = max(1, len(steps) // MOST_AXIS_POINTS)
        chosen = [*range(0, len(steps) - 1, every), len(steps) - 1] if steps else []
        axis[f"{name}_steps"] = [0, *(steps[i] for i in chosen)]
        axis[name] = [0, *(_short(values[i]) for i in chosen)]
    return axis


def _rounded(points: Points) -> list[list[Any]]:
    steps, values = points
    return [list(steps), [_short(value) for value in values]]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
