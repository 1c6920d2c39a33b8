"""The parts of the page that tell of one run. Each gives None where there is nothing to tell."""

from itertools import groupby
from statistics import median
from typing import Any

from slothcore.report.html import Html, element, table, together
from slothcore.report.samples import samples
from slothcore.report.saved_run import SavedRun
from slothcore.report.words import GIB, NOTHING, count, duration, figure, gib, is_number, short_count, size, value_of

BAR_WIDTH, BAR_GAP, BAR_HEIGHT = 10, 2, 100


def section(title: str, *children: Html | None, id: str | None = None, note: object = None) -> Html | None:
    """A titled part; None if all its children are."""
    shown = [child for child in children if child]
    if not shown:
        return None
    heading = element("h2", title)
    return element("section", heading, element("p", note, class_="note") if note else None, *shown, id=id)


def subtitle(run: SavedRun) -> str:
    """The model, how it is trained and where, in one line."""
    model, options = run.section("model"), {o["name"]: o.get("value") for o in run.options()}
    name = model.get("name") or options.get("model")
    parts = [str(name).rstrip("/").rpartition("/")[2] if name else None]
    if options:
        adapted = f"LoRA r {options.get('r')}, {options.get('bits')} bits"
        parts.append("all weights" if options.get("full_finetuning") else adapted)
    if isinstance(model.get("trained"), int) and isinstance(model.get("weights"), int):
        parts.append(f"{short_count(model['trained'])} of {short_count(model['weights'])} weights trained")
    parts.append(run.section("machine").get("device"))
    return " \N{MIDDLE DOT} ".join(str(part) for part in parts if part)


def outcome(run: SavedRun) -> str | None:
    """What decided where the run ended and which weights are its result."""
    early, best = run.notes.get("early_stop"), run.notes.get("best_step")
    said = [f"{early[:1].upper()}{early[1:]}." if isinstance(early, str) and early else None]
    if run.notes.get("best_is_saved") is True and is_number(best):
        said.append(f"The result is that of step {count(best)}, whose evaluation was the best.")
    return " ".join(filter(None, said)) or None


def tiles(run: SavedRun) -> Html:
    """The figures that one looks for first."""
    columns, total = run.log.columns, run.notes.get("total_steps")
    loss, evaluation = columns["loss"], columns["eval_loss"]
    found = [("Loss", figure(loss.last), f"from {figure(loss.values[0])}" if loss else "none logged yet")]
    if evaluation:
        best, lowest = run.best_step, dict(zip(evaluation.steps, evaluation.values, strict=True))
        saved = ", saved" if run.notes.get("best_is_saved") is True and run.notes.get("best_step") == best else ""
        where = f"step {count(evaluation.steps[-1])}" if best is None else f"best, step {count(best)}{saved}"
        found.append(("Evaluation loss", figure(evaluation.last if best is None else lowest[best]), where))
    speed = columns["tokens_per_second"]
    found.append(("Tokens per second", figure(median(speed.values)) if speed else NOTHING, "median"))
    epochs = columns["epoch"].last
    found.append(
        ("Tokens seen", short_count(columns["tokens"].last), f"{epochs:.3g} epochs" if epochs is not None else "so far")
    )
    steps = f"step {count(run.step)} / {count(total)}" if total else f"{count(run.step)} steps"
    found.append(("Training time", duration(columns["elapsed"].last), steps))
    for name, where in (("memory_gib", "GPU"), ("host_memory_gib", "process, on the host")):
        if columns[name]:
            found.append(("Peak memory", gib(max(columns[name].values)), where))
            break
    if columns["skipped_steps"]:
        found.append(("Skipped steps", count(int(sum(columns["skipped_steps"].values))), "float16 overflowed"))
    return element("dl", *(_tile(*tile) for tile in found), class_="tiles")


def _tile(name: str, value: str, below: str) -> Html:
    return element("div", element("dt", name), element("dd", value), element("dd", below, class_="below"))


def evaluations(run: SavedRun) -> Html | None:
    """Loss and perplexity at each evaluation, newest first."""
    column = run.log.columns["eval_loss"]
    perplexity = dict(zip(*_both(run, "eval_perplexity"), strict=True))
    rows: list[list[object]] = [
        [_marked(step, run.best_step), figure(value), _perplexity(perplexity.get(step))]
        for step, value in zip(column.steps, column.values, strict=True)
    ]
    if len(rows) < 2:
        return None
    box = element("div", table(["Step", "Loss", "Perplexity"], rows[::-1], class_="numbers"), class_="tall")
    return section("Evaluations", box)


def _marked(step: int, best: int | None) -> Html:
    """The number of a step, and whether its evaluation was the best."""
    badge = element("span", "best", class_="badge") if step == best else None
    return together(count(step), " " if badge else None, badge)


def _perplexity(value: float | None) -> str:
    """What is close to 1 differs after the point."""
    return f"{value:.4f}" if value is not None and value < 10 else figure(value)


def _both(run: SavedRun, name: str) -> tuple[list[int], list[float]]:
    column = run.log.columns[name]
    return column.steps, column.values


def data(run: SavedRun) -> Html | None:
    """Files with their hashes, what became of their rows, and how long they are."""
    files = [
        [
            element("span", str(file.get("path", "")), class_="path"),
            str(file.get("use", "")),
            count(file.get("rows")),
            size(file.get("bytes")),
            element("code", str(file.get("sha256") or NOTHING), class_="hash"),
        ]
        for file in run.items("files")
    ]
    listed = table(["File", "Use", "Rows", "Size", "SHA-256"], files, class_="files") if files else None
    parts = [_lengths(use, rows) for use, rows in run.section("rows").items() if isinstance(rows, dict)]
    boxes = [part for part in parts if part]
    return section("Data", listed, element("div", *boxes, class_="pair") if boxes else None)


def _lengths(use: str, rows: dict[str, Any]) -> Html | None:
    """A histogram of the documents' lengths in tokens."""
    edges, counts = rows.get("edges"), rows.get("counts")
    if not (isinstance(edges, list) and isinstance(counts, list) and counts and len(edges) == len(counts) + 1):
        return None
    if not all(map(is_number, (*edges, *counts, rows.get("targets"), rows.get("tokens")))):
        return None
    tallest = max(max(counts), 1)
    bars = []
    for i, number in enumerate(counts):
        # Half a unit at least: a bar of one document among thousands is still one.
        height = max(BAR_HEIGHT * number / tallest, 0.5) if number else 0
        place: dict[str, object] = {"x": i * BAR_WIDTH + BAR_GAP / 2, "width": BAR_WIDTH - BAR_GAP}
        bar = element("rect", **place, y=f"{BAR_HEIGHT - height:.2f}", height=f"{height:.2f}", class_="bar")
        # As high as the chart, so that a short bar can be pointed at.
        whole = element("rect", **place, y=0, height=BAR_HEIGHT, class_="whole")
        label = f"{count(edges[i])} to {count(edges[i + 1] - 1)} tokens: {count(number)}"
        bars.append(element("g", element("title", label), whole, bar))
    drawn = element(
        "svg", *bars, viewBox=f"0 0 {len(counts) * BAR_WIDTH} {BAR_HEIGHT}", preserveAspectRatio="none",
        class_="histogram", role="img", aria_label=f"Lengths of the {use} documents in tokens",
    )  # fmt: skip
    labels = (count(edges[0]), "tokens", count(edges[-1] - 1))
    ends = element("div", *(element("span", label) for label in labels), class_="ends")
    learned = rows["targets"] / max(1, rows["tokens"])
    numbers = {name: count(rows.get(name)) for name in ("documents", "rows", "tokens", "median", "longest")}
    caption = (
        "{documents} documents in {rows} rows, {tokens} tokens, {learned} of them learned. "
        "Length: median {median}, longest {longest}."
    ).format(**numbers, learned=f"{learned:.0%}")
    title = element("h3", f"Lengths, {use}")
    return element("div", title, drawn, ends, element("p", caption, class_="note"), class_="card")


def memory(run: SavedRun) -> Html | None:
    """Predicted and actual peak on the GPU."""
    plan = run.section("memory")
    predicted, actual, listed = plan.get("predicted"), plan.get("actual"), plan.get("parts")
    if not (is_number(predicted) and isinstance(listed, dict)):
        return None
    actual = actual if is_number(actual) else 0.0
    parts = {name: value for name, value in listed.items() if is_number(value) and value > 0}
    if predicted <= 0 or not parts:
        return None
    widest = max(predicted, actual, sum(parts.values()))
    left, rects, legend = 0.0, [], []
    for i, (name, value) in enumerate(parts.items()):
        width = 1000 * value / widest
        place: dict[str, object] = {"x": f"{left:.1f}", "y": 0, "width": f"{width:.1f}", "height": 20}
        rects.append(element("rect", element("title", f"{name}: {size(value)}"), **place, class_=f"fill c{i}"))
        legend.append(element("li", element("i", class_=f"swatch c{i}"), name, " ", element("b", size(value))))
        left += width
    if actual:
        rects.append(element("rect", x=0, y=26, width=f"{1000 * actual / widest:.1f}", height=20, class_="fill actual"))
        legend.append(element("li", element("i", class_="swatch actual"), "actual peak ", element("b", size(actual))))
    bars = element("svg", *rects, viewBox="0 0 1000 46", preserveAspectRatio="none", class_="bars", role="img",
                   aria_label="Predicted and actual memory")  # fmt: skip
    words = f"{gib(predicted / GIB)} predicted at the peak"
    if actual:
        words += f", {gib(actual / GIB)} used ({actual / predicted - 1:+.1%})"
    return section("Memory", bars, element("ul", *legend, class_="legend"), note=words + ".")


def configuration(run: SavedRun) -> Html | None:
    """Every option, those that are not at their default marked."""
    options = run.options()
    known = [option for option in options if "default" in option]
    changed = sum(_is_changed(option) for option in known)
    groups = []
    for group, members in groupby(options, key=lambda option: option.get("group")):
        rows = [_option(option) for option in members]
        title = element("h3", str(group)) if group else None
        groups.append(element("div", title, element("dl", *rows, class_="options"), class_="card"))
    button = None
    if known:
        button = element(
            "button", "Only what differs", type="button", class_="chip", data_only_changed=True, aria_pressed="false"
        )
    note = f"{changed} of {len(known)} options differ from their defaults; they are marked." if known else None
    return section(
        "Configuration",
        button,
        element("div", *groups, class_="groups") if groups else None,
        id="configuration",
        note=note,
    )


def _is_changed(option: dict[str, Any]) -> bool:
    return "default" in option and option.get("value") != option["default"]


def _option(option: dict[str, Any]) -> Html:
    changed = _is_changed(option)
    title = f"default: {value_of(option['default'])}" if changed else None
    value = element("dd", value_of(option.get("value")), element("small", title) if title else None)
    return element("div", element("dt", option["name"]), value, class_="changed" if changed else None)


def versions(run: SavedRun) -> Html | None:
    """What it ran with and on."""
    cards = []
    for title, part in (("Versions", "versions"), ("Machine", "machine")):
        rows = [element("div", element("dt", str(k)), element("dd", value_of(v))) for k, v in run.section(part).items()]
        if rows:
            cards.append(element("div", element("h3", title), element("dl", *rows, class_="options"), class_="card"))
    return section("Ran with", element("div", *cards, class_="groups") if cards else None)


def notices(run: SavedRun) -> list[Html]:
    """What the reader must know before trusting the page."""
    texts = []
    if not run.log.columns["loss"]:
        texts.append("The log has no training step yet, so there is nothing to draw.")
    if run.log.skipped:
        texts.append(
            f"{count(run.log.skipped)} of {count(run.log.lines)} lines of the log could not be read and are left out."
        )
    if run.status == "failed":
        texts.append(f"The run failed: {run.notes.get('error') or 'it did not say why'}")
    if run.log.unfinished and run.status != "running":
        texts.append("The last line of the log was not finished: the run was ended from outside.")
    return [element("p", text, class_="notice") for text in texts]


def whole_run(run: SavedRun) -> Html:
    """Everything but the curves."""
    parts = (samples(run), evaluations(run), memory(run), data(run), configuration(run), versions(run))
    return together(*parts)
