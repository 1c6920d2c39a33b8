"""What a run's rows say: which of them must not be believed, and the tables."""

import math
from collections.abc import Iterable
from typing import Any

from benchmarks import harness, targets
from benchmarks.floor import Floor
from benchmarks.plan import OWN, way
from benchmarks.shapes import StepCase, step_name

REFERENCE = "transformers"
WEIGHTS = {4: "", 16: " bf16", 32: " fp32"}
LOSS_TOLERANCE = 1e-2
# Only remarked upon: rounding alone moves a norm more than a loss.
NORM_TOLERANCE = 5e-2
# Launches that take the host this much of the time are what bounds it, not the GPU.
MOST_HOST = 0.9
Row = dict[str, Any]


def step_of(row: Row) -> str:
    """What a row trains on, to the bits of its frozen weights: rows of one step have one loss, and are compared."""
    return step_name(row["case"]) + WEIGHTS[row["bits"]]


def way_of(row: Row) -> str:
    return way(row["recompute"], row["decoded"])


def best_rounds(rows: list[Row]) -> list[Row]:
    """One row a system, case and way: its fastest, or the one with a problem, which is never passed over."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["system"], row["case"], row["bits"], row["recompute"], row["decoded"])
        other = best.get(key)
        if other is None or "problem" in row or ("problem" not in other and row["median_ms"] < other["median_ms"]):
            best[key] = row
    return list(best.values())


def judge(rows: list[Row]) -> None:
    """Mark with a "problem" each row whose figures must not be believed, with "notes" what else is to be said."""
    references: dict[str, Row] = {}
    for row in believed(rows):
        if row["system"] == REFERENCE:
            # Before all others the plain mean over a step in one piece: no two losses had to be added up for it.
            if row["case"] == step_name(row["case"]):
                references[step_of(row)] = row
            else:
                references.setdefault(step_of(row), row)
    for row in believed(rows):
        check_alone(row)
    for row in believed(rows):
        loss, norm = row["first_loss"], row["gradient_norm"]
        reference = references.get(step_of(row))
        notes = row["notes"] = []
        if reference is None:
            notes.append(f"loss unverified without {REFERENCE}")
        elif not relative_difference(loss, reference["losses"][0]) <= LOSS_TOLERANCE:
            row["problem"] = f"refused: first loss {loss:.4f}, {REFERENCE} has {reference['losses'][0]:.4f}"
        elif not relative_difference(norm, reference["gradient_norms"][0]) <= NORM_TOLERANCE:
            notes.append(f"gradient norm {norm:.4g}, {REFERENCE} has {reference['gradient_norms'][0]:.4g}")


def check_alone(row: Row) -> None:
    """Refuse what is wrong whatever other systems say, and pick out the figures that they are compared by."""
    row["first_loss"], row["gradient_norm"] = row["losses"][0], row["gradient_norms"][0]
    if not all(math.isfinite(norm) and norm > 0 for norm in row["gradient_norms"]):
        row["problem"] = f"refused: gradient norms {row['gradient_norms']}"
    elif not all(math.isfinite(loss) for loss in row["losses"]):
        row["problem"] = f"refused: losses {row['losses']}"


def relative_difference(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def believed(rows: Iterable[Row]) -> list[Row]:
    """The rows with figures."""
    return [row for row in rows if "problem" not in row]


def add_floors(rows: list[Row], floors: dict[str, Floor]) -> None:
    """Give every row the floor of its step, with what it computes again."""
    for row in believed(rows):
        if floor := floors.get(step_of(row)):
            row["floor_ms"] = floor.step_ms(row["recompute"])
            row["fraction_of_floor"] = row["floor_ms"] / row["median_ms"]


def mark_limits(rows: list[Row], limits: list[float]) -> None:
    """Remark upon each row that took more memory than a limit, in GiB."""
    for row in believed(rows):
        if over := [f"{limit:g}" for limit in limits if row["peak_gib"] is not None and row["peak_gib"] > limit]:
            row.setdefault("notes", []).append(f"{row['peak_gib']:.2f} GiB, over the limit of {' and '.join(over)}")


def table(rows: list[Row]) -> str:
    """One line a row, cases together, as Markdown, then what is to be said of single rows.

    The last columns are the time over the floor of the same step, and over slothcore's fastest.
    """
    own = fastest(row for row in believed(rows) if row["system"] == OWN)
    header = ["system", "case", "way", "ms/step", "tokens/s", "peak GiB", "first loss", "gradient norm"]
    header += ["step/floor", "x time"]
    steps = list(dict.fromkeys(map(step_of, rows)))
    lines, remarks = [], []
    for row in sorted(rows, key=lambda row: steps.index(step_of(row))):
        cells = [row["system"], row["case"] + WEIGHTS[row["bits"]], way_of(row)]
        label = f"{' '.join(cells[:2])}{'' if cells[2] == 'no' else ', ' + cells[2]}"
        remarks += [f"{label}: {remark}" for remark in [row.get("problem"), *row.get("notes", [])] if remark]
        if "problem" in row:
            lines.append([*cells, *["-"] * 6, row["problem"].partition(":")[0]])
            continue
        base = own.get(step_of(row))
        figures = [
            f"{row['median_ms']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            gib(row),
            f"{row['first_loss']:.4f}",
            f"{row['gradient_norm']:.4g}",
            over_floor(row),
            "-" if base is None else f"{row['median_ms'] / base['median_ms']:.2f}",
        ]
        lines.append([*cells, *figures])
    return "\n".join([harness.format_table(header, lines), *(["", *remarks] if remarks else [])])


def fastest(rows: Iterable[Row]) -> dict[str, Row]:
    """What a row trains on -> the row that does it in the least time."""
    best: dict[str, Row] = {}
    for row in rows:
        step = step_of(row)
        if step not in best or row["median_ms"] < best[step]["median_ms"]:
            best[step] = row
    return best


def gib(row: Row) -> str:
    return "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"


def over_floor(row: Row) -> str:
    return f"{row['median_ms'] / row['floor_ms']:.2f}" if "floor_ms" in row else "-"


def floor_lines(floors: dict[str, Floor], problem: str) -> str:
    """What each floor is made of, and why some are missing."""
    lines = [
        f"floor of {case}: {floor.step_ms('no'):.1f} ms = "
        f"products {floor.products_forward:.1f} + {floor.products_backward:.1f}, "
        f"attention {floor.attention_forward:.1f} + {floor.attention_backward:.1f} ({floor.attention}), "
        f"head {floor.head:.1f}" + host_remark(floor)
        for case, floor in floors.items()
    ]
    return "\n".join([*lines, *([f"floor: {problem}"] if problem else [])])


def host_remark(floor: Floor) -> str:
    """A floor must be the GPU's time, not the host's."""
    share = floor.host / floor.step_ms("no")
    return f"; the host took {share:.0%} of it to launch it, so it is no floor of the GPU" if share > MOST_HOST else ""


def limits_table(rows: list[Row], limits: list[float]) -> str:
    """The fastest row of each system within each memory limit, in GiB, for each step."""
    if all(row["peak_gib"] is None for row in believed(rows)):
        return "no row has a peak of memory to hold against the limits"
    header = ["step", "within GiB", "system", "case", "way", "tokens/s", "peak GiB", "x slothcore"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = []
    for step in dict.fromkeys(map(step_of, rows)):
        for limit in limits:
            fitting = [row for row in believed(rows) if row["peak_gib"] is not None and row["peak_gib"] <= limit]
            best = {name: fastest(row for row in fitting if row["system"] == name).get(step) for name in systems}
            own = best.get(OWN)
            for system, row in best.items():
                if row is None:
                    lines.append([step, f"{limit:g}", system, "none", *["-"] * 4])
                    continue
                ratio = "-" if own is None else f"{row['tokens_per_second'] / own['tokens_per_second']:.2f}"
                speed = f"{row['tokens_per_second']:,.0f}"
                lines.append([step, f"{limit:g}", system, row["case"], way_of(row), speed, gib(row), ratio])
    return harness.format_table(header, lines)


def growth_table(rows: list[Row], series: Iterable[list[str]]) -> str:
    """Time a token along series of cases; where it jumps from one line to the next, the floor should say why."""
    header = ["case", "tokens", "documents", "way", "ms/step", "tokens/s", "us/token", "step/floor", "peak GiB"]
    best = {row["case"]: row for row in fastest(believed(rows)).values()}
    tables = []
    for cases in series:
        lines = []
        for name in cases:
            case = StepCase.parse(name)
            cells = [name, f"{case.tokens:,}", str(case.rows)]
            row = best.get(name)
            if row is None:
                problem = next((row["problem"] for row in reversed(rows) if row["case"] == name), "not run")
                lines.append([*cells, *["-"] * 5, problem.partition(":")[0]])
                continue
            lines.append(
                [
                    *cells,
                    way_of(row),
                    f"{row['median_ms']:.1f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{1e6 / row['tokens_per_second']:.1f}",
                    over_floor(row),
                    gib(row),
                ]
            )
        tables.append(harness.format_table(header, lines))
    return "\n\n".join(tables)


def targets_table(rows: list[Row], gpu: str) -> str:
    """Each target of a step beside what these rows reached; "" if none of them is of a case that has one."""
    rows = believed(rows)
    lines = []
    for target in targets.STEPS:
        step = target.case + WEIGHTS[target.bits]
        if any(step_of(row) == step for row in rows):
            reached, row = reach(target, [row for row in rows if step_of(row) == step])
            figure = "-" if reached is None else targets.quantity(reached, target.unit)
            how = "-" if row is None else f"{way_of(row)}, {row['median_ms']:.1f} ms, {gib(row)} GiB"
            lines.append([target.what, target.stated, figure, target.verdict(reached), how])
    header = ["target", "goal", "measured", "verdict", "by"]
    return f"{targets.heading(gpu)}:\n\n{harness.format_table(header, lines)}" if lines else ""


def reach(target: targets.StepTarget, rows: list[Row]) -> tuple[float | None, Row | None]:
    """The figure that the rows of a target's step give it, and slothcore's row that it is of."""
    within = target.within
    fitting = [row for row in rows if within is None or (row["peak_gib"] is not None and row["peak_gib"] <= within)]
    own = [row for row in fitting if row["system"] == OWN]
    if target.of_floor:
        # A way that computes things again has another floor.
        own = [row for row in own if "floor_ms" in row and row["recompute"] == "no"]
    best = max(own, key=speed, default=None)
    if best is None:
        return None, None
    if target.of_floor:
        return best["median_ms"] / best["floor_ms"], best
    if target.peer is None:
        return speed(best), best
    others = [row for row in rows if row["system"] == target.peer and target.peer_case in (None, row["case"])]
    theirs = max(others, key=speed, default=None)
    return (None, best) if theirs is None else (speed(best) / speed(theirs), best)


def speed(row: Row) -> float:
    return float(row["tokens_per_second"])


def csv_row(row: Row, settings: str) -> Row:
    """What the CSV keeps of a row; its settings name only what is not as it always was."""
    kept = {name: value for name, value in row.items() if name in harness.CSV_FIELDS and value is not None}
    rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in kept.items()}
    decoded = f" decoded={row['decoded']}" if row["decoded"] else ""
    own = {"settings": f"bits={row['bits']} {settings} recompute={row['recompute']}{decoded}"}
    return {"benchmark": "step", **own, **rounded}
