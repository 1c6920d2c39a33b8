"""The page itself: its parts in order, with styles, script and numbers in one file.

The file loads nothing and runs nothing but its own script, whose hash its content security policy names: a text from
the data that slipped through as markup would still not run.
"""

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slothcore.report.comparison import COLOURS, differences, outcomes, swatch
from slothcore.report.curves import curves
from slothcore.report.html import Html, element, script_json, together
from slothcore.report.samples import compared_samples
from slothcore.report.saved_run import SavedRun, name_apart
from slothcore.report.sections import notices, outcome, subtitle, tiles, whole_run
from slothcore.report.words import count, period
from slothcore.report.writing import replace_text

REPORT_FILE = "report.html"
HERE = Path(__file__).parent
SCRIPTS = ("scales.js", "charts.js", "page.js")
# Seconds between two writings of the page of a run that goes on, and how much longer than a writing they are at least.
SECONDS_BETWEEN = 15.0
TIMES_BETWEEN = 50


@dataclass(frozen=True)
class Chart:
    """What a chart shows: series by name, and whether it begins at zero or may be logarithmic."""

    name: str
    title: str
    series: tuple[tuple[str, str, str], ...]  # key, how it is drawn (line, faint, dots or best), label
    logarithmic: bool = False
    from_zero: bool = False


CHARTS = (
    Chart(
        "loss",
        "Loss",
        (
            ("loss", "faint", "training"),
            ("loss_smooth", "line", "smoothed"),
            ("eval_loss", "dots", "evaluation"),
            ("eval_best", "best", "best evaluation"),
        ),
        logarithmic=True,
    ),
    Chart("learning_rate", "Learning rate", (("learning_rate", "line", "learning rate"),), from_zero=True),
    Chart(
        "grad_norm",
        "Gradient norm",
        (("grad_norm", "faint", "before clipping"), ("grad_norm_smooth", "line", "smoothed")),
        logarithmic=True,
    ),
    Chart(
        "tokens_per_second",
        "Tokens per second",
        (("tokens_per_second", "faint", "tokens/s"), ("tokens_per_second_smooth", "line", "smoothed")),
        from_zero=True,
    ),
    Chart("memory_gib", "GPU memory, GiB", (("memory_gib", "line", "most until then"),), from_zero=True),
    Chart("host_memory_gib", "Host memory, GiB", (("host_memory_gib", "line", "of the process"),), from_zero=True),
)


def write_report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Draw one run, or several side by side, into one HTML file that opens without a network.

    Args:
        runs: their folders, as `output_dir` named them.
        output: the file; it is replaced in one stroke.
    Returns: the file.
    Raises: FileNotFoundError or ValueError if one is no run's folder, or the file's place is none; OSError if it
            cannot be written.
    """
    if not runs:
        raise ValueError("no run was given; name at least one run's folder")
    # First: a run that is not there is most often misspelled, and its page has no place because of that.
    saved = [SavedRun(Path(folder).expanduser()) for folder in runs]
    output = Path(output).expanduser()
    if output.is_dir():
        raise ValueError(f"the page {output} is a folder; name a file in it, such as {output / REPORT_FILE}")
    if not output.parent.is_dir():
        raise ValueError(
            f"the page {output} would lie in {output.parent}, which is no folder; make it, or name another"
        )
    if len(saved) > 1:
        name_apart(saved)
    replace_text(output, page(saved))
    return output


class LivePage:
    """report.html of a run that goes on, written anew as its log grows.

    Args:
        folder: of the run; its notes are there.
        clock: seconds; for tests.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.clock = folder, clock
        self._run: SavedRun | None = None
        self._next = 0.0

    @property
    def path(self) -> Path:
        return self.folder / REPORT_FILE

    def refresh(self, *, now: bool = False) -> None:
        """Write the page if it is time, or if it must be `now`. Raises: OSError if it cannot be written."""
        begun = self.clock()
        if begun < self._next and not now:
            return
        if self._run is None:
            self._run = SavedRun(self.folder)
        self._run.update()
        replace_text(self.path, page([self._run]))
        taken = self.clock() - begun
        self._next = begun + max(SECONDS_BETWEEN, TIMES_BETWEEN * taken)


def page(runs: Sequence[SavedRun]) -> str:
    """The page of these runs as they have been read."""
    single = runs[0] if len(runs) == 1 else None
    drawn = [{"name": run.name, **curves(run.log, best=run.best_step)} for run in runs]
    charts = [chart for chart in CHARTS if any(key in run["series"] for run in drawn for key, _, _ in chart.series)]
    running = any(run.status == "running" for run in runs)
    title = single.name if single else f"{len(runs)} runs"
    if single:
        body = together(*notices(single), tiles(single), _curves(charts, drawn), whole_run(single))
    else:
        body = together(
            *(note for run in runs for note in notices(run)),
            outcomes(runs),
            _curves(charts, drawn),
            compared_samples(runs, [swatch(index) for index in range(len(runs))]),
            differences(runs),
            *(element("details", element("summary", run.name), tiles(run), whole_run(run)) for run in runs),
        )
    data = {
        "runs": drawn,
        "charts": [_described(chart, drawn) for chart in charts],
        "colours": COLOURS,
        "running": running,
        "written": round(time.time()),
    }
    return "<!doctype html>\n" + element(
        "html",
        _head(title),
        element(
            "body",
            _header(runs, title),
            element("main", body),
            element("footer", "Written by slothcore. The page holds all its data and loads nothing."),
            element("script", script_json(data), type="application/json", id="report-data"),
            element("script", _script()),
        ),
        lang="en",
    )


def _head(title: str) -> Html:
    policy = f"default-src 'none'; script-src '{_hash(_script())}'; style-src '{_hash(_style())}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} - slothcore"),
        element("style", _style()),
    )


def _header(runs: Sequence[SavedRun], title: str) -> Html:
    single = runs[0] if len(runs) == 1 else None
    status = single.status if single else ""
    pill = element("span", status, class_=f"pill {status}") if status else None
    bar = live = None
    if any(run.status == "running" for run in runs):
        total = single.notes.get("total_steps") if single else None
        bar = element("progress", value=single.step, max=total) if single and total else None
        live = element("button", "Reload", type="button", id="reload", class_="chip")
    first = element("div", element("h1", title), pill, live, class_="title")
    below = (
        [
            element("p", subtitle(single), class_="subtitle"),
            element("p", period(single.notes.get("started"), single.notes.get("ended")), class_="note"),
            element("p", said, class_="outcome") if (said := outcome(single)) else None,
        ]
        if single
        else []
    )
    return element("header", first, *below, bar)


def _curves(charts: Sequence[Chart], drawn: Sequence[dict[str, Any]]) -> Html | None:
    """The empty charts, which the script fills, and the switches over them."""
    if not charts:
        return None
    axes = [("step", "Steps"), ("elapsed", "Time"), ("tokens", "Tokens")]
    switches = [element("button", text, type="button", data_axis=name, aria_pressed="false") for name, text in axes]
    reset = element("button", "Show all", type="button", id="reset", class_="chip", hidden=True)
    bar = element("div", element("div", *switches, class_="switch", role="group", aria_label="Horizontal axis"), reset)
    figures = [
        element(
            "figure",
            element("figcaption", element("h3", chart.title), element("ul", class_="legend"), _log_switch(chart)),
            element(
                "div", element("noscript", "The curves are drawn by a script, which is switched off."), class_="plot"
            ),
            class_="chart card",
            data_chart=chart.name,
        )
        for chart in charts
    ]
    help_text = (
        "Drag to zoom, double-click or double-tap to show all. "
        "With the keyboard: arrows move, + and - zoom, 0 shows all."
    )
    return element(
        "section",
        element("div", element("h2", "Curves"), bar, class_="heading"),
        element("div", *figures, class_="charts"),
        element("p", help_text, _thinned(drawn), class_="note"),
        id="curves",
    )


def _log_switch(chart: Chart) -> Html | None:
    if not chart.logarithmic:
        return None
    return element("button", "log", type="button", class_="chip", data_log=chart.name, aria_pressed="false")


def _thinned(drawn: Sequence[dict[str, Any]]) -> str | None:
    """How many points were left out, if any."""
    most = max((run["lines"] for run in drawn), default=0)
    shown = max((len(points[0]) for run in drawn for points in run["series"].values()), default=0)
    if shown >= most:
        return None
    return f" Of {count(most)} points {count(shown)} are drawn: all lows and highs of a stretch are among them."


def _described(chart: Chart, drawn: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # One noisy step does not decide, where there is a smoothed line.
    trends = [key for key, kind, _ in chart.series if kind != "faint" and any(key in run["series"] for run in drawn)]
    keys = trends or [key for key, _, _ in chart.series]
    points = [run["series"][key][1] for run in drawn for key in keys if key in run["series"]]
    low, high = min(map(min, points)), max(map(max, points))
    series = [{"key": key, "kind": kind, "label": label} for key, kind, label in chart.series]
    return {
        "name": chart.name,
        "title": chart.title,
        "series": series,
        "fromZero": chart.from_zero,
        # What falls this far would lie flat on the axis for most of the run.
        "log": chart.logarithmic and 0 < low < high / 20,
    }


@cache
def _script() -> Html:
    return Html("\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS))


@cache
def _style() -> Html:
    return Html((HERE / "page.css").read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    """As a content security policy names a script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
