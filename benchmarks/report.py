"""What a run's rows say: which of them must not be believed, and the tables."""

import math
from collections.abc import Iterable
from typing import Any

from benchmarks import harness
from benchmarks.floor import Floor
from benchmarks.shapes import StepCase, step_name

REFERENCE = "transformers"
OWN = "slothcore"
LOSS_TOLERANCE = 1e-2
# Only remarked upon: rounding alone moves a norm more than a loss.
NORM_TOLERANCE = 5e-2
Row = dict[str, Any]


def best_rounds(rows: list[Row]) -> list[Row]:
    """One row a system, case and recomputation: its fastest, or the one with a problem, which is never passed over."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["system"], row["case"], row["recompute"])
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
                references[row["case"]] = row
            else:
                references.setdefault(step_name(row["case"]), row)
    for row in believed(rows):
        loss, norm = row["first_loss"], row["gradient_norm"] = row["losses"][0], row["gradient_norms"][0]
        reference = references.get(step_name(row["case"]))
        notes = row.setdefault("notes", [])
        if not all(math.isfinite(norm) and norm > 0 for norm in row["gradient_norms"]):
            row["problem"] = f"refused: gradient norms {row['gradient_norms']}"
        elif not math.isfinite(loss):
            row["problem"] = f"refused: first loss {loss}"
        elif reference is None:
            notes.append(f"loss unverified without {REFERENCE}")
        elif not relative_difference(loss, reference["losses"][0]) <= LOSS_TOLERANCE:
            row["problem"] = f"refused: first loss {loss:.4f}, {REFERENCE} has {reference['losses'][0]:.4f}"
        elif not relative_difference(norm, reference["gradient_norms"][0]) <= NORM_TOLERANCE:
            notes.append(f"gradient norm {norm:.4g}, {REFERENCE} has {reference['gradient_norms'][0]:.4g}")


def relative_difference(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def believed(rows: Iterable[Row]) -> list[Row]:
    """The rows with figures."""
    return [row for row in rows if "problem" not in row]


def add_floors(rows: list[Row], floors: dict[str, Floor]) -> None:
    """Give slothcore's rows the floor of their step."""
    for row in believed(rows):
        if row["system"] == OWN and (floor := floors.get(step_name(row["case"]))):
            row["floor_ms"] = floor.step_ms(recompute=row["recompute"])
            row["fraction_of_floor"] = row["floor_ms"] / row["median_ms"]


def mark_limits(rows: list[Row], limits: list[float]) -> None:
    """Remark upon each row that took more memory than a limit, in GiB."""
    for row in believed(rows):
        if over := [f"{limit:g}" for limit in limits if row["peak_gib"] is not None and row["peak_gib"] > limit]:
            row.setdefault("notes", []).append(f"{row['peak_gib']:.2f} GiB, over the limit of {' and '.join(over)}")


def table(rows: list[Row]) -> str:
    """One line a row, cases together, as Markdown, then what is to be said of single rows.

    The last columns are slothcore's time over the floor of the same step, and this row's time over slothcore's fastest.
    """
    own = fastest(row for row in believed(rows) if row["system"] == OWN)
    header = ["system", "case", "recompute", "ms/step", "tokens/s", "peak GiB", "first loss", "gradient norm"]
    header += ["step/floor", "x time"]
    steps = list(dict.fromkeys(step_name(row["case"]) for row in rows))
    lines, remarks = [], []
    for row in sorted(rows, key=lambda row: steps.index(step_name(row["case"]))):
        cells = [row["system"], row["case"], "yes" if row["recompute"] else "no"]
        label = f"{' '.join(cells[:2])}{', recompute' if row['recompute'] else ''}"
        remarks += [f"{label}: {remark}" for remark in [row.get("problem"), *row.get("notes", [])] if remark]
        if "problem" in row:
            lines.append([*cells, *["-"] * 6, row["problem"].partition(":")[0]])
            continue
        base = own.get(step_name(row["case"]))
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
        step = step_name(row["case"])
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
        f"floor of {case}: {floor.step_ms(recompute=False):.1f} ms = "
        f"products {floor.products_forward:.1f} + {floor.products_backward:.1f}, "
        f"attention {floor.attention_forward:.1f} + {floor.attention_backward:.1f} ({floor.attention}), "
        f"head {floor.head:.1f}"
        for case, floor in floors.items()
    ]
    return "\n".join([*lines, *([f"floor: {problem}"] if problem else [])])


def limits_table(rows: list[Row], limits: list[float]) -> str:
    """The fastest row of each system within each memory limit, in GiB, for each step."""
    if all(row["peak_gib"] is None for row in believed(rows)):
        return "no row has a peak of memory to hold against the limits"
    header = ["step", "within GiB", "system", "case", "recompute", "tokens/s", "peak GiB", "x slothcore"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = []
    for step in dict.fromkeys(step_name(row["case"]) for row in rows):
        for limit in limits:
            fitting = [row for row in believed(rows) if row["peak_gib"] is not None and row["peak_gib"] <= limit]
            best = {name: fastest(row for row in fitting if row["system"] == name).get(step) for name in systems}
            own = best.get(OWN)
            for system, row in best.items():
                if row is None:
                    lines.append([step, f"{limit:g}", system, "none", *["-"] * 4])
                    continue
                ratio = "-" if own is None else f"{row['tokens_per_second'] / own['tokens_per_second']:.2f}"
                recompute = "yes" if row["recompute"] else "no"
                speed = f"{row['tokens_per_second']:,.0f}"
                lines.append([step, f"{limit:g}", system, row["case"], recompute, speed, gib(row), ratio])
    return harness.format_table(header, lines)


def growth_table(rows: list[Row], series: Iterable[list[str]]) -> str:
    """Time a token along series of cases; where it jumps from one line to the next, the floor should say why."""
    header = ["case", "tokens", "documents", "recompute", "ms/step", "tokens/s", "us/token", "step/floor", "peak GiB"]
    best = fastest(believed(rows))
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
                    "yes" if row["recompute"] else "no",
                    f"{row['median_ms']:.1f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{1e6 / row['tokens_per_second']:.1f}",
                    over_floor(row),
                    gib(row),
                ]
            )
        tables.append(harness.format_table(header, lines))
    return "\n\n".join(tables)


def csv_row(row: Row, settings: str) -> Row:
    recompute = "yes" if row["recompute"] else "no"
    kept = {name: value for name, value in row.items() if name in harness.CSV_FIELDS and value is not None}
    rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in kept.items()}
    return {"benchmark": "step", "settings": f"{settings} recompute={recompute}", **rounded}
