"""The parts of the page that set several runs side by side."""

import json
from collections.abc import Callable, Sequence
from pathlib import PurePath
from statistics import median
from typing import Any

from slothcore.report.html import Html, element, table
from slothcore.report.saved_run import SavedRun
from slothcore.report.sections import section
from slothcore.report.words import NOTHING, count, duration, figure, gib, short_count, value_of

# Colours that can be told apart; further runs have them again, with dashed lines.
COLOURS = 8
# A hash is told from another by its beginning.
HASH_DIGITS = 12


def colour(index: int) -> str:
    """The class of a run's lines and swatch."""
    return f"c{index % COLOURS}" + (" dashed" if index >= COLOURS else "")


def swatch(index: int) -> Html:
    """A piece of a run's line."""
    return element("i", class_=f"swatch {colour(index)}")


def outcomes(runs: Sequence[SavedRun]) -> Html:
    """One line a run; its name switches its curves on and off."""
    rows: list[list[object]] = []
    for index, run in enumerate(runs):
        columns = run.log.columns
        evaluations, speed = columns["eval_loss"], columns["tokens_per_second"].values
        # That before training is no outcome, unless it is the only one.
        trained = [value for step, value in zip(evaluations.steps, evaluations.values, strict=True) if step]
        evaluated = trained or evaluations.values
        memory = columns["memory_gib"].values or columns["host_memory_gib"].values
        button = element(
            "button", swatch(index), run.name, type="button", class_="run", data_run=index, aria_pressed="true"
        )
        rows.append(
            [
                button,
                run.status or NOTHING,
                count(run.step),
                figure(columns["loss"].last),
                figure(min(evaluated)) if evaluated else NOTHING,
                figure(median(speed)) if speed else NOTHING,
                short_count(columns["tokens"].last),
                duration(columns["elapsed"].last),
                gib(max(memory)) if memory else NOTHING,
            ]
        )
    head: list[object] = [
        *("Run", "Status", "Steps", "Last loss", "Best evaluation", "Tokens/s", "Tokens", "Time", "Peak memory")
    ]
    return element("section", element("h2", "Runs"), table(head, rows, class_="numbers runs"))


def differences(runs: Sequence[SavedRun]) -> Html | None:
    """What is not the same in all runs: options, data, versions, machine."""
    parts = [
        _differing("Options", runs, _options),
        _differing("Data", runs, _files),
        _differing("Versions", runs, lambda run: run.section("versions")),
        _differing("Machine", runs, lambda run: run.section("machine")),
    ]
    if not any(parts):
        return section("Differences", element("p", "All options, data and versions are the same.", class_="note"))
    return section("Differences", *parts, note="What is the same in all runs is left out.")


def _differing(title: str, runs: Sequence[SavedRun], values_of: Callable[[SavedRun], dict[str, Any]]) -> Html | None:
    values = [values_of(run) for run in runs]
    rows: list[list[object]] = []
    for name in dict.fromkeys(name for value in values for name in value):
        # As JSON: 1 and True are equal in Python, and not the same option.
        if len({json.dumps(value[name], sort_keys=True) if name in value else None for value in values}) > 1:
            cells = [value_of(value[name]) if name in value else NOTHING for value in values]
            rows.append([element("b", name), *cells])
    if not rows:
        return None
    head: list[object] = [title]
    head += [element("span", swatch(i), run.name) for i, run in enumerate(runs)]
    return table(head, rows, class_="differences")


def _options(run: SavedRun) -> dict[str, Any]:
    """Values by name, but for the folder, which always differs and is the run's name."""
    return {option["name"]: option.get("value") for option in run.options() if option["name"] != "output_dir"}


def _files(run: SavedRun) -> dict[str, Any]:
    """Name of each data file -> the beginning of its hash."""
    return {
        f"{PurePath(str(file.get('path'))).name} ({file.get('use')})": str(file.get("sha256") or "")[:HASH_DIGITS]
        for file in run.items("files")
    }
