"""Numbers as the page writes them."""

import math

import pytest

from slothcore.report import words


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (4.15943, "4.159"), (0.00044983, "0.0004498"), (2e-5, "2e-5"), (-1234.6, "-1,235"), (math.nan, "\u2013"),
     (None, "\u2013"), (True, "\u2013"), ("<b>", "\u2013")],
)  # fmt: skip
def test_figures(value, expected) -> None:
    assert words.figure(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (2048, "2 KiB"),
        (3.4 * 2**20, "3.4 MiB"),
        (29.1 * 2**30, "29.1 GiB"),
        (None, "\u2013"),
    ],
)
def test_sizes(value, expected) -> None:
    assert words.size(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(999, "999"), (420_042, "420 k"), (1_234_567, "1.23 M"), (8e9, "8 B"), (15e12, "15 T")]
)
def test_short_counts(value, expected) -> None:
    assert words.short_count(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (3.25, "3.2 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (1e5, "1 d 3 h"),
    ],
)
def test_durations(seconds, expected) -> None:
    assert words.duration(seconds) == expected


@pytest.mark.parametrize(
    ("begun", "ended", "expected"),
    [
        (0, 3600, "1970-01-01 00:00 to 01:00 UTC"),
        (0, 86400, "1970-01-01 00:00 to 1970-01-02 00:00 UTC"),
        (0, None, "since 1970-01-01 00:00 UTC"),
        (None, 5, ""),
        ("later", math.inf, ""),
        (1e300, None, ""),
    ],
)
def test_periods(begun, ended, expected) -> None:
    assert words.period(begun, ended) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("text", "text"), (None, "null"), (True, "true"), (["a", 1], '["a", 1]'), (2e-4, "0.0002"), (1e9, "1e+09"),
     (math.nan, "nan"), (0.000123456789, "0.000123456789"), ({"factor": 4}, '{"factor": 4}')],
)  # fmt: skip
def test_values_of_options(value, expected) -> None:
    assert words.value_of(value) == expected
