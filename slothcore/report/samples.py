"""What a model said as it was trained: its parts of the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from slothcore.report.html import Html, element, together
from slothcore.report.saved_run import SavedRun
from slothcore.report.words import NOTHING, count

# The first, the best and the newest are shown; all stand in the file.
MOST_COLUMNS = 4


@dataclass(frozen=True)
class Column:
    """The head of a column, and what its cells are called where there is no head."""

    title: Html
    label: str


def samples(run: SavedRun) -> Html | None:
    """Prompts as rows and steps as columns."""
    log = run.samples
    if not log.outputs:
        return None
    steps = _chosen(sorted(log.outputs), run.best_step)
    columns = [_step_column(step, is_best=step == run.best_step) for step in steps]
    rows = [(prompt, [log.outputs[step].get(prompt) for step in steps]) for prompt in log.prompts]
    note = "The same prompts, asked again and again as training went on; the answers are greedy."
    if len(steps) < len(log.outputs):
        note += f" Of {count(len(log.outputs))} times {len(steps)} are shown; all are in {log.path.name}."
    return _section(note, columns, rows, log.expected)


def compared_samples(runs: Sequence[SavedRun], swatches: Sequence[Html]) -> Html | None:
    """Prompts as rows and runs as columns: what each said with the weights that it saved, or at last.

    Args:
        swatches: the colour of each run.
    """
    asked = [(run, swatch) for run, swatch in zip(runs, swatches, strict=True) if run.samples.outputs]
    if not asked:
        return None
    said = [run.samples.outputs[_result_step(run)] for run, _ in asked]
    columns = [_run_column(run, swatch) for run, swatch in asked]
    prompts = list(dict.fromkeys(prompt for outputs in said for prompt in outputs))
    rows = [(prompt, [outputs.get(prompt) for outputs in said]) for prompt in prompts]
    expected = {prompt: answer for run, _ in asked for prompt, answer in run.samples.expected.items()}
    return _section("What each run said at its end, or where its result is from.", columns, rows, expected)


def _step_column(step: int, *, is_best: bool) -> Column:
    name = f"step {count(step)}"
    if not is_best:
        return Column(Html(name), name)
    return Column(together(name, " ", element("span", "best", class_="badge")), f"{name}, the best")


def _run_column(run: SavedRun, swatch: Html) -> Column:
    step = f"step {count(_result_step(run))}"
    return Column(together(swatch, run.name, element("small", step)), f"{run.name}, {step}")


def _result_step(run: SavedRun) -> int:
    """The step of the newest samples, or of those of the weights that were saved."""
    saved = run.best_step if run.notes.get("best_is_saved") is True else None
    return saved if saved in run.samples.outputs and saved is not None else max(run.samples.outputs)


def _chosen(steps: list[int], best: int | None) -> list[int]:
    """The first, the best, and as many of the newest as there is room for."""
    if len(steps) <= MOST_COLUMNS:
        return steps
    kept = {steps[0], *([best] if best in steps else [])}
    newest = [step for step in reversed(steps) if step not in kept][: MOST_COLUMNS - len(kept)]
    return sorted(kept.union(newest))


def _section(
    note: str, columns: Sequence[Column], rows: Sequence[tuple[str, Sequence[str | None]]], expected: dict[str, str]
) -> Html:
    """A table; on a phone each row becomes a card, whose cells say themselves what column they are of."""
    head = [element("th", "Prompt", scope="col"), *(element("th", column.title, scope="col") for column in columns)]
    if expected:
        head.append(element("th", "expected", scope="col"))
    body = []
    for prompt, outputs in rows:
        cells = [element("th", element("div", prompt, class_="answer"), scope="row")]
        for column, output in zip(columns, outputs, strict=True):
            cells.append(element("td", _answer(output), data_label=column.label))
        if prompt in expected:
            cells.append(element("td", _answer(expected[prompt]), data_label="expected", class_="expected"))
        elif expected:
            cells.append(element("td", NOTHING, class_="expected absent"))
        body.append(element("tr", *cells))
    table = element("table", element("thead", element("tr", *head)), element("tbody", *body), class_="samples")
    return element(
        "section",
        element("h2", "Samples"),
        element("p", note, class_="note"),
        element("div", table, class_="scrolls", tabindex="0"),
    )


def _answer(text: str | None) -> Html:
    if text is None:
        return element("div", "not asked", class_="answer nothing")
    if not text.strip():
        return element("div", "(nothing)", class_="answer nothing")
    return element("div", text, class_="answer")
