"""The table of family x check at the end of a test run: which checks of which model families passed.

A test notes its family in its report's properties, which pytest-xdist carries from the workers to the process that
prints.
"""

from collections import Counter, defaultdict

import pytest

PROPERTY = "family x check"
OUTCOMES = {"passed": "passed", "failed": "FAILED", "error": "FAILED", "skipped": "skipped"}


def note(item: pytest.Item, family: str) -> None:
    """Let `item` count for `family`; the check is what the test's name says."""
    check = item.originalname.removeprefix("test_").replace("_", " ")  # type: ignore[attr-defined]
    item.user_properties.append((PROPERTY, [family, check]))


def write_table(reporter: pytest.TerminalReporter) -> None:
    """Print one row a family: how many variants of it passed each check, or that some did not."""
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome, meaning in OUTCOMES.items():
        for report in reporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                # A test that passes reports its set-up and its teardown as well; skips and errors have no call.
                if name == PROPERTY and (report.when == "call" or outcome != "passed"):
                    cells[tuple(value)][meaning] += 1
    if not cells:
        return
    families = list(dict.fromkeys(sorted(family for family, _ in cells)))
    checks = list(dict.fromkeys(sorted(check for _, check in cells)))
    reporter.section("model families: checks passed")
    wide = max(map(len, families))
    for number, check in enumerate(checks, 1):
        reporter.write_line(f"{number:2d} = {check}")
    reporter.write_line(" ".join([" " * wide, *(f"{number:>7d}" for number in range(1, len(checks) + 1))]))
    for family in families:
        row = [_cell(cells[family, check]) for check in checks]
        reporter.write_line(" ".join([family.ljust(wide), *(text.rjust(7) for text in row)]))


def _cell(outcomes: Counter[str]) -> str:
    if not outcomes:
        return "-"
    if outcomes["FAILED"]:
        return "FAILED"
    return str(outcomes["passed"]) if outcomes["passed"] else "skipped"
