"""Tokens/s of a training step by system and case, as bars.

    python benchmarks/chart.py benchmarks/results/nvidia-h100-80gb-hbm3.csv [--bits 4] [--commit 852963c2db]

draws the last figure of every system and case that landed with one commit; `run.py` draws those of its run.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import compare
from benchmarks.shapes import step_name

COLOURS = {"slothcore": "#1b7f5c", "unsloth": "#4a7fb8", "liger": "#b8a24a", "transformers": "#8a8f98"}
INCHES_A_BAR = 0.34
WITHOUT_MATPLOTLIB = "no chart: matplotlib is not installed; pip install 'slothcore[plots]'"
Figure = Mapping[str, Any]


def draw(figures: Sequence[Figure], path: Path, *, title: str) -> str:
    """Write a PNG with a panel for each step, every panel with its own scale from zero, fastest first.

    Args:
        figures: rows of the CSV; those with the same step are drawn beside each other.
    Returns: what became of it, to print.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return WITHOUT_MATPLOTLIB
    if not figures:
        return "no chart: there is no figure to draw"
    panels: dict[str, list[Figure]] = {}
    for figure in figures:
        panels.setdefault(step_name(figure["case"]), []).append(figure)
    sizes = [len(panel) for panel in panels.values()]
    canvas = Canvas(figsize=(9, 0.9 + sum(INCHES_A_BAR * size + 0.55 for size in sizes)), layout="constrained")
    canvas.suptitle(title, fontsize=11)
    axes = canvas.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 0.6 for n in sizes]})
    for axis, (step, panel) in zip(axes[:, 0], panels.items(), strict=True):
        panel.sort(key=lambda figure: -float(figure["tokens_per_second"]))
        values = [float(figure["tokens_per_second"]) for figure in panel]
        bars = axis.barh(
            range(len(panel)), values, height=0.72, color=[COLOURS.get(figure["system"], "#555555") for figure in panel]
        )
        axis.bar_label(bars, labels=[value_label(figure) for figure in panel], padding=4, fontsize=9)
        axis.set_yticks(range(len(panel)), [bar_label(figure) for figure in panel], fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.28 * max(values))
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_title(f"{step}, tokens/s", loc="left", fontsize=10, fontweight="bold")
    canvas.savefig(path, dpi=150)
    return f"drew {path}"


def bar_label(figure: Figure) -> str:
    """Whose bar it is, and how it was run."""
    parts = [figure["system"]]
    if size := figure["case"].partition("/")[2]:
        parts.append(f"{size} at a time")
    if "recompute=yes" in figure["settings"]:
        parts.append("recompute")
    return ", ".join(parts)


def value_label(figure: Figure) -> str:
    peak = figure.get("peak_gib")
    return f"{float(figure['tokens_per_second']):,.0f}" + (f"  ({float(peak):.1f} GiB)" if peak else "")


def of_commit(figures: list[dict[str, str]], bits: int, commit: str | None) -> list[dict[str, str]]:
    """The last step of every system, case and setting that landed with a commit; None: with the last commit."""
    steps = [
        figure
        for figure in figures
        if figure["benchmark"] == "step"
        and re.search(rf"\bbits={bits}\b.*\btiny=False\b", figure["settings"])
        and (commit is None or figure["commit"] == commit)
    ]
    return list({compare.kind(figure): figure for figure in steps if figure["commit"] == steps[-1]["commit"]}.values())


def title_of(figure: Figure) -> str:
    """What holds for all bars."""
    settings = dict(item.split("=") for item in figure["settings"].split())
    model = "a tiny Llama" if settings["tiny"] == "True" else "Llama-3.1-8B's shape"
    weights = "NF4" if settings["bits"] == "4" else f"{settings['bits']}-bit weights"
    return (
        f"Training step, {model}, {settings['layers']} layers, LoRA r={settings['r']}, {weights}\n"
        f"{figure['gpu']}, {figure['date']}, {figure['commit']}"
    )


def path_beside(csv_path: Path, bits: int) -> Path:
    return csv_path.with_name(f"{csv_path.stem}-step-{bits}bit.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16, 32))
    parser.add_argument("--commit", help="default: that of the last step in the file")
    args = parser.parse_args(argv)
    figures = of_commit(compare.read([args.csv]), args.bits, args.commit)
    if not figures:
        parser.error(f"{args.csv} has no step with {args.bits} bits" + (f" of {args.commit}" if args.commit else ""))
    print(draw(figures, path_beside(args.csv, args.bits), title=title_of(figures[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
