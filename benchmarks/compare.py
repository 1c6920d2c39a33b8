"""What has changed since the last landed figure of the same kind.

    python benchmarks/compare.py [benchmarks/results/nvidia-h100-80gb-hbm3.csv ...]

prints, for every figure that landed more than once, the last beside the one before; `run.py --compare` prints the
figures of its run beside the last landed. Figures are of one kind if benchmark, GPU, system, case and settings are the
same. Nothing is compared across GPUs.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

Figure = Mapping[str, str]
KEY = ("gpu", "benchmark", "system", "case", "settings")
# Smaller changes are within what the machine itself varies from one run to the next.
REMARKABLE = 0.05
# The tokens are the same in every run, so only rounding may move a loss.
REMARKABLE_LOSS = 0.005


def read(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of the files, in order."""
    rows: list[dict[str, str]] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def landed(folder: Path) -> list[dict[str, str]]:
    """All figures of a folder of results; none if there is no such folder."""
    return read(sorted(folder.glob("*.csv")))


def kind(figure: Figure) -> tuple[str, ...]:
    return tuple(figure[name] for name in KEY)


def pairs(new: Iterable[Figure], old: Iterable[Figure]) -> list[tuple[Figure, Figure | None]]:
    """Each new figure with the last old one of its kind, None if it is the first."""
    last = {kind(figure): figure for figure in old}
    return [(figure, last.get(kind(figure))) for figure in new]


def last_pairs(figures: Iterable[Figure]) -> list[tuple[Figure, Figure | None]]:
    """The last figure of each kind with the one before, where there is one."""
    history: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        history.setdefault(kind(figure), []).append(figure)
    return [(found[-1], found[-2]) for found in history.values() if len(found) > 1]


def change(now: str, before: str) -> float | None:
    """Relative growth of a value of the CSV; None if either is missing."""
    return float(now) / float(before) - 1 if now and before and float(before) else None


def verdict(time: float | None, memory: float | None, loss: float | None) -> str:
    """What is to be looked at, from the relative growth of each."""
    words = []
    if time is not None and abs(time) > REMARKABLE:
        words.append("SLOWER" if time > 0 else "faster")
    if memory is not None and abs(memory) > REMARKABLE:
        words.append("MORE MEMORY" if memory > 0 else "less memory")
    if loss is not None and not abs(loss) <= REMARKABLE_LOSS:
        words.append("OTHER LOSS")
    return ", ".join(words)


def table(found: Iterable[tuple[Figure, Figure | None]]) -> str:
    """One line a figure: what it was, what it is, and the change of time and memory."""
    header = ["figure", "settings", "landed", "ms then", "ms now", "time", "GiB then", "GiB now", "memory", ""]
    lines = []
    for now, before in found:
        name = " ".join(now[part] for part in ("benchmark", "system", "case"))
        milliseconds, peak = brief(now["median_ms"]), brief(now.get("peak_gib", ""))
        if before is None:
            lines.append([name, now["settings"], "never", "-", milliseconds, "-", "-", peak, "-", "first"])
            continue
        time = change(now["median_ms"], before["median_ms"])
        memory = change(now.get("peak_gib", ""), before["peak_gib"])
        loss = change(now.get("first_loss", ""), before["first_loss"])
        versions = [f"{part} {before[part]}" for part in ("torch", "triton") if before[part] != now[part]]
        lines.append(
            [
                name,
                now["settings"],
                " ".join([before["date"], before["commit"], *versions]),
                brief(before["median_ms"]),
                milliseconds,
                percent(time),
                brief(before["peak_gib"]),
                peak,
                percent(memory),
                verdict(time, memory, loss),
            ]
        )
    return harness.format_table(header, lines)


def brief(value: str) -> str:
    return f"{float(value):.4g}" if value else "-"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    args = parser.parse_args(argv)
    figures = read(args.files) if args.files else landed(harness.RESULTS)
    for gpu in dict.fromkeys(figure["gpu"] for figure in figures):
        found = last_pairs(figure for figure in figures if figure["gpu"] == gpu)
        print(f"{gpu}\n\n{table(found)}\n" if found else f"{gpu}: every figure landed once\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
