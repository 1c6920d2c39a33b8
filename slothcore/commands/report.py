"""`slothcore report`."""

import argparse
from pathlib import Path
from typing import Any

from slothcore.commands.command import Command

EXAMPLES = """\
  slothcore report runs/alpaca                                  writes runs/alpaca/report.html
  slothcore report runs/r8 runs/r16 runs/r32 -o compared.html   several runs on one page
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or under way")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the page; default: report.html, in the run's folder if there is one run"
    )


def run(values: dict[str, Any]) -> int:
    from slothcore.report import write_report

    runs = [Path(name) for name in values["runs"]]
    beside = runs[0] if len(runs) == 1 else Path()
    print(f"wrote {write_report(runs, Path(values['output'] or beside / 'report.html'))}")
    return 0


COMMAND = Command(
    name="report",
    help="draw runs as one page that needs no network",
    description="Write one self-contained HTML page about a run, or about several to compare them.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
