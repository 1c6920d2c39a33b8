"""Numbers, sizes and times as a reader likes them. Anything that is no number becomes a dash."""

import json
import math
from datetime import datetime, timezone
from typing import Any, TypeGuard

NOTHING = "\N{EN DASH}"
GIB = 2**30


def figure(value: Any) -> str:
    """Four digits: 4.159, 0.00045, 2e-05, 6,135."""
    if not is_number(value):
        return NOTHING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def count(value: Any) -> str:
    """12,345."""
    return f"{value:,.0f}" if is_number(value) else NOTHING


def short_count(value: Any) -> str:
    """1.23 M, 420 k, 999."""
    if not is_number(value):
        return NOTHING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def size(value: Any) -> str:
    """Bytes: 812 B, 3.4 MiB, 29.1 GiB."""
    if not is_number(value):
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes all")


def gib(value: Any) -> str:
    """A number of GiB."""
    return size(value * GIB) if is_number(value) else NOTHING


def duration(seconds: Any) -> str:
    """42 s, 3 min 20 s, 2 h 05 min, 1 d 3 h."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def period(begun: Any, ended: Any) -> str:
    """From and to, in seconds since 1970, as dates and times of day; the day once if it is one. "" without a start."""
    start, end = _utc(begun), _utc(ended)
    if start is None:
        return ""
    if end is None:
        return f"since {start:%Y-%m-%d %H:%M} UTC"
    same_day = start.date() == end.date()
    return f"{start:%Y-%m-%d %H:%M} to {end:{'%H:%M' if same_day else '%Y-%m-%d %H:%M'}} UTC"


def _utc(seconds: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(float(seconds), timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def value_of(option: Any) -> str:
    """The value of an option as YAML would have it, in one line."""
    if isinstance(option, str):
        return option
    if isinstance(option, float):
        # Exact, unlike a measured figure.
        short = f"{option:g}"
        return short if float(short) == option else repr(option)
    return json.dumps(option, ensure_ascii=False, default=str)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
