"""`slothcore doctor`: whether everything is there that training needs, and what to do where it is not."""

import argparse
import json
import os
import sys
from typing import Any

from slothcore.commands.command import Command

EXAMPLES = """\
  slothcore doctor
  slothcore doctor --json
"""
COLORS = {"ok": "\033[32m", "warning": "\033[33m", "problem": "\033[31m"}
RESET = "\033[0m"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the findings as JSON, for programs")


def run(values: dict[str, Any]) -> int:
    from slothcore.commands.checkup import examine

    findings = list(examine())
    problems = [finding for finding in findings if finding.status == "problem"]
    if values["json"]:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
        return 1 if problems else 0
    colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    wide = max(len(finding.name) for finding in findings)
    for finding in findings:
        word = f"{finding.status:<7}"
        if colors:
            word = f"{COLORS[finding.status]}{word}{RESET}"
        print(f"{word}  {finding.name:<{wide}}  {finding.text}")
        if finding.remedy:
            print(f"{'':7}  {'':{wide}}  -> {finding.remedy}")
    print()
    if problems:
        print(f"{len(problems)} of {len(findings)} checks found a problem: {', '.join(f.name for f in problems)}")
        return 1
    where = next(finding.text for finding in findings if finding.name == "training on")
    print(f"no problem found: slothcore can train on {where}")
    return 0


COMMAND = Command(
    name="doctor",
    help="check Python, torch, GPU, disk and Hub, and say what to install",
    description="Check what training needs, with a kernel run on the GPU if there is one. The exit status is 1 if\n"
    "there is a problem.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
